"""The compiled operators (``csrc/``): not built yet in this version."""

from __future__ import annotations


def available(device_type: str) -> bool:
    """Whether compiled operators serve this kind of device; compiles them on first use."""
    return False
