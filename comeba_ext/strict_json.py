"""JSON that any reader takes: numbers that JSON has no word for are not written as numbers."""

from __future__ import annotations

import json
import math


def strict_json(value, indent: int | None = None) -> str:
    """A JSON text: NaN, which a destroyed model's scores are, becomes ``null``; infinities, which settings may hold, become the texts
    ``"inf"`` and ``"-inf"``."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value):
    if isinstance(value, dict):
        return {key: _strict(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value
