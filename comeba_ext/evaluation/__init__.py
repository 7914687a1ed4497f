"""How well edits took, how far they reach and what they left alone."""

from comeba_ext.evaluation.base import BasePredictions, predict_base
from comeba_ext.evaluation.metrics import Metrics, bootstrap_interval, evaluate

__all__ = ["BasePredictions", "Metrics", "bootstrap_interval", "evaluate", "predict_base"]
