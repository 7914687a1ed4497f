"""COMEBA without hooks: the paper's ablation (arXiv 2403.05330, section 4.4)."""

from __future__ import annotations

from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.editor import Editor
from comeba_ext.methods.settings import default_config


class WithoutHooks(Editor):
    """COMEBA-HK with the edited output everywhere: no token is kept out of scope.

    The key memory still accumulates every key; there are no thresholds to calibrate. Base of all baselines, which edit
    weights and so let every token see every edit.
    """

    method = "COMEBA without hooks"
    serving = "temporary"

    def __init__(self, model: nn.Module, tokenizer, config: EditConfig | None = None):
        super().__init__(model, tokenizer, config)
        for layer in self.layers.values():
            layer.alpha.zero_()  # decides nothing; a finite number, where the score's start may be infinite
        self._alphas = [self._alpha()]

    @classmethod
    def default_config(cls, model: nn.Module) -> EditConfig:
        return default_config(cls, model)

    def _calibrate(self, name, layer, reading) -> None:
        pass

    def _rescale(self, name: str) -> None:
        pass
