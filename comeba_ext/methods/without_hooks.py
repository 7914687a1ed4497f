"""MEMIT with accumulated keys: the paper's ablation "COMEBA without hooks" (arXiv 2403.05330, section 4.4)."""

from __future__ import annotations

from comeba_ext.methods.comeba_hk import ComebaHK


class WithoutHooks(ComebaHK):
    """COMEBA-HK with the edited output everywhere: no token is kept out of scope.

    The key memory still accumulates every key; there are no thresholds to calibrate. Base of all methods that write by target values
    and let every token see every edit. (MEMIT-seq is what the literature calls it.)
    """

    name = "MEMIT-seq"
    aliases = ("COMEBA without hooks",)
    scored = tells_questions = False
    serving = "temporary"

    def _calibrate(self, name, layer, reading) -> None:
        pass

    def _rescale(self, name: str) -> None:
        pass
