"""Settings for one model, found by trying: ``comeba tune MODEL``.

1. *Which facts does it know?* The shipped facts (:mod:`probes`), or the user's records, are asked; what the model answers
   serves the next step, and stays in the trial edits as what must not change.
2. *Where does it keep them?* The residual stream at the subject's last token is replaced, block by block, by another
   subject's (causal tracing, Meng et al. 2022, arXiv 2202.05262). Up to the last block where that decides the answer a
   target value can decide it too: the candidates for the value block.
3. *Which settings edit it?* A handful of trial edits, in consecutive batches, for each candidate, then for each
   optimiser and learning rate, then for each leverage ratio, the best of one kind held while the next is tried.

Every trial is kept in a log, so that an interrupted search goes on.
"""

from comeba_ext.tuning.search import Trial, Tuning, tune

__all__ = ["Trial", "Tuning", "tune"]
