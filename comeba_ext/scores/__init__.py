"""Scores: what decides which tokens of a hooked layer take their edit. One file a score, known by name.

The paper's ``zscore``, ``reference`` and ``nearest`` are registered here; :func:`register_score` adds another one.
"""

from __future__ import annotations

import difflib

from comeba_ext.errors import ComebaError
from comeba_ext.scores.base import Score
from comeba_ext.scores.nearest import NearestScore
from comeba_ext.scores.reference import ReferenceScore
from comeba_ext.scores.zscore import ZScore

_KNOWN: dict[str, type[Score]] = {}


def register_score(score: type[Score]) -> type[Score]:
    """Make a score known by its ``name``; a decorator.

    Raises:
        ComebaError: it has no name, or another score has that name.
    """
    name = score.name
    if not isinstance(name, str) or not name:
        raise ComebaError(f"{score.__name__} has no name; give the class an attribute 'name'")
    known = _KNOWN.setdefault(name, score)
    if known is not score:
        raise ComebaError(f"there is a score {name!r} already ({known.__module__}.{known.__qualname__}); choose another name")
    return score


def score_named(name: str) -> type[Score]:
    """Raises :class:`ComebaError` with the nearest known names."""
    if name not in _KNOWN:
        near = difflib.get_close_matches(str(name), _KNOWN, 1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ComebaError(f"unknown scope {name!r}{hint}; choose one of {', '.join(_KNOWN)}")
    return _KNOWN[name]


def score_names() -> tuple[str, ...]:
    return tuple(_KNOWN)


for _score in (ZScore, ReferenceScore, NearestScore):
    register_score(_score)
