"""Covariance ``C0 = E[k kᵀ]`` of the keys of all edited layers, from one pass over a corpus."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from comeba_ext.architectures import context_length
from comeba_ext.editing.encoding import micro_batches, pad, pad_id
from comeba_ext.errors import CovarianceError, StorageError
from comeba_ext.partial_forward import evaluating, run_until
from comeba_ext.storage import check_identity, identity, read_tensors, write_tensors

log = logging.getLogger(__name__)

TOKENS_PER_DIMENSION = 10  # arXiv 2506.04226: more changes edits little


class Covariance:
    """Uncentred second moments of keys (MEMIT, arXiv 2210.07229, equation 15's ``C0``).

    Args:
        moments: layer name to ``Σ k kᵀ`` over ``tokens`` keys, ``(d_in, d_in)`` float64.
        tokens: number of keys summed.
        model: identity of the model they come from (:func:`storage.identity`).
        texts: number of corpus texts consumed, where a resumed collection goes on.
        tokens_wanted: when the collection is complete.
    """

    def __init__(self, moments: dict[str, torch.Tensor], tokens: int, model: dict, texts: int, tokens_wanted: int):
        self.moments, self.tokens, self.model = moments, tokens, model
        self.texts, self.tokens_wanted = texts, tokens_wanted

    def __getitem__(self, layer: str) -> torch.Tensor:
        """``C0`` of a layer: the mean of ``k kᵀ``, ``(d_in, d_in)`` float64."""
        return self.moments[layer] / max(self.tokens, 1)

    def save(self, path: str | Path) -> None:
        """Write atomically, stamped with the model's identity."""
        meta = {"kind": "covariance", "model": self.model, "tokens": self.tokens, "texts": self.texts,
                "tokens_wanted": self.tokens_wanted}  # fmt: skip
        write_tensors(path, self.moments, meta)

    @classmethod
    def load(cls, path: str | Path) -> Covariance:
        """Raises :class:`StorageError` for a missing, truncated or foreign file."""
        moments, meta = read_tensors(path)
        if meta.get("kind") != "covariance":
            raise StorageError(f"{path} is not a covariance file")
        return cls(moments, meta["tokens"], meta["model"], meta["texts"], meta["tokens_wanted"])

    def check(self, model: nn.Module, layers: dict[str, int]) -> None:
        """Refuse a covariance that does not fit.

        Args:
            layers: name to ``d_in`` of every edited layer.

        Raises:
            CovarianceError: of another model or other layers, unfinished, or with NaN.
        """
        try:
            check_identity(self.model, model, "the covariance")
        except StorageError as error:
            raise CovarianceError(str(error)) from None
        for name, width in layers.items():
            if name not in self.moments:
                raise CovarianceError(f"the covariance is of layers {', '.join(self.moments)}; {name} is missing")
            if tuple(self.moments[name].shape) != (width, width):
                raise CovarianceError(
                    f"the covariance of {name} is {tuple(self.moments[name].shape)}, expected {(width, width)}"
                )
            if not torch.isfinite(self.moments[name]).all():
                raise CovarianceError(f"the covariance of {name} has NaN or infinite entries; collect it again")
        if self.tokens < self.tokens_wanted:
            raise CovarianceError(
                f"the covariance is unfinished ({self.tokens} of {self.tokens_wanted} tokens); resume its collection"
            )


def collect_covariance(
    model: nn.Module,
    tokenizer,
    texts: Iterable[str],
    layers: dict[str, nn.Module],
    decoder: nn.Module,
    last_block: nn.Module,
    *,
    tokens: int | None = None,
    context: int = 512,
    max_tokens: int = 4096,
    path: str | Path | None = None,
    save_every: int = 50,
    progress: bool = True,
) -> Covariance:
    """Second moments of all layers' inputs in one pass, which ends after the last edited block.

    Args:
        texts: the corpus; read as far as needed. Long texts are cut into pieces of ``context`` tokens.
        layers: edited layers by name, whose input is the key.
        decoder: receives token ids and mask.
        last_block: block of the last edited layer.
        tokens: how many; default 10 per input dimension of the widest layer.
        max_tokens: padded tokens per forward pass.
        path: checkpoint, written every ``save_every`` batches and at the end; an unfinished one of the same model and
            layers is resumed, given the same texts.

    Raises:
        CovarianceError: the corpus has no text, or ``path`` holds another model's or other layers' covariance.
    """
    if isinstance(texts, str):
        raise CovarianceError("texts must be a list of texts, got a single one; wrap it in [...]")
    widths = {name: layer.in_features for name, layer in layers.items()}
    wanted = tokens if tokens is not None else TOKENS_PER_DIMENSION * max(widths.values())
    device = model.get_input_embeddings().weight.device
    who = identity(model, list(layers))
    done = None
    if path is not None and Path(path).exists():
        done = Covariance.load(path)
        done.tokens_wanted = 0  # unfinished is what a checkpoint may be
        done.check(model, widths)
        if set(done.moments) != set(widths):
            raise CovarianceError(f"{path} is the covariance of layers {', '.join(done.moments)}; choose another file")
        done.tokens_wanted = wanted
    if done is None:
        moments = {name: torch.zeros(d, d, dtype=torch.float64, device=device) for name, d in widths.items()}
        done = Covariance(moments, 0, who, 0, wanted)
    done.moments = {name: m.to(device) for name, m in done.moments.items()}
    if done.tokens >= wanted:
        return done
    limit = min(context, context_length(model) or context)
    bar = tqdm(total=wanted, initial=done.tokens, unit="token", desc="covariance", disable=not progress)
    with bar, evaluating(model):
        for number, (rows, read) in enumerate(_pieces(tokenizer, texts, done.texts, limit, max_tokens)):
            # The last piece is cut to the token, so that the result does not depend on the batch size.
            rows = _first_tokens(rows, wanted - done.tokens)
            for group in micro_batches([len(row) for row in rows], max_tokens):
                ids, mask = pad([rows[i] for i in group], pad_id(tokenizer), device=device)
                taps = {layer: _accumulator(done.moments[name], mask.bool()) for name, layer in layers.items()}
                run_until(decoder, last_block, {"input_ids": ids, "attention_mask": mask}, taps)
            added = sum(map(len, rows))
            done.tokens += added
            done.texts = read
            bar.update(added)
            if done.tokens >= wanted:
                break
            if path is not None and number % save_every == save_every - 1:
                done.save(path)
    if done.tokens == 0:
        raise CovarianceError("the corpus holds no text to collect a covariance from")
    if done.tokens < wanted:
        log.warning("covariance: the corpus ended after %d of %d tokens", done.tokens, wanted)
        done.tokens_wanted = done.tokens
    if path is not None:
        done.save(path)
    return done


def _accumulator(moment: torch.Tensor, real: torch.Tensor):
    """A tap that adds ``Σ k kᵀ`` of the real tokens; float32 products, float64 sums."""

    def add(x: torch.Tensor) -> None:
        keys = x.reshape(-1, x.shape[-1])[real.reshape(-1).to(x.device)]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        moment.add_((keys.mT @ keys).to(moment))

    return add


def _pieces(tokenizer, texts: Iterable[str], skip: int, limit: int, budget: int) -> Iterator[tuple[list, int]]:
    """``(rows of token ids, texts read so far)`` of about ``budget`` tokens, ending with a text: a place to resume."""
    rows: list[list[int]] = []
    number = 0
    for number, text in enumerate(texts, 1):
        if number <= skip:
            continue
        ids = tokenizer(text, verbose=False)["input_ids"]
        rows += [ids[i : i + limit] for i in range(0, len(ids), limit)]
        if sum(map(len, rows)) >= budget:
            yield rows, number
            rows = []
    if rows:
        yield rows, number


def _first_tokens(rows: list[list[int]], count: int) -> list[list[int]]:
    kept = []
    for row in rows:
        if count <= 0:
            break
        kept.append(row[:count])
        count -= len(kept[-1])
    return kept
