"""COMEBA without hooks: the paper's ablation (arXiv 2403.05330, section 4.4)."""

from __future__ import annotations

from comeba_ext.methods.comeba_hk import ComebaHK


class WithoutHooks(ComebaHK):
    """COMEBA-HK with the edited output everywhere: no token is kept out of scope.

    The key memory still accumulates every key; there are no thresholds to calibrate. Base of all methods that edit weights and so
    let every token see every edit. (The literature knows the same as MEMIT-seq, MEMIT with accumulated keys.)
    """

    name = "COMEBA without hooks"
    scored = False
    serving = "temporary"

    def _calibrate(self, name, layer, reading) -> None:
        pass

    def _rescale(self, name: str) -> None:
        pass
