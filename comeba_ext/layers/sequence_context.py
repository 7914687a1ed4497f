"""What a hooked layer must know of the forward pass around it: which tokens are real, and what came before them.

A linear layer sees only its input. The attention mask is known one level up, and in cached decoding the earlier tokens
of a sequence are gone. One :class:`SequenceContext` a model listens at the decoder (forward hooks), reads the mask and the token
ids there, and keeps the last of these, and each layer's running z-score statistics, *on the generation's own cache*, so that they
follow it through beam reordering, batch expansion and copies.

Any number of threads may run the model: what belongs to a pass is kept for its thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.errors import ComebaError
from comeba_ext.layers.passes import Passes
from comeba_ext.ops.mentions import LONGEST, UNKNOWN, suffix_hashes, without

log = logging.getLogger(__name__)

IDS = "token ids"  # among a cache's statistics, where no layer has that name
NEVER = torch.iinfo(torch.int64).max  # among counts of tokens: there was nothing yet
KEPT = 16 * LONGEST  # tokens: a cache that is cropped by as many as a draft is long (240 at most) still knows the last ones


class _Here(threading.local):
    """What a thread's pass in progress is about; empty between passes.

    Attributes:
        shape: ``(batch, seq)`` of the pass, or ``None`` when no pass is in progress.
        mask: ``(batch, seq)`` bool of real tokens, or ``None`` when every token is real or no pass is in progress.
        before: how many tokens the cache holds that this pass goes on from.
        hashes: ``(batch, seq, LONGEST)`` of the last tokens up to every one (:func:`ops.mentions.suffix_hashes`), or ``None`` when
            no attachment asks for them, the ids are not known, or no pass is in progress.
        embedded: ids that were embedded since the last pass.
        statistics: layer name to ``(batch, 3)`` statistics of the tokens before this pass (:func:`ops.zscore`).
        updated: the same after this pass, filled in by the layers.
        fixed: of those that a cropped cache would make wrong, what they are.
        told: what attachments tell those behind them in the same pass.
        off: whether this thread wants the unedited model (:func:`attachment.disabled`), so many times over.
        asked: whether its prompts are rewritten already (:func:`prompts.plain_generate`), likewise.
        muted: ``(prompts, any)`` hashes of names that a text of this thread is as if it had not (:meth:`SequenceContext.muting`), and
            of those that it has all the same, both filled up with 0; ``None``: none.
    """

    shape: tuple[int, int] | None = None
    mask: torch.Tensor | None = None
    hashes: torch.Tensor | None = None
    embedded: torch.Tensor | None = None
    before: int | torch.Tensor = 0
    off = 0
    asked = 0
    muted: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No pass is in progress."""
        self.shape = self.mask = self.hashes = self.embedded = None
        self.before = 0
        self.statistics: dict[str, torch.Tensor] = {}
        self.updated: dict[str, torch.Tensor] = {}
        self.fixed: dict[str, str] = {}
        self.told: dict[str, torch.Tensor | None] = {}


