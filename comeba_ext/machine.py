"""What a measurement was made on: it belongs beside every number."""

from __future__ import annotations

import os
import platform


def machine() -> dict:
    """``cpu`` (its model), ``cores``, ``threads`` of torch, ``gpu`` (``None``: none visible)."""
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict:
    """Of this package and what its numbers depend on."""
    import torch
    import transformers

    from comeba_ext import __version__

    return {
        "comeba_ext": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
