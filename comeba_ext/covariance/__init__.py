"""Covariance ``C0 = E[k kᵀ]`` of the keys of all edited layers, from one pass over a corpus.

The pass stops at the input of the last edited layer. Its units of work (:mod:`corpus`) are dealt to the processes in turn;
each makes one float32 product a layer, so any number of processes gives the same sums up to the order of float64
additions::

    texts ──► units 0, 1, 2 …  ──► every n-th to each process ──► Σ k kᵀ in float64 ──► all-reduce

Only the lower block triangle of the products is computed and kept until the end, which takes half the time.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from comeba_ext import distributed
from comeba_ext.covariance.corpus import UNIT_TOKENS, Unfinished, Units, corpus_digest
from comeba_ext.covariance.key_sample import Draw, KeySample
from comeba_ext.errors import ConfigError, CovarianceError, StorageError
from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.partial import evaluating, run_until
from comeba_ext.interrupts import uninterrupted
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.storage import check_identity, identity, read_tensors, write_tensors
from comeba_ext.text.encoding import input_device, micro_batches, pad, pad_id

log = logging.getLogger(__name__)

TOKENS_PER_DIMENSION = 10  # arXiv 2506.04226: more changes edits little
BLOCK = 256  # rows of the moment computed at once; of 256, 512, 1024 the fastest at d_in 3072 to 14336


class Covariance:
    """Uncentred second moments of keys (MEMIT, arXiv 2210.07229, equation 15's ``C0``).

    Args:
        moments: layer name to ``Σ k kᵀ`` over ``tokens`` keys, ``(d_in, d_in)`` float64.
        tokens: number of keys summed.
        model: identity of the model they come from (:func:`storage.identity`).
        texts: number of corpus texts consumed, where a larger collection goes on.
        tokens_wanted: when the collection is complete.
        unfinished: what an unfinished one holds so far; its moments have the lower block triangle only.
        sample: keys of single tokens, for scores that compare keys (:mod:`key_sample`); may be empty.
        corpus: digest of the texts consumed (:func:`corpus.corpus_digest`); empty where it is not known.
    """

    def __init__(
        self,
        moments: dict[str, torch.Tensor],
        tokens: int,
        model: dict,
        texts: int,
        tokens_wanted: int,
        unfinished: Unfinished | None = None,
        sample: KeySample | None = None,
        corpus: str = "",
    ):
        self.corpus = corpus
        self.moments, self.tokens, self.model = moments, tokens, model
        self.texts, self.tokens_wanted, self.unfinished = texts, tokens_wanted, unfinished
        self.sample = KeySample() if sample is None else sample

    def __getitem__(self, layer: str) -> torch.Tensor:
        """``C0`` of a layer: the mean of ``k kᵀ``, ``(d_in, d_in)`` float64."""
        return self.moments[layer] / max(self.tokens, 1)

    def of(self, layers: Iterable[str]) -> Covariance:
        """That of these layers alone; itself where it has no others."""
        layers = list(layers)
        if set(self.moments) <= set(layers):
            return self
        sample = (
            KeySample({name: self.sample.keys[name] for name in layers}, self.sample.tokens, self.sample.unit) if len(self.sample) else None
        )
        moments = {name: self.moments[name] for name in layers}
        return Covariance(moments, self.tokens, self.model, self.texts, self.tokens_wanted, self.unfinished, sample, self.corpus)

    def save(self, path: str | Path) -> None:
        """Write atomically, stamped with the model's identity."""
        state = self.unfinished and dataclasses.asdict(self.unfinished) | {"units": sorted(self.unfinished.units)}
        meta = {
            "kind": "covariance",
            "model": self.model,
            "tokens": self.tokens,
            "texts": self.texts,
            "tokens_wanted": self.tokens_wanted,
            "unfinished": state,
            "corpus": self.corpus,
        }
        write_tensors(path, self.moments | self.sample.tensors(), meta)

    @classmethod
    def load(cls, path: str | Path) -> Covariance:
        """Raises :class:`StorageError` for a missing, truncated or foreign file."""
        moments, meta = read_tensors(path)
        if meta.get("kind") != "covariance":
            raise StorageError(f"{path} is not a covariance file")
        state = meta.get("unfinished")
        if state is None and meta["tokens"] < meta["tokens_wanted"]:
            raise StorageError(f"{path} is the unfinished covariance of an earlier version; delete it and collect again")
        state = state and Unfinished(**state | {"units": set(state["units"])})
        sample = KeySample.from_tensors(moments)
        if not len(sample):
            raise StorageError(f"{path} is the covariance of an earlier version, without a sample of keys; collect it again")
        return cls(moments, meta["tokens"], meta["model"], meta["texts"], meta["tokens_wanted"], state, sample, meta.get("corpus", ""))

    def check(self, model: nn.Module, layers: dict[str, int]) -> None:
        """Refuse a covariance that does not fit.

        Args:
            layers: name to ``d_in`` of every edited layer.

        Raises:
            CovarianceError: of another model or other layers, unfinished, or with NaN.
        """
        self._check_origin(model, layers)
        for name in layers:
            if not torch.isfinite(self.moments[name]).all():
                raise CovarianceError(f"the covariance of {name} has NaN or infinite entries; collect it again")
        if self.unfinished:
            raise CovarianceError(f"the covariance is unfinished ({self.tokens} of {self.tokens_wanted} tokens); resume its collection")

    def _check_origin(self, model: nn.Module, layers: dict[str, int]) -> None:
        try:
            check_identity(self.model, model, "the covariance")
        except StorageError as error:
            raise CovarianceError(str(error)) from None
        for name, width in layers.items():
            if name not in self.moments:
                raise CovarianceError(f"the covariance is of layers {', '.join(self.moments)}; {name} is missing")
            if tuple(self.moments[name].shape) != (width, width):
                raise CovarianceError(f"the covariance of {name} is {tuple(self.moments[name].shape)}, expected {(width, width)}")


def covariance_of_blocks(
    model: nn.Module, tokenizer, texts: Iterable[str], blocks: Iterable[int], architecture: Architecture, **options
) -> Covariance:
    """:func:`collect_covariance` of the MLP output projections of some blocks, of a model that need not be edited by them all.

    Raises:
        ConfigError: the model has no such block.
    """
    depth, blocks = architecture.num_blocks(model), sorted(set(blocks))
    if not blocks or blocks[-1] >= depth:
        raise ConfigError(f"layers {blocks}: the model has blocks 0 to {depth - 1}")
    names = [architecture.projection_name(block) for block in blocks]
    layers = {name: model.get_submodule(name) for name in names}
    return collect_covariance(model, tokenizer, texts, layers, model.get_submodule(architecture.decoder), **options)


def collect_covariance(
    model: nn.Module,
    tokenizer,
    texts: Iterable[str],
    layers: dict[str, nn.Module],
    decoder: nn.Module,
    *,
    tokens: int | None = None,
    context: int = 512,
    max_tokens: int = UNIT_TOKENS,
    path: str | Path | None = None,
    save_seconds: float = 120.0,
    progress: bool = True,
) -> Covariance:
    """Second moments of all layers' inputs in one pass, which ends at the input of the last edited layer.

    Where a process group is initialised, its processes share the work and each returns the whole; all must call this with
    the same model and texts. A model may lie on several devices (accelerate's ``device_map``).

    Args:
        texts: the corpus; read as far as needed. Long texts are cut into pieces of ``context`` tokens.
        layers: edited layers by name in the order in which they run, whose input is the key.
        decoder: receives token ids and mask.
        tokens: how many, in the order of the texts; default 10 per input dimension of the widest layer.
        max_tokens: padded tokens per forward pass, at most ``UNIT_TOKENS``.
        path: checkpoint, written every ``save_seconds`` and at the end; an unfinished one of the same model and layers is
            resumed, given the same texts, by any number of processes. Processes other than the first keep theirs beside
            it, in ``<path>.rank1-of-4`` and so on, until the end.

    Raises:
        CovarianceError: the corpus has no text, ``path`` holds another model's, other layers' or other texts' covariance,
            or another process failed.
    """
    if isinstance(texts, str):
        raise CovarianceError("texts must be a list of texts, got a single one; wrap it in [...]")
    if tokens is not None and tokens < 1:
        raise CovarianceError(f"tokens must be at least 1, got {tokens}")
    distributed.require_replicated(model)
    widths = {name: shape_of(layer)[0] for name, layer in layers.items()}
    wanted = tokens if tokens is not None else TOKENS_PER_DIMENSION * max(widths.values())
    rank, world = distributed.rank(), distributed.world_size()
    path = Path(path) if path is not None else None
    found: Covariance | None = None

    def begin() -> tuple[bool, Unfinished]:
        nonlocal found
        if path is not None and rank == 0:
            found = _stored(path, model, widths, wanted)
        complete = found is not None and found.tokens >= wanted and not found.unfinished
        if complete and found.corpus and corpus_digest(texts, found.texts) != found.corpus:
            raise CovarianceError(f"{path} is the covariance of other texts; choose another file")
        return complete, _where(found)

    complete, where = distributed.together(begin)[0]
    own = found  # the first process goes on with the sums that there are
    if own is None:
        moments = {name: torch.zeros(d, d, dtype=torch.float64) for name, d in widths.items()}
        own = Covariance(moments, 0, identity(model, list(layers)), 0, wanted)
    if not complete:
        own.tokens_wanted = wanted
        own.unfinished = dataclasses.replace(where, units=set(where.units) if rank == 0 else set())
        units = Units(tokenizer, texts, where, wanted, min(context, context_length(model) or context))
        device = input_device(model)
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves what it is given
        checkpoint = path if rank == 0 else path and _part(path, rank, world)
        draw = Draw(wanted)

        def work() -> tuple[int, str]:
            saved, todo, whole = time.monotonic(), 0, True

            def save() -> None:
                # Not before the texts have turned out to be those of the checkpoint.
                if checkpoint and whole and units.read >= where.read:
                    own.unfinished.read, own.unfinished.digest = units.read, units.digest
                    own.sample = draw.taken(own.sample)
                    own.save(checkpoint)

            with (
                tqdm(total=wanted, initial=where.first_token, unit="token", desc="covariance", disable=not progress or rank > 0) as bar,
                evaluating(model),
            ):
                for number, rows in units:
                    if number not in where.units:
                        todo += 1
                        if (todo - 1) % world == rank:
                            try:
                                with uninterrupted():
                                    whole = False
                                    _add(own, draw, number, rows, layers, decoder, device, pad_id(tokenizer), max_tokens)
                                    own.unfinished.units.add(number)
                                    whole = True
                            except KeyboardInterrupt:  # between two units: nothing of them is lost
                                save()
                                raise
                    bar.update(sum(map(len, rows)))
                    if time.monotonic() - saved >= save_seconds:
                        save()
                        saved = time.monotonic()
            return units.read, units.digest

        if len(set(distributed.together(work))) > 1:
            raise CovarianceError("the processes were given different texts; all must read the same in the same order")
        own.unfinished, own.texts, own.sample = None, units.texts, draw.taken(own.sample)
        own.corpus = str(units.corpus)
    counts = distributed.together(lambda: (own.tokens, own.texts))
    own.tokens, own.texts = sum(tokens for tokens, _ in counts), counts[0][1]
    if own.tokens == 0:
        raise CovarianceError("the corpus holds no text to collect a covariance from")
    if world > 1:
        own.sample = KeySample().extended(distributed.together(lambda: own.sample))
    for name in own.moments:
        own.moments[name] = _mirrored(distributed.sum_over_processes(own.moments[name]))
    if own.tokens < wanted:
        log.warning("covariance: the corpus ended after %d of %d tokens", own.tokens, wanted)
        own.tokens_wanted = own.tokens

    def end() -> None:
        if path is not None and rank == 0 and not complete:
            own.save(path)

    distributed.together(end)
    if path is not None and rank > 0:
        _part(path, rank, world).unlink(missing_ok=True)
    return own


def _where(found: Covariance | None) -> Unfinished:
    """What there is; a finished covariance of fewer tokens than wanted is extended with the texts after its own."""
    if found is None:
        return Unfinished()
    return found.unfinished or Unfinished(found.texts, found.tokens, corpus=found.corpus)


def _add(
    own: Covariance, draw: Draw, number: int, rows: list, layers: dict, decoder: nn.Module, device, pad_token: int, max_tokens: int
) -> None:
    """Add a unit's keys to the moments of every layer, and some to the sample."""
    places = draw.places(rows, number)
    for group in micro_batches([len(row) for row in rows], max_tokens):
        batch, drawn = [rows[n] for n in group], [places[n] for n in group]
        ids, mask = pad(batch, pad_token, device=device)
        width = ids.shape[1]
        real = None  # places of real tokens, known here so that a GPU need not be asked
        if any(len(row) < width for row in batch):
            real = torch.cat([torch.arange(n * width, n * width + len(row)) for n, row in enumerate(batch)])
        index = torch.tensor([n * width + p for n, own_places in enumerate(drawn) for p in own_places], dtype=torch.long)
        taps = {layer: _accumulator(own.moments, name, real, draw, index) for name, layer in layers.items()}
        run_until(decoder, list(layers.values())[-1], {"input_ids": ids, "attention_mask": mask}, taps, before=True)
        draw.add(batch, drawn, number)
    own.tokens += sum(map(len, rows))


def _accumulator(moments: dict[str, torch.Tensor], name: str, real: torch.Tensor | None, draw: Draw, index: torch.Tensor):
    """A tap that adds ``Σ k kᵀ`` of the real tokens, lower block triangle, in float32 products and float64 sums, and draws
    the keys at ``index``."""

    def add(x: torch.Tensor) -> None:
        keys = x.reshape(-1, x.shape[-1])
        draw.tap(name, keys, index)
        if real is not None:
            keys = keys[real.to(x.device)]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        moment = moments[name] = moments[name].to(x.device)  # where the layer runs
        for start in range(0, len(moment), BLOCK):
            end = start + BLOCK
            moment[start:end, :end] += keys[:, start:end].mT @ keys[:, :end]

    return add


def _mirrored(moment: torch.Tensor) -> torch.Tensor:
    """The whole of a symmetric matrix of which the lower triangle is there, in place."""
    for start in range(0, len(moment), BLOCK):
        end = start + BLOCK
        corner = moment[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        moment[start:end, end:] = moment[end:, start:end].mT
    return moment


# -- checkpoints of several processes -------------------------------------------------------------------------------


def _part(path: Path, rank: int, world: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank}-of-{world}")


def _parts(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(path.name) + r"\.rank\d+-of-\d+")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def _stored(path: Path, model: nn.Module, widths: dict[str, int], wanted: int) -> Covariance | None:
    """What is there of a collection, the parts of all its processes merged into ``path``; ``None`` if there is nothing.

    A kill in the middle is harmless: ``path`` counts the units of the parts, which are then known as old, as are all beside a
    finished one.
    """
    if not path.parent.is_dir():
        raise CovarianceError(f"cannot write {path}: the folder {path.parent} does not exist")
    whole = _checked(path, model, widths, wanted) if path.exists() else None
    parts = _parts(path)
    for file in parts if whole is None or whole.unfinished else ():
        part = _checked(file, model, widths, wanted)
        if whole is None:
            whole = part
        elif not part.unfinished.units <= whole.unfinished.units:
            _merge(whole, part, file)
    if parts and whole.unfinished:
        whole.save(path)
    for file in parts:
        file.unlink()
    return whole


def _checked(path: Path, model: nn.Module, widths: dict[str, int], wanted: int) -> Covariance:
    found = Covariance.load(path)
    found._check_origin(model, widths)
    if set(found.moments) != set(widths):
        raise CovarianceError(f"{path} is the covariance of layers {', '.join(found.moments)}; choose another file")
    if found.unfinished and found.tokens_wanted != wanted:
        raise CovarianceError(
            f"{path} is the unfinished covariance of {found.tokens_wanted} tokens; finish it with as many, or choose another file"
        )
    return found


def _merge(whole: Covariance, part: Covariance, file: Path) -> None:
    a, b = whole.unfinished, part.unfinished
    if a.units & b.units or (a.first_text, a.first_token) != (b.first_text, b.first_token):
        raise CovarianceError(f"{file} does not belong to the same collection as the files beside it; delete it")
    for name in whole.moments:
        whole.moments[name] += part.moments[name]
    whole.tokens += part.tokens
    whole.sample = whole.sample.extended([part.sample])
    a.units |= b.units
    a.read, a.digest = max((a.read, a.digest), (b.read, b.digest))
