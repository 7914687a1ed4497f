"""Named sets of edits on one model: put on one at a time, or together where their keys do not meet, and taken off again.

    load_edits(model, "edits/press", name="press")       # on, alone
    load_edits(model, "edits/legal", name="legal")       # on, alone; "press" waits
    set_edits(model, ["press", "legal"])                 # both
    set_edits(model, [])                                 # the model as it came
    unload_edits(model, "press")

A set that is off is a table of tensors on the host and no part of the model; one that is on is what :func:`load_edits` without a name
puts there, bit for bit. Of sets that are on together

* hooked layers around the same projection wrap one another, each with its own score, thresholds and edits, so that a token takes the
  edits of the set whose scope it is in; methods that let their edits through everywhere add up the same way, ``W + delta + delta'``;
* edited facts that stand before a question (in-context methods) are one list, and so is what tells which edits a prompt asks for
  (``question_floor``).

Where a token would meet the edits of two sets, nobody has found values for their sum. So sets that edit the same subject are refused,
and so are, where scores compare keys, sets of which one has a key in the scope of the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers.attachment import Attachment, attach_all, attachments, between_passes, detach
from comeba_ext.layers.prompts import give_tokenizer
from comeba_ext.methods.base import Method, of_layer

PLACE = "_comeba_edit_sets"  # attribute of the model that holds its sets


@dataclass(frozen=True, eq=False)
class EditSet:
    """A folder of edits that was read, and found to fit a model.

    Attributes:
        name: among the model's sets.
        folder: where it was read from.
        edits: how many there are.
        method, config, architecture: what its attachments are made with.
        adapter: their tensors, on the host; never written.
        facts: prompt and subject of every edit, where the folder says so (one that was saved for inference only does not).
        tokenizer: where edits stand in the prompt, for the model's ``generate``.
    """

    name: str
    folder: str
    edits: int
    method: type[Method]
    config: EditConfig
    architecture: Architecture
    adapter: dict[str, torch.Tensor] = field(repr=False)
    facts: frozenset[tuple[str, str]] = field(repr=False)
    tokenizer: object = field(default=None, repr=False)

    @property
    def subjects(self) -> frozenset[str]:
        return frozenset(subject for _, subject in self.facts)

    def build(self, model: nn.Module) -> dict[str, Attachment]:
        """Its attachments for an unedited model, which is not changed."""
        self.method.check(self.config, model, self.architecture)
        found = self.method.build(model, self.config, self.architecture)
        give_tokenizer(found, self.tokenizer)
        for name, attachment in found.items():
            attachment.restore(of_layer(self.adapter, name))
        return found

    def __deepcopy__(self, memo: dict) -> EditSet:
        return self  # nothing in it changes


@dataclass
class _Sets:
    """What a model holds.

    Attributes:
        known: every set by name; active: names of those that are on, the innermost first.
        placed: their attachments.
    """

    known: dict[str, EditSet] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    placed: list[Attachment] = field(default_factory=list)


def edit_sets(model: nn.Module) -> dict[str, EditSet]:
    """The model's sets by name, in the order they were loaded."""
    return dict(_sets_of(model)[1].known)


def active_edits(model: nn.Module) -> list[str]:
    """Names of the sets that are on."""
    owner, sets = _sets_of(model)
    return list(sets.active) if _ours(owner, sets) else []