class SequenceContext:
    """Listens at a model's decoder.

    Args:
        decoder: receives token ids and mask.
        names: whether somebody asks for ``here.hashes``.

    Attributes:
        here: the calling thread's :class:`_Here`.
        passes: which threads are in a pass.
        decoder: that it listens at.
    """

    def __init__(self, decoder: nn.Module, names: bool = False):
        self.here, self.passes, self.names, self.decoder = _Here(), Passes(), names, decoder
        self._warned = False
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        embedding = decoder.get_input_embeddings() if names and hasattr(decoder, "get_input_embeddings") else None
        if embedding is not None:  # models with a vision part hand their decoder embeddings
            self._handles.append(embedding.register_forward_pre_hook(self._embed))

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "here"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.here = _Here()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.compiler.is_compiling():
            self.passes.begin(sys._getframe(1))  # of torch, which calls the decoder in it
        here = self.here
        given = {**dict(zip(self._names[: len(args)], args)), **kwargs}
        cache = cache_of(given)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:  # the model's own error says it better
            return
        past = cache.get_seq_length() if cache is not None else 0
        here.shape = (tokens.shape[0], tokens.shape[1])
        here.mask = _real_tokens(given.get("attention_mask"), past, tokens.shape[1])
        here.statistics = getattr(cache, "comeba_statistics", {})
        if (known := getattr(cache, "comeba_ids", None)) is not None:  # of what rows share
            here.statistics = {IDS: known, **here.statistics}
        here.updated, here.fixed = {}, {}
        here.before = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts on in place
        here.hashes = None
        if self.names:
            ids = given.get("input_ids")
            if ids is None and here.embedded is not None and here.embedded.shape == tokens.shape[:2]:
                ids = here.embedded
            self._read(here, ids)

    def _embed(self, module: nn.Module, args: tuple) -> None:
        self.here.embedded = args[0] if args else None

    @contextlib.contextmanager
    def reading(self, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None):
        """Inside, between passes, a layer that is called by hand knows the text its inputs are of: ``ids`` and ``mask`` of real tokens,
        ``(batch, seq)``, and the ids ``before`` them, ``(batch, any)``, −1 where there are none."""
        here = self.here
        here.shape, here.mask, here.statistics = tuple(ids.shape), mask, {} if before is None else {IDS: before}
        if self.names:
            self._read(here, ids)
        try:
            yield
        finally:
            here.clear()

    @contextlib.contextmanager
    def muting(self, names: list[list[int]], kept: list[list[int]] | None = None):
        """Inside, in this thread, a token at which one of a text's own of these names ends says nothing to who asks for ``here.hashes``;
        what was muted around it is not.

        Args:
            names: of every prompt, :func:`~comeba_ext.ops.mentions.name_hash` of them. A pass may be of several texts a prompt, side by
                side (beams).
            kept: of every prompt, names at whose ends nothing shorter is muted.
        """
        before = self.here.muted
        self.here.muted = (_filled_up(names), _filled_up(kept or [[] for _ in names])) if any(names) else None
        try:
            yield
        finally:
            self.here.muted = before

    def _read(self, here: _Here, ids: torch.Tensor | None) -> None:
        """The pass's token ids; of embeddings from elsewhere none are known."""
        batch, length = here.shape
        before = here.statistics.get(IDS)
        if before is None or len(before) != batch:
            before = None
        if ids is None:
            if not self._warned and not torch.compiler.is_compiling():
                self._warned = True
                log.warning("the model was given embeddings whose token ids are not known, so a text's names are not: only tokens that "
                            "are all but the same as an edited one take its edit (unnamed_floor)")  # fmt: skip
            device = before.device if before is not None else None
            ids = torch.full((batch, length), UNKNOWN, device=device)
        else:
            if here.mask is not None:
                ids = ids.masked_fill(~here.mask.to(ids.device), UNKNOWN)
            here.hashes = suffix_hashes(ids, before)
            if here.muted is not None and batch % len(here.muted[0]) == 0:
                if here.muted[0].device != ids.device:  # once a generation: a copy from the host would make a GPU wait
                    here.muted = tuple(own.to(ids.device) for own in here.muted)
                here.hashes = without(here.hashes, *(own.repeat_interleave(batch // len(own), 0) for own in here.muted))
        if before is None:
            before = ids.new_full((batch, KEPT), UNKNOWN)
        here.updated[IDS] = torch.cat([before.to(ids.device), ids], 1)[:, -KEPT:]

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        here = self.here
        cache = cache_of({**dict(zip(self._names, args, strict=False)), **kwargs})
        if cache is None:
            # Outputs have one name; where it is the later one, to ask for the earlier is a warning of Transformers'.
            cache = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
        if cache is not None and output is not None and here.updated:  # None: the pass failed
            # A cache that begins inside a compiled graph, where no class can be made, is not followed when its beams are reordered.
            if not hasattr(cache, "comeba_statistics") and not torch.compiler.is_compiling():
                cache.__class__ = _with_statistics(type(cache))
            cache.comeba_statistics = {**getattr(cache, "comeba_statistics", {}), **here.updated}
            cache.comeba_fixed = {**getattr(cache, "comeba_fixed", {}), **here.fixed}
        here.clear()
        if not torch.compiler.is_compiling():
            self.passes.end()


def _filled_up(names: list[list[int]]) -> torch.Tensor:
    """``(prompts, the most)`` int64, with 0 behind the fewer ones."""
    width = max(map(len, names), default=0)
    return torch.tensor([[*own, *[0] * (width - len(own))] for own in names], dtype=torch.int64)


CACHE_NAMES = ("past_key_values", "cache")  # the latter since Transformers 5.24


def cache_of(given: dict):
    """The cache among what a model is called with, by names; ``None``: none."""
    for name in CACHE_NAMES:  # no generator: torch.compile of older versions does not follow one
        if given.get(name) is not None:
            return given[name]
    return None


def _real_tokens(attention_mask, past, length: int) -> torch.Tensor | None:
    """The ``(batch, length)`` bool mask of the tokens that this pass adds after ``past`` cached ones."""
    if isinstance(attention_mask, dict):  # one prepared mask per kind of attention
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise ComebaError(
            f"the model was given a prepared mask, a {type(attention_mask).__name__}, that does not tell which tokens are padding; "
            "choose attn_implementation='sdpa' or 'eager', or a dynamic cache"
        )
    if attention_mask.dim() == 4:  # prepared (batch, 1, query, key): a real token is seen by some query
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        attention_mask = seen[:, 0].any(1)
    if attention_mask.shape[1] == length:
        return attention_mask.bool()
    start = min(past, attention_mask.shape[1] - length)  # a prepared one of sliding windows ends where a window does
    return attention_mask[:, start : start + length].bool()


@functools.cache
def _with_statistics(cache_class: type) -> type:
    """``cache_class`` whose batch operations carry the attribute ``comeba_statistics`` along."""

    class Tracked(cache_class):
        def _carry(self, move) -> None:
            self.comeba_statistics = {name: move(s) for name, s in self.comeba_statistics.items()}

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self._carry(lambda s: s.index_select(0, beam_idx.to(s.device)))

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self._carry(lambda s: s.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self._carry(lambda s: s[indices.to(s.device)])

        def crop(self, *args, **kwargs):
            for name in self.comeba_statistics:
                if name in self.comeba_fixed:
                    raise ComebaError(f"{self.comeba_fixed[name]} cannot go back with a cache that is cropped (assisted decoding)")
            before = int(self.get_seq_length())  # a static cache's is a tensor that changes in place
            super().crop(*args, **kwargs)
            now = int(self.get_seq_length())
            gone = min(before - now, KEPT)
            self.comeba_statistics = {
                name: F.pad(s[:, : KEPT - gone], (gone, 0), value=UNKNOWN) if name == IDS else s.masked_fill(s > now, NEVER)
                for name, s in self.comeba_statistics.items()
            }

        def reset(self):
            super().reset()
            self.comeba_statistics, self.comeba_fixed = {}, {}

        def __reduce__(self):
            return _restore_cache, (cache_class, self.__dict__)

    Tracked.__name__, Tracked.__qualname__ = cache_class.__name__, cache_class.__qualname__
    return Tracked


def _restore_cache(cache_class: type, state: dict):
    """A copied or unpickled cache: the class made above has no importable name."""
    tracked = _with_statistics(cache_class)
    cache = tracked.__new__(tracked)
    cache.__dict__.update(state)
    return cache
