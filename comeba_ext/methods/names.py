"""Methods by name."""

from __future__ import annotations

from comeba_ext.errors import ConfigError
from comeba_ext.methods.base import Method
from comeba_ext.registry import Registry

METHODS = Registry("method", "method", "comeba_ext.methods", ConfigError)
register_method = METHODS.register
"""Decorator of a :class:`Method`: makes it known by its ``name``. ComebaError: it has none, or another method has it."""


def method_named(method: str | type[Method]) -> type[Method]:
    """A method by its name, or itself.

    Raises:
        ConfigError: there is no such method; the message says the nearest name and all there are.
    """
    if isinstance(method, type) and issubclass(method, Method):
        return method
    return METHODS.named(method)


def method_names() -> tuple[str, ...]:
    return tuple(METHODS.all())