def set_edits(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Put these sets on, and all others off.

    Waits for passes that other threads have begun on the edited model. (Where no set is on, nothing says that a pass is in progress;
    a generation of many tokens is many passes.)

    Args:
        model: as it was handed to :func:`load_edits`, or wrapped by PEFT since.
        names: of sets; none: the model as it came.

    Returns:
        The same model object.

    Raises:
        ComebaError: an unknown name, a name twice, or sets that cannot be on together.
        ArchitectureError: the model is edited otherwise as well. In each case it is as it was.
    """
    owner, sets = _sets_of(model)
    names = _checked(sets, names)
    with _bare(owner, sets):
        sets.placed = _put_on(owner, [sets.known[name] for name in names])
        sets.active = names
    return model


def unload_edits(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Forget these sets; those that are on are put off first, and the others stay on.

    Returns:
        The same model object.

    Raises:
        ComebaError: an unknown name, or a name twice; nothing was changed.
        ArchitectureError: the model is edited otherwise as well.
    """
    owner, sets = _sets_of(model)
    names = _checked(sets, names)
    if set(names) & set(active_edits(owner)):
        set_edits(owner, [name for name in sets.active if name not in names])
    for name in names:
        del sets.known[name]
    if not sets.known and PLACE in vars(owner):
        delattr(owner, PLACE)
    return model


@contextmanager
def loading(model: nn.Module, name: str):
    """Inside, the model is bare; what is called with a set adds it, and puts it on alone.

    Args:
        name: that it is going to have.

    Raises:
        ComebaError: that is no name, or a set has it already.
        ArchitectureError: the model is edited otherwise. Whatever is raised, also inside, the model is as it was.
    """
    owner, sets = _sets_of(model)
    if not isinstance(name, str) or not name:
        raise ComebaError(f"the name of a set of edits must be text, got {name!r}")
    if name in sets.known:
        raise ComebaError(f"there is a set of edits {name!r} already; choose another name, or unload_edits(model, {name!r}) first")

    def add(edit_set: EditSet) -> None:
        sets.placed = _put_on(owner, [edit_set])
        sets.active, sets.known[name] = [name], edit_set
        setattr(owner, PLACE, sets)

    with _bare(owner, sets):
        yield add


def _sets_of(model: nn.Module) -> tuple[nn.Module, _Sets]:
    """The module that holds the sets, and the sets; the model itself and none where there are none."""
    owner = next((module for module in model.modules() if PLACE in vars(module)), model)
    return owner, vars(owner).get(PLACE) or _Sets()


def _ours(owner: nn.Module, sets: _Sets) -> bool:
    """Whether some sets are on and nothing else is."""
    return bool(sets.placed) and set(attachments(owner).values()) == set(sets.placed)


@contextmanager
def _bare(owner: nn.Module, sets: _Sets):
    """Inside, no set is on; if an error is raised, those that were are on again."""
    if attachments(owner) and not _ours(owner, sets):
        raise ArchitectureError(
            "the model is edited already, and not by named sets; close its editor, or load those edits with a name as well"
        )
    before = sets.active if sets.placed else []
    with between_passes(owner):
        levels = detach(owner)
        try:
            yield
        except BaseException:
            detach(owner)
            if levels:
                attach_all(owner, levels, sets.known[before[0]].architecture.decoder)
            raise


def _put_on(owner: nn.Module, chosen: list[EditSet]) -> list[Attachment]:
    """Put sets on a bare model; returns what was put there.

    Raises:
        ComebaError: they cannot be on together.
    """
    built = [own.build(owner) for own in chosen]
    for (one, mine), (other, theirs) in combinations(zip(chosen, built, strict=True), 2):
        _combine(one, mine, other, theirs)
    if chosen:
        attach_all(owner, built, chosen[0].architecture.decoder)
    return [attachment for found in built for attachment in found.values()]


def _combine(one: EditSet, mine: dict[str, Attachment], other: EditSet, theirs: dict[str, Attachment]) -> None:
    """Make the attachments of two sets fit beside each other.

    Raises:
        ComebaError: they cannot be.
    """
    both = f"the sets of edits {one.name!r} ({one.method.name}) and {other.name!r} ({other.method.name}) cannot be on together: "
    beside = not any(hasattr(attachment, "base_layer") for attachment in (*mine.values(), *theirs.values()))
    if shared := one.facts & other.facts if beside else one.subjects & other.subjects:
        named = sorted({subject for _, subject in shared} if beside else shared)
        more = f" and {len(named) - 1} more" if named[1:] else ""
        raise ComebaError(f"{both}both edit {named[0]!r}{more}; edit them in one set, or put on one at a time")
    kinds = {type(attachment) for attachment in mine.values() if attachment.alone}
    if any(type(attachment) in kinds for attachment in theirs.values()):
        raise ComebaError(f"{both}a model has room for one set of {other.method.name}; put on one at a time")
    for name in [name for name in mine if name in theirs]:
        if not hasattr(mine[name], "base_layer"):
            try:
                mine[name].join(theirs.pop(name))
            except ComebaError as error:
                raise ComebaError(f"{both}{error}; put on one at a time") from None
        elif type(mine[name]) is type(theirs[name]) and (count := mine[name].meets(theirs[name])):
            raise ComebaError(
                f"{both}at {name} tokens of {count} subject{'s'[: count > 1]} would meet the edits of both; edit them in one set, or "
                "put on one at a time"
            )


def _checked(sets: _Sets, names: str | Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    for n, name in enumerate(names):
        if name not in sets.known:
            known = f"there are {', '.join(map(repr, sets.known))}" if sets.known else "load_edits(model, folder, name=…) makes one"
            raise ComebaError(f"there is no set of edits {name!r}; {known}")
        if name in names[:n]:
            raise ComebaError(f"the set of edits {name!r} is named twice")
    return names
