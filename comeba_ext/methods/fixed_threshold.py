"""COMEBA-HK with a threshold that is never lowered: the comparison of the paper's figure 10."""

from __future__ import annotations

from comeba_ext.methods.comeba_hk import ComebaHK


class FixedThreshold(ComebaHK):
    """α stays at ``config.alpha``: a prompt whose score does not reach it never meets its own edit."""

    name = "COMEBA-HK fixed threshold"

    def _calibrate(self, name, layer, reading) -> None:
        alpha = layer.alpha.clone()
        self._rescale(name)
        layer.alpha.copy_(alpha)
