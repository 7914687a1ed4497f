"""What a method puts into a model: attachments around its layers (or beside them), which can be switched off and taken out again.

An :class:`Attachment` owns buffers, never parameters, and calls the layer that it wraps as a module. So the base weights stay as
they came, and with every attachment off the model is the unedited one, bit for bit.
"""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.sequence_context import SequenceContext
from comeba_ext.scores.base import keep_precise, set_buffer, take_over_buffers

log = logging.getLogger(__name__)


class Attachment(nn.Module):
    """A module of a method's own in somebody's model.

    Class attributes:
        modes: names of what it may do; ``"off"``, the base output bit for bit, is one.
        appended: names of buffers whose rows, once written, stay as they are: a twin of the model shares them.
        precise: names of buffers that keep their dtype when the model's changes.
        grows: whether its own buffers are the longer the more is edited.
        alone: whether a model has room for one of its kind.
        keeps: what it leaves for later tokens (:meth:`leave`), as an error calls it.

    Attributes:
        base_layer: the layer it wraps, which may be another attachment (:func:`attach_all`); absent where it stands beside the
            model's own.
        context: what the pass is about, the same object for all attachments of a model; ``None`` outside of one.
        name: in the model.
        mode: one of ``modes``.
    """

    modes: ClassVar[tuple[str, ...]] = ("off", "on")
    appended: ClassVar[tuple[str, ...]] = ()
    precise: ClassVar[tuple[str, ...]] = ()
    grows: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    keeps: ClassVar[str] = "what a layer's edits remember of earlier tokens"

    def __init__(self, base: nn.Module | None = None, mode: str = "on"):
        super().__init__()
        if isinstance(base, Attachment):
            raise ArchitectureError("the layer is hooked already; edit through the editor that holds it")
        if base is not None:
            self.base_layer = base
        self._mode = mode
        self.context: SequenceContext | None = None
        self.name = ""

    @property
    def mode(self) -> str:
        """Inside :func:`disabled`, for the thread that is, ``"off"``."""
        return "off" if self.context is not None and self.context.here.off else self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in self.modes:
            raise ComebaError(f"unknown mode {mode!r}; choose one of {', '.join(self.modes)}")
        self._mode = mode

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def reads_sequence(self) -> bool:
        """Whether a token's output depends on other tokens, beyond what the base layer does."""
        return False

    @property
    def reads_names(self) -> bool:
        """Whether it asks for the text at hand (:meth:`hashes`)."""
        return False

    def hashes(self, x: torch.Tensor) -> torch.Tensor | None:
        """Of the last tokens up to every one, ``(batch, seq, LONGEST)`` for ``x (batch, seq, …)`` (:func:`ops.mentions.suffix_hashes`);
        ``None`` where the token ids are not known, as outside of a model."""
        found = self.context.here.hashes if self.context is not None else None
        return None if found is None or found.shape[:2] != x.shape[:2] else found.to(x.device)

    def past(self) -> torch.Tensor | None:
        """What the sequence's earlier tokens left behind, in cached decoding."""
        return self.context.here.statistics.get(self.name) if self.context is not None else None

    def leave(self, left: torch.Tensor | None, counts: bool = False) -> None:
        """What later tokens of the sequences will find in :meth:`past`: ``(batch, …)``, carried with the cache.

        Args:
            counts: of tokens (:meth:`counts`) up to where something was seen, ``NEVER`` where it was not: a cache that is cropped
                (assisted decoding) forgets what lies beyond its new end. With anything else in it, it refuses.
        """
        if self.context is not None and left is not None:
            self.context.here.updated[self.name] = left
            if not counts:
                self.context.here.fixed[self.name] = self.keeps

    def counts(self, x: torch.Tensor) -> torch.Tensor:
        """How many tokens a sequence has up to every one of this pass, cached ones among them: ``(seq,)`` for ``x (batch, seq, …)``."""
        before = self.context.here.before if self.context is not None else 0
        before = before.to(x.device) if isinstance(before, torch.Tensor) else before
        return before + torch.arange(1, x.shape[1] + 1, device=x.device)

    def refuse_recomputing(self, what: str, instead: str = "") -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when nobody knows the mask and the token ids.

        Args:
            what: asks for them; instead: what else could be done, behind a comma.

        Raises:
            ComebaError: it does so now.
        """
        if torch.compiler.is_compiling() or self.context is None or self.context.here.shape is not None:
            return
        if torch._C._current_graph_task_id() != -1:
            raise ComebaError(f"{what} cannot be computed again in gradient checkpointing; switch that off{instead}")

    def as_sequences(self, x: torch.Tensor, mask: torch.Tensor | None, whole: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` as ``(batch, seq, d)`` and its mask; some families (OPT) flatten tokens before the MLP.

        Args:
            mask: ``(batch, seq)`` of real tokens, where it is known here.
            whole: look for it in the model's own; only who looks at more than the token needs it.
        """
        here = self.context.here if self.context is not None else None
        if mask is None and here is not None and whole:
            mask = here.mask
        if mask is not None:
            mask = mask.to(x.device)
            return x.reshape(*mask.shape, x.shape[-1]), mask
        if x.dim() == 3:
            return x, None
        if here is not None and here.shape is not None:
            return x.reshape(*here.shape, x.shape[-1]), None
        length = x.shape[-2] if x.dim() > 1 else 1
        return x.reshape(-1, length, x.shape[-1]), None

    def own_buffers(self) -> dict[str, torch.Tensor]:
        """What the edits are kept in, by names: every buffer but those of the base layer."""
        return {name: buffer for name, buffer in self.named_buffers() if not name.startswith("base_layer.")}

    @torch.no_grad()
    def take_over(self, other: Attachment) -> None:
        """What another one of this kind holds; buffers stay where they are as long as they fit."""
        take_over_buffers(self, other, "base_layer.")

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a saved folder needs of it, by names, for :meth:`restore`."""
        return self.own_buffers()

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises :class:`ValueError` for what does not fit, ``KeyError`` for what is missing. Buffers may have grown: what may differ
        is a buffer's first dimension."""
        for name, own in self.own_buffers().items():
            tensor = tensors[name]
            if tensor.dim() != own.dim() or tensor.shape[1:] != own.shape[1:] or tensor.is_floating_point() != own.is_floating_point():
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {own.dtype} (any, {', '.join(map(str, own.shape[1:]))})"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has NaN or infinite entries")
            set_buffer(self, name, tensor.to(own).clone())

    def weight_change(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What it would add to the base layer's weight if every token met its edits: ``(d_out, d_in)``, or two factors of that,
        ``(d_out, n)`` and ``(n, d_in)``.

        Raises:
            ComebaError: that is no change of a weight.
        """
        raise ComebaError("these edits are not in the weights: what they do with an input is decided while the model runs")

    def meets(self, other: Attachment) -> int:
        """How many of its keys are also another one's of the same layer, so that both would change the same token; 0 where that is
        not known."""
        return 0

    def join(self, other: Attachment) -> None:
        """Take in what another one holds that would stand in the same place beside the model's layers.

        Raises:
            ComebaError: the two cannot be one.
        """
        raise ComebaError(f"{type(self).__name__} and {type(other).__name__} would stand in the same place")

    def _apply(self, fn, recurse: bool = True):
        """``model.half()`` and the like move the precise buffers but leave them as precise as they are."""
        return keep_precise(self, self.precise, lambda: super(Attachment, self)._apply(fn, recurse))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        """Buffers that grow with the edits take the length they are loaded with."""
        for name, own in self._buffers.items() if self.grows else ():
            given = state_dict.get(prefix + name)
            if given is not None and given.dim() == own.dim() > 0 and len(given) != len(own) and given.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_zeros(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def replaces(self) -> dict[str, type[Replaced]]:
        """Methods of the model by name, and what takes their place while it is in."""
        return {"save_pretrained": _SaveBase}

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> Attachment:
        """What PEFT asks for when it takes its adapters out (``merge_and_unload``): out of the base layer, the edits stay."""
        base = self.base_layer
        if isinstance(base, Attachment):
            base.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        elif hasattr(base, "get_base_layer"):
            if merge:
                base.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer = base.get_base_layer()
        return self


def attach(model: nn.Module, found: dict[str, Attachment], decoder: str) -> dict[str, Attachment]:
    """Put attachments into a model, all listening to one :class:`SequenceContext`.

    Args:
        model: changed in place; its weights are not.
        found: name of the layer that each wraps, or a new name at the model's top, to the attachment.
        decoder: name of the module that receives the attention mask.

    Raises:
        ArchitectureError: the model has attachments already; then it is as before.
    """
    attach_all(model, [found], decoder)
    return found


def attach_all(model: nn.Module, sets: list[dict[str, Attachment]], decoder: str) -> None:
    """Put several sets of attachments into a model: where they wrap the same layer, the later one wraps the earlier one.

    Args:
        sets: as ``found`` in :func:`attach`. No two have the same name beside the model's layers.

    Raises:
        ArchitectureError: the model has attachments already; then it is as before.
    """
    refuse_edited(model)
    stacks: dict[str, list[Attachment]] = {}
    for found in sets:
        for name, attachment in found.items():
            stacks.setdefault(name, []).append(attachment)
    every = [attachment for stack in stacks.values() for attachment in stack]
    context = SequenceContext(model.get_submodule(decoder), any(own.reads_names for own in every))
    for name, stack in stacks.items():
        for depth, attachment in enumerate(reversed(stack)):
            attachment.context, attachment.name = context, name + depth * ".base_layer"
        for inner, outer in pairwise(stack):
            outer.base_layer = inner
        if hasattr(stack[0], "base_layer"):
            for attachment in stack:
                attachment.train(stack[0].base_layer.training)
            model.set_submodule(name, stack[-1])
        else:
            model.add_module(name, stack[-1])
    for name, kind in {name: kind for own in every for name, kind in own.replaces().items()}.items():
        if hasattr(model, name):
            setattr(model, name, kind(model))


def refuse_edited(model: nn.Module) -> None:
    """Raises :class:`ArchitectureError` for a model with attachments."""
    if attachments(model):
        raise ArchitectureError("the model is edited already; edit through the editor that holds it, or close that one first")


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """Every attachment of a model by name, in the order of the blocks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Attachment)}


