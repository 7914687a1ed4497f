"""What can be added from outside, methods and scores, by name: registered by a decorator, or found among installed packages.

A package that names its class under the entry-point group ``comeba_ext.methods`` or ``comeba_ext.scores`` is loaded when names are
first looked at.
"""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from comeba_ext.errors import ComebaError


class Registry:
    """Classes by their ``name``.

    Args:
        what: a word for one of them, in messages, and
        setting: for its name where it is asked for.
        group: of entry points.
        error: raised for unknown names.
    """

    def __init__(self, what: str, setting: str, group: str, error: type[ComebaError]):
        self.what, self.setting, self.group, self.error = what, setting, group, error
        self._known: dict[str, type] = {}
        self._searched = False

    def register(self, cls: type) -> type:
        """Make a class known by its ``name``; a decorator.

        Raises:
            ComebaError: it has no name, or another one has that name.
        """
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not _plain(name):
            raise ComebaError(f"{cls.__name__} has no name; give the class an attribute 'name'")
        names = {_plain(own) for own in _names_of(cls)}
        known = next((own for own in self._known.values() if own is not cls and names & {_plain(other) for other in _names_of(own)}), None)
        if known is not None:
            raise ComebaError(f"there is a {self.what} {name!r} already ({known.__module__}.{known.__qualname__}); choose another name")
        self._known[name] = cls
        return cls

    def named(self, name: str) -> type:
        """The class of that name; case, spaces and dashes do not matter.

        Raises:
            ComebaError: of the registry's kind, with the nearest name and all there are.
        """
        known = self.all()
        for cls in known.values():
            if isinstance(name, str) and _plain(name) in map(_plain, _names_of(cls)):
                return cls
        near = difflib.get_close_matches(str(name).lower(), [own.lower() for own in known], 1)
        hint = f" (nearest: {next(own for own in known if own.lower() == near[0])!r})" if near else ""
        raise self.error(f"unknown {self.setting} {name!r}{hint}; choose one of {', '.join(known)}")

    def all(self) -> dict[str, type]:
        """Every class by its name, those of installed packages among them.

        Raises:
            ComebaError: a package's class cannot be loaded, or two have one name.
        """
        if not self._searched:
            for point in entry_points(group=self.group):
                try:
                    self.register(point.load())
                except ComebaError as error:
                    raise ComebaError(f"the installed {self.what} {point.value}: {error}") from None
                except Exception as error:
                    raise ComebaError(
                        f"the installed {self.what} {point.value} cannot be loaded: {type(error).__name__}: {error}"
                    ) from None
            self._searched = True
        return self._known


def _names_of(cls: type) -> tuple[str, ...]:
    return (cls.name, *vars(cls).get("aliases", ()))  # a subclass has its parent's attributes


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())
