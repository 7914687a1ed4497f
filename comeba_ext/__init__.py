"""Correct facts in a Hugging Face language model without retraining, batch after batch (COMEBA-HK, arXiv 2403.05330)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what __getattr__ finds, for editors and type checkers
    from comeba_ext.editing.config import EditConfig
    from comeba_ext.editing.report import EditReport
    from comeba_ext.editor import Editor
    from comeba_ext.errors import ComebaError
    from comeba_ext.evaluation import evaluate
    from comeba_ext.hub import push_to_hub
    from comeba_ext.layers.hooked_linear import HookedLinear
    from comeba_ext.methods import Method, register_method
    from comeba_ext.methods.easyedit import read_easyedit
    from comeba_ext.named_edits import active_edits, edit_sets, set_edits, unload_edits
    from comeba_ext.saved_edits import load_edits
    from comeba_ext.scores import Score, register_score
    from comeba_ext.text.request import EditRequest

__version__ = "0.1.0"

_HOME = {
    "Editor": "comeba_ext.editor",
    "EditConfig": "comeba_ext.methods.easyedit",  # of comeba_ext.editing.config; its from_easyedit is registered there
    "EditRequest": "comeba_ext.text.request",
    "EditReport": "comeba_ext.editing.report",
    "HookedLinear": "comeba_ext.layers.hooked_linear",
    "load_edits": "comeba_ext.saved_edits",
    "set_edits": "comeba_ext.named_edits",
    "edit_sets": "comeba_ext.named_edits",
    "active_edits": "comeba_ext.named_edits",
    "unload_edits": "comeba_ext.named_edits",
    "push_to_hub": "comeba_ext.hub",
    "evaluate": "comeba_ext.evaluation",
    "ComebaError": "comeba_ext.errors",
    "Score": "comeba_ext.scores",
    "register_score": "comeba_ext.scores",
    "Method": "comeba_ext.methods",
    "register_method": "comeba_ext.methods",
    "read_easyedit": "comeba_ext.methods.easyedit",
}
__all__ = [
    "ComebaError",
    "EditConfig",
    "EditReport",
    "EditRequest",
    "Editor",
    "HookedLinear",
    "Method",
    "Score",
    "active_edits",
    "edit_sets",
    "evaluate",
    "load_edits",
    "push_to_hub",
    "read_easyedit",
    "register_method",
    "register_score",
    "set_edits",
    "unload_edits",
    "__version__",
]


def __getattr__(name: str):
    # Loaded on first use: `comeba --help` and `import comeba_ext` need not wait for torch and transformers.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
