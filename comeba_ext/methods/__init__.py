"""COMEBA-HK and what it is compared with, behind one interface: every method is an :class:`Editor`.

    Method = methods.get("MEMIT")
    editor = Method(model, tokenizer)                  # settings: methods.default_config("MEMIT", model)
    editor.collect_covariance(texts)
    editor.edit(requests); editor.rollback(0); editor.save_pretrained("edits")
    editor = methods.load(model, tokenizer, "edits")   # whichever method made them

All share target values, keys, covariance and key memory with the editor; a file here holds only what makes its method
different. None writes a base weight: what a method would add to a weight is the ``delta`` of the hooked layer, and
methods without hooks let the edited output through everywhere.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from comeba_ext.editing.editor import Editor
from comeba_ext.errors import ConfigError
from comeba_ext.methods.fixed_threshold import FixedThreshold
from comeba_ext.methods.ft import FT, FTL
from comeba_ext.methods.memit import MEMIT
from comeba_ext.methods.pmet import PMET
from comeba_ext.methods.rome import ROME
from comeba_ext.methods.settings import default_config
from comeba_ext.methods.without_hooks import WithoutHooks
from comeba_ext.storage import read_manifest

METHODS: dict[str, type[Editor]] = {
    cls.method: cls for cls in (Editor, WithoutHooks, MEMIT, ROME, PMET, FT, FTL, FixedThreshold)
}

__all__ = ["FT", "FTL", "MEMIT", "METHODS", "PMET", "ROME", "FixedThreshold", "WithoutHooks", "default_config", "get", "load"]


def get(name: str) -> type[Editor]:
    """The class of a method; case, spaces and dashes in its name do not matter.

    Raises:
        ConfigError: there is no such method; the message lists those there are.
    """
    plain = lambda text: "".join(c for c in text.lower() if c.isalnum())  # noqa: E731
    for known, cls in METHODS.items():
        if isinstance(name, str) and plain(name) == plain(known):
            return cls
    raise ConfigError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")


def load(model: nn.Module, tokenizer, folder: str | Path) -> Editor:
    """Go on editing from a saved folder with the method that made it.

    Raises:
        StorageError: as :meth:`Editor.from_pretrained`.
    """
    return get(read_manifest(folder).get("method", Editor.method)).from_pretrained(model, tokenizer, folder)
