"""Scores: what decides which tokens of a hooked layer take their edit. One file a score, known by name.

The paper's ``zscore``, ``reference``, ``nearest`` and ``always`` are registered here; :func:`register_score`, or the entry-point group
``comeba_ext.scores``, adds another one.
"""

from comeba_ext.errors import ComebaError
from comeba_ext.registry import Registry
from comeba_ext.scores.always import AlwaysScore
from comeba_ext.scores.base import Score
from comeba_ext.scores.nearest import NearestScore
from comeba_ext.scores.reference import ReferenceScore
from comeba_ext.scores.zscore import ZScore

__all__ = ["SCORES", "AlwaysScore", "NearestScore", "ReferenceScore", "Score", "ZScore", "register_score", "score_named", "score_names"]

SCORES = Registry("score", "scope", "comeba_ext.scores", ComebaError)
register_score = SCORES.register
"""Decorator of a :class:`Score`: makes it known by its ``name``. ComebaError: it has none, or another score has it."""
score_named = SCORES.named

for _score in (ZScore, ReferenceScore, NearestScore, AlwaysScore):
    register_score(_score)


def score_names() -> tuple[str, ...]:
    return tuple(SCORES.all())