def stacks_of(model: nn.Module) -> dict[str, list[Attachment]]:
    """The attachments at every layer, from the inside out, by the layer's name (or their own, where they stand beside)."""
    found: dict[str, list[Attachment]] = {}
    inside: set[Attachment] = set()
    for name, attachment in attachments(model).items():  # an outer one comes before those that it wraps
        if attachment not in inside:
            stack = [attachment]
            while isinstance(getattr(stack[-1], "base_layer", None), Attachment):
                stack.append(stack[-1].base_layer)
            inside |= set(stack)
            found[name] = stack[::-1]
    return found


def detach(model: nn.Module) -> list[dict[str, Attachment]]:
    """Put every base layer back and stop listening: the model as it was before :func:`attach`.

    Returns:
        What was taken out, in the form that :func:`attach_all` puts back.
    """
    contexts, sets = set(), []
    for name, stack in stacks_of(model).items():
        for depth, attachment in enumerate(stack):
            contexts.add(attachment.context)
            if depth == len(sets):
                sets.append({})
            sets[depth][name] = attachment
        if hasattr(stack[0], "base_layer"):
            model.set_submodule(name, stack[0].base_layer)
        else:
            owner, _, last = name.rpartition(".")
            delattr(model.get_submodule(owner), last)
    for context in contexts - {None}:
        context.detach()
    for name in [name for name, own in vars(model).items() if isinstance(own, Replaced)]:
        delattr(model, name)
    return sets


