"""How well edits took, how far they reach and what they left alone."""

from comeba_ext.evaluation.ability import Reading, harness, perplexity, read_text
from comeba_ext.evaluation.base import BasePredictions, predict_base
from comeba_ext.evaluation.fluency import fluency, ngram_entropy
from comeba_ext.evaluation.judge import Judge
from comeba_ext.evaluation.metrics import Metrics, averaged, bootstrap_interval, evaluate, summarise
from comeba_ext.evaluation.probabilities import counterfact_scores
from comeba_ext.evaluation.protocols import Protocol, Result, run_protocol
from comeba_ext.evaluation.written import Writing

__all__ = [
    "BasePredictions",
    "Judge",
    "Metrics",
    "Protocol",
    "Reading",
    "Result",
    "Writing",
    "averaged",
    "bootstrap_interval",
    "counterfact_scores",
    "evaluate",
    "fluency",
    "harness",
    "ngram_entropy",
    "perplexity",
    "predict_base",
    "read_text",
    "run_protocol",
    "summarise",
]
