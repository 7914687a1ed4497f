"""COMEBA-HK with a threshold that is never lowered: the comparison of the paper's figure 10."""

from __future__ import annotations

from comeba_ext.editing.editor import Editor
from comeba_ext.methods.settings import default_config


class FixedThreshold(Editor):
    """α stays at ``config.alpha``: a prompt whose score does not reach it never meets its own edit."""

    method = "COMEBA-HK fixed threshold"

    @classmethod
    def default_config(cls, model):
        return default_config(cls, model)

    def _calibrate(self, name, layer, reading) -> None:
        alpha = layer.alpha.clone()
        self._rescale(name)
        layer.alpha.copy_(alpha)
