"""What a model says after a prompt: teacher-forced and generated, batched, padded and put back in order.

*Teacher-forced* is EasyEdit's ``test_prediction_acc``: prompt, space and target are fed together, and the argmax at
each target position is the token the model would have put there given the true tokens before it. *Generated* is what
the model writes when it has the prompt alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from comeba_ext.errors import RequestError
from comeba_ext.forward.logits import logits_at, room_for_logits
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.prompts import as_asked, plain_generate
from comeba_ext.text.encoding import encode, input_device, micro_batches, pad


@dataclass(frozen=True)
class Query:
    """One prompt and what is looked for after it.

    Attributes:
        prompt_ids: tokens of the prompt, special tokens included.
        target_ids: tokens of the target as they stand behind the prompt; empty when only the next token matters.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.target_ids

    @property
    def length(self) -> int:
        """How many tokens are compared."""
        return max(1, len(self.target_ids))

    @classmethod
    def of(cls, tokenizer, prompt: str, target: str | None) -> Query:
        """Tokenise a prompt with its target, or alone (a blank target counts as none).

        Raises:
            RequestError: the prompt, or a target that is given, has no token.
        """
        prompt = prompt.rstrip()  # the space before the target is encode()'s
        if target is not None and target.strip():
            encoded = encode(tokenizer, prompt, target.strip())
            query = cls(tuple(encoded.ids[: encoded.target_start]), tuple(encoded.target_ids))
        else:
            ids = encode(tokenizer, prompt).ids
            while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
                ids = ids[:-1]
            query = cls(tuple(ids), ())
        if not query.prompt_ids:
            raise RequestError(f"prompt {prompt!r} has no token")
        return query


@dataclass(frozen=True)
class Prediction:
    """A model's answer to a query; both of ``query.length`` tokens.

    Attributes:
        forced: argmax at each target position, the true target before it.
        generated: greedy continuation of the prompt alone; ``None`` when it was not asked for.
    """

    forced: tuple[int, ...]
    generated: tuple[int, ...] | None


def predict(
    model: torch.nn.Module,
    queries: Iterable[Query],
    *,
    pad_token: int,
    max_tokens: int,
    generate: bool,
    bar=None,
) -> dict[Query, Prediction]:
    """The model's answer to every query; equal queries are run once.

    Args:
        model: causal language model; it is put into eval mode meanwhile and no gradient is recorded.
        queries: what to ask.
        pad_token: id to pad with; padding is masked out.
        max_tokens: padded tokens in one forward pass (generated ones counted); a single longer row runs alone.
        generate: also continue each prompt greedily.
        bar: progress bar to advance, one step a query and pass.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    max_tokens = room_for_logits(model, max_tokens)
    queries = list(dict.fromkeys(queries))
    forced: dict[Query, tuple[int, ...]] = {}
    generated: dict[Query, tuple[int, ...]] = {}
    with evaluating(model), torch.no_grad():
        for batch in grouped_batches(queries, max_tokens, size=lambda q: len(q.ids)):
            forced.update(zip(batch, _forced(model, batch, pad_token)))
            _advance(bar, batch)
        if generate and queries:
            with greedy(model, pad_token):
                # Only rows that need equally many tokens share a batch: none runs past the end of the context for
                # the sake of a batch mate.
                batches = grouped_batches(queries, max_tokens, size=lambda q: len(q.prompt_ids) + q.length, group=lambda q: q.length)
                for batch in batches:
                    generated.update(zip(batch, _generated(model, batch, pad_token)))
                    _advance(bar, batch)
    return {query: Prediction(forced[query], generated.get(query)) for query in queries}


def grouped_batches(queries: Sequence[Query], max_tokens: int, size, group=lambda query: 0) -> Iterator[list[Query]]:
    """Batches of one group each, of at most ``max_tokens`` padded tokens (:func:`~comeba_ext.text.encoding.micro_batches`)."""
    groups: dict[int, list[Query]] = {}
    for query in queries:
        groups.setdefault(group(query), []).append(query)
    for _, own in sorted(groups.items()):
        yield from ([own[n] for n in numbers] for numbers in micro_batches([size(query) for query in own], max_tokens))


def _forced(model, batch: list[Query], pad_token: int) -> list[tuple[int, ...]]:
    # The last target token is fed although nothing behind it is read: a scope that looks at the whole sequence (the
    # paper's score) depends on it, and EasyEdit feeds it.
    ids, mask = pad([list(query.ids) for query in batch], pad_token, "right", input_device(model))  # (batch, seq)
    columns = [range(len(query.prompt_ids) - 1, len(query.prompt_ids) - 1 + query.length) for query in batch]
    with as_asked(model, [list(query.prompt_ids) for query in batch]):
        logits = logits_at(model, {"input_ids": ids, "attention_mask": mask}, columns)
    return [tuple(own.argmax(-1).tolist()) for own in logits]


def _generated(model, batch: list[Query], pad_token: int) -> list[tuple[int, ...]]:
    ids, mask = pad([list(query.prompt_ids) for query in batch], pad_token, "left", input_device(model))  # (batch, seq)
    length = batch[0].length
    output = plain_generate(model)(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=length,
        pad_token_id=pad_token,
    )
    return [tuple(row) for row in output[:, ids.shape[1] :].tolist()]


@contextmanager
def greedy(model: torch.nn.Module, pad_token: int):
    """Plain greedy decoding: for the time being the model has a generation config with nothing in it.

    Arguments of ``generate`` cannot do this. What they leave open (sampling settings, repetition penalty, suppressed
    tokens, end-of-text ids) is filled in from the model's config, and asking for a minimum length instead of having no
    end-of-text id would forbid that token, so the model's second choice would be scored as its first. Wrappers hand
    their config down to the model inside, so every submodule's is put back.
    """
    before = [(module, vars(module).get("generation_config", _ABSENT)) for module in model.modules()]
    plain = GenerationConfig(pad_token_id=pad_token)
    for module, config in before:
        if config is not _ABSENT or module is model:
            module.generation_config = copy.deepcopy(plain)
    try:
        yield
    finally:
        for module, config in before:
            if config is not _ABSENT:
                module.generation_config = config
            elif "generation_config" in vars(module):
                del module.generation_config


_ABSENT = object()


def _advance(bar, batch: list[Query]) -> None:
    if bar is not None:
        bar.update(len(batch))
