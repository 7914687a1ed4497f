"""What this machine has for the package, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pyyaml", "tqdm", "typer")


def examine() -> dict:
    """``{"found": {...}, "problems": [...], "hints": [...]}``; a problem keeps the package from working."""
    import comeba_ext

    found: dict[str, object] = {"comeba_ext": comeba_ext.__version__, "python": platform.python_version(),
                                "platform": platform.platform(), "cpu cores": os.cpu_count()}  # fmt: skip
    problems, hints = [], []
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(f"{name} is missing: pip install {name}")
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["torch built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        found["gpus"] = ", ".join(gpus) or "none"
        if not gpus:
            hints.append("No GPU is visible: everything runs in plain torch on the CPU, with the same results.")
    found["nvcc"] = _nvcc() or "none"
    found["compiled operations"] = "none in this version; hooks and key memory run in plain torch"
    model = importlib.util.find_spec("comeba_ext.testbed")
    from comeba_ext import testbed

    weights = testbed.FOLDER / "model.safetensors"
    found["embedded model"] = f"{weights.stat().st_size / 1e6:.1f} MB" if model and weights.exists() else "missing"
    if not weights.exists():
        problems.append("the embedded model is missing from the installation: reinstall the package")
    return {"found": found, "problems": problems, "hints": hints}


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{path} (does not run)"
    release = [line for line in out.splitlines() if "release" in line]
    return release[0].strip() if release else path
