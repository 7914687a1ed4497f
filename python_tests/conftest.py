"""Loads the fixtures, which import torch and Transformers, where tests run: not in the process that hands them out to others, which would
only begin ten seconds later for it."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is loaded, here and in processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    hands_out = getattr(config.option, "tx", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")
