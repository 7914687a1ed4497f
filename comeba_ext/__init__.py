"""Correct facts in a Hugging Face language model without retraining, batch after batch (COMEBA-HK, arXiv 2403.05330)."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Editor": "comeba_ext.editing.editor",
    "EditConfig": "comeba_ext.editing.config",
    "EditRequest": "comeba_ext.editing.request",
    "EditReport": "comeba_ext.editing.report",
    "HookedLinear": "comeba_ext.hooked_linear",
    "load_edits": "comeba_ext.saved_edits",
    "evaluate": "comeba_ext.evaluation",
    "ComebaError": "comeba_ext.errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    # Loaded on first use: `comeba --help` and `import comeba_ext` need not wait for torch and transformers.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
