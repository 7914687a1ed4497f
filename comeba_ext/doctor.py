"""What this machine has for the package, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "filelock",
    "ninja",
    "pybind11",
    "pyyaml",
    "tqdm",
    "typer",
    "jinja2",
    "matplotlib",
)
EXTRAS = {
    "gguf": "reading .gguf files",
    "accelerate": "comeba train, --device auto",
    "peft": "models with adapters",
    "lm_eval": "comeba ability --tasks",
    "gradio": "comeba ui",
    "rouge_score": "comeba eval --long",
}


def examine() -> dict:
    """``{"found": {...}, "problems": [...], "hints": [...]}``; a problem keeps the package from working."""
    import comeba_ext

    found: dict[str, object] = {
        "comeba_ext": comeba_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu cores": os.cpu_count(),
    }
    problems, hints = [], []
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(f"{name} is missing: pip install {name}")
    for name, use in EXTRAS.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"none (for {use})"
    gpus = []
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["torch built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        asked = os.environ.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS={asked}" if asked else "OMP_NUM_THREADS gives each of several processes its share"
        found["threads"] = f"{torch.get_num_threads()} ({why})"
        if torch.cuda.is_available():
            gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        found["gpus"] = ", ".join(gpus) or "none"
        if not gpus:
            hints.append("No GPU is visible: everything runs in plain torch on the CPU, with the same results.")
        if importlib.util.find_spec("filelock") is not None:
            _compiled_operators(found, hints, bool(gpus))
    _embedded_model(found, problems)
    return {"found": found, "problems": problems, "hints": hints}


def examine_model(model, tokenizer) -> tuple[dict[str, object], list[str]]:
    """What editing a model would mean: where, with which settings, at what cost; and hints.

    Raises:
        ArchitectureError: its parts cannot be found.
    """
    from comeba_ext.covariance import TOKENS_PER_DIMENSION
    from comeba_ext.editing.config import EditConfig
    from comeba_ext.editing.recognition import KEYS
    from comeba_ext.forward.architectures import Architecture, context_length
    from comeba_ext.layers.hooked_linear import shape_of
    from comeba_ext.ops.nearest_hook import ROWS

    config = EditConfig.for_model(model)
    architecture = Architecture.of(model, config.blocks, config.projection)
    names = [architecture.projection_name(index) for index in config.layers]
    d_in, d_out = shape_of(model.get_submodule(names[-1]))
    lam, after = config.lam_of(d_in), architecture.after_norm(model, config.value_layer) is not None
    start = bool(tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]) if tokenizer.bos_token_id is not None else False
    size = len(names) * (d_in * d_out * 4 + 2 * d_in * d_in * 8)
    kept = len(names) * KEYS * (d_in + d_out) * 4
    added = kept + len(names) * KEYS * min(ROWS, d_in) * 4
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    found = {
        "model": f"{model.config.model_type}, {millions:.1f}M parameters, {architecture.num_blocks(model)} blocks",
        "context": context_length(model) or "unbounded",
        "edited projections": f"{names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}, {d_in} → {d_out}",
        "norm after the MLP": "yes: one block is edited, before the norm" if after else "no",
        "score": config.scope,
        "λ": f"{lam:g} = d_in / {d_in / lam:g}; a key of average leverage (d_in) realises {d_in / (lam + d_in):.2f} of its edit a layer",
        "target values": f"{config.optimizer}, matrix products in {config.compute_dtype or 'the dtype of the model'}",
        "covariance": f"{TOKENS_PER_DIMENSION * d_in} tokens of plain text",
        "memory while editing": f"{size / 1e6:.0f} MB beside the model",
        "an edit takes": f"{added / 1e3:.0f} kB in the model (bounded by max_edit_memory), two keys a layer as factors and directions, and "
        f"{kept / 1e3:.0f} kB in the editor, the keys and what they are to answer, until it is taken back",
        "start token": "yes" if start else "no",
    }
    hints = (
        []
        if start
        else [
            "Its tokenizer puts no start token, so the first position of every text is much the same to it: a subject of one "
            "token that begins its prompt is edited for that prompt only."
        ]
    )
    return found, hints


def _compiled_operators(found: dict, hints: list[str], gpu: bool) -> None:
    """Whether CUDA kernels are there or can be compiled, with what, and which settings are in force."""
    from comeba_ext.kernels import build, loader

    nvcc, compiler = build.find_nvcc(), build.find_compiler()
    found["nvcc"] = f"{build.nvcc_release(nvcc) or 'does not run'} ({nvcc})" if nvcc else "none"
    found["c++ compiler"] = compiler or "none"
    found["ninja command"] = shutil.which("ninja") or "none (not needed)"
    found["kernel cache"] = str(loader.cache_folder())
    settings = [f"{name}={os.environ[name]}" for name in loader.VARIABLES if os.environ.get(name)]
    found["settings"] = ", ".join(settings) or "none"
    status = loader.status()
    cause = f": {status['cause']}" if status["cause"] else ""
    place = f" ({status['path']})" if status["state"] in ("ahead of time", "cached", "compiled now") else ""
    found["compiled operations"] = f"{status['state']}{cause}{place}"
    if status["state"] == "not compiled yet":
        hints.append("CUDA kernels are compiled on first use, once, in about a minute.")
    elif cause and gpu:
        hints.append(f"Hooks and key memory run in plain torch{cause}. {status['remedy']}.")
        if Path(status["path"]).is_file():
            hints.append(f"Compiler output: {status['path']}")


def _embedded_model(found: dict, problems: list[str]) -> None:
    from comeba_ext import testbed

    weights = testbed.FOLDER / "model.safetensors"
    found["embedded model"] = f"{weights.stat().st_size / 1e6:.1f} MB" if weights.exists() else "missing"
    if not weights.exists():
        problems.append("the embedded model is missing from the installation: reinstall the package")
