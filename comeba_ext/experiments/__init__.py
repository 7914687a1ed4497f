"""Experiments as files: a grid of methods and settings under one protocol, run on any model, into table, JSON and plots.

experiment = experiments.load("table2")                       # or the path of a YAML file
result = experiments.run(experiment, model, tokenizer, {"zsre": read_requests("zsre.json")}, out, texts=corpus)
"""

from comeba_ext.experiments.definition import Case, Experiment, load, names
from comeba_ext.experiments.processes import in_processes
from comeba_ext.experiments.runner import run

__all__ = ["Case", "Experiment", "in_processes", "load", "names", "run"]