@contextmanager
def disabled(model: nn.Module):
    """Inside, in this thread, every attachment is off: the original model, bit for bit. Other threads go on as they were."""
    found = attachments(model).values()
    alone = {attachment: attachment.mode for attachment in found if attachment.context is None}  # put into the model by hand
    contexts = {attachment.context for attachment in found} - {None}
    try:
        for context in contexts:
            context.here.off += 1
        for attachment in alone:
            attachment.mode = "off"
        yield model
    finally:
        for context in contexts:
            context.here.off -= 1
        for attachment, mode in alone.items():
            attachment.mode = mode


@contextmanager
def between_passes(model: nn.Module):
    """Inside, no other thread is in a forward pass of the model (compiled ones do not say so)."""
    with ExitStack() as stack:
        for context in {attachment.context for attachment in attachments(model).values()} - {None}:
            stack.enter_context(context.passes.between())
        yield


class Replaced:
    """Takes the place of a method of an edited model, until :func:`detach`."""

    def __init__(self, model: nn.Module):
        self.model = model  # a copy of the model has a copy of this, with the copy in it


class _SaveBase(Replaced):
    """``model.save_pretrained`` of an edited model: the base model as it came.

    Under the attachments' names no other program would find the base weights, and would start those layers at random.
    """

    def __call__(self, *args, state_dict: dict | None = None, **kwargs):
        log.warning("save_pretrained writes the base model without its edits; Editor.save_pretrained saves the edits")
        save = functools.partial(type(self.model).save_pretrained, self.model, *args, **kwargs)
        if type(self.model).__module__.startswith("peft"):
            # It looks for its adapters among the modules, so for the time of the save there are no attachments.
            found = {name: stack for name, stack in stacks_of(self.model).items() if hasattr(stack[0], "base_layer")}
            try:
                for name, stack in found.items():
                    self.model.set_submodule(name, stack[0].base_layer)
                return save()
            finally:
                for name, stack in found.items():
                    self.model.set_submodule(name, stack[-1])
        state = self.model.state_dict() if state_dict is None else state_dict
        return save(state_dict=base_state(self.model, state))


def base_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An edited model's state dict with the base weights under the base model's names, and nothing of the edits."""
    stacks, found = stacks_of(model), {}
    for key, value in state.items():
        name = next((name for name in stacks if key.startswith(f"{name}.")), None)
        if name is None:
            found[key] = value
            continue
        inner, base = key[len(name) + 1 :], "base_layer." * len(stacks[name])
        if inner.startswith(base):
            found[f"{name}.{inner[len(base) :]}"] = value
    return found
