"""What the unedited model says: the yardstick of locality, and what stood there before the edits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from comeba_ext.errors import RequestError
from comeba_ext.evaluation.answers import conditions_of
from comeba_ext.evaluation.queries import check_context, record_prompts, record_queries, where
from comeba_ext.evaluation.scoring import Prediction, Query, predict
from comeba_ext.evaluation.written import Writing
from comeba_ext.layers.attachment import attachments, disabled
from comeba_ext.text.encoding import pad_id
from comeba_ext.text.request import as_requests


@dataclass(frozen=True)
class BasePredictions:
    """Predictions of the unedited model for the locality prompts of some records, and what it writes to those and to the edited ones.

    Made by :func:`predict_base` once, then given to :func:`evaluate` as ``base`` after every edit batch. They serve
    the records they were made for and any subset of these.

    Attributes:
        predictions: prediction of each locality query.
        generate: whether greedy continuations are among them.
        writing: how it was let write, if at all; answers: what it wrote, by :meth:`Writing.ids` of the prompt.
    """

    predictions: Mapping[Query, Prediction] = field(repr=False)
    generate: bool
    writing: Writing | None = None
    answers: Mapping[tuple[int, ...], str] = field(default_factory=dict, repr=False)

    def check(self, queries: list[list[Query]], requests: list, generate: bool, writing: Writing | None = None) -> None:
        """Raises a RequestError unless every query of every request, ``queries[i]`` of ``requests[i]``, is known."""
        if writing is not None and writing != self.writing:
            raise RequestError(f"the base predictions were made with writing={self.writing}; make them again with {writing}")
        if generate and not self.generate:
            raise RequestError("the base predictions were made with generate=False; make them again or evaluate with generate=False")
        for index, (request, own) in enumerate(zip(requests, queries)):
            if any(query not in self.predictions for query in own):
                raise RequestError(
                    f"{where(index, request)}the base predictions were made for other records or with another "
                    "tokenizer; call predict_base with these records"
                )


def predict_base(
    model: torch.nn.Module,
    tokenizer,
    records,
    *,
    max_tokens: int = 4096,
    generate: bool = True,
    writing: Writing | None = None,
    progress: bool = False,
) -> BasePredictions:
    """The unedited model's predictions for the locality prompts of ``records``.

    Args:
        model: the unedited model, or an edited one, whose edits are then switched off (:func:`unedited`).
        tokenizer: its tokenizer.
        records: anything :func:`as_requests` accepts.
        max_tokens: padded tokens in one forward pass; give :func:`evaluate` the same, so that both runs form the same
            batches and rounding cannot tell them apart.
        generate: also continue each prompt greedily.
        writing: also let it write to a natural end, so.
        progress: show a progress bar.

    Raises:
        RequestError: a record cannot be used or a text is longer than the model's context; nothing was run.
    """
    requests = as_requests(records)
    queries = [record_queries(tokenizer, request, index)["locality"] for index, request in enumerate(requests)]
    for index, (request, own) in enumerate(zip(requests, queries)):
        check_context(model, own, index, request)
    distinct = list(dict.fromkeys(query for own in queries for query in own))
    pools: list[list[tuple[int, ...]]] = []  # locality in batches of its own: rounding cannot make a difference between equal models
    if writing is not None:
        asked = [record_prompts(request) for request in requests]
        ids = lambda names: [writing.ids(tokenizer, own.prompt) for prompts in asked for name in names for own in prompts[name]]  # noqa: E731
        pools = [
            ids(["reliability"]),
            list(conditions_of(tokenizer, requests, writing).values()),
            ids(["locality"]),
        ]
    total = len(distinct) * (1 + generate) + sum(len(set(pool)) for pool in pools)
    with unedited(model), tqdm(total=total, disable=not progress, desc="base") as bar:
        predictions = predict(model, distinct, pad_token=pad_id(tokenizer), max_tokens=max_tokens, generate=generate, bar=bar)
        answers: dict[tuple[int, ...], str] = {}
        for pool in pools:
            answers |= writing.answers(model, tokenizer, pool, max_tokens=max_tokens, bar=bar)
    return BasePredictions(predictions, generate, writing, answers)


def has_edits(model: torch.nn.Module) -> bool:
    """Whether something in the model can be switched off to leave the unedited one: hooked layers, else PEFT's adapters.

    Raises:
        RequestError: layers of another kind wrap the model's own, which only their maker can switch off.
    """
    if attachments(model) or hasattr(model, "disable_adapter") or getattr(model, "_hf_peft_config_loaded", False):
        return True
    foreign = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "base_layer")})
    if foreign:
        raise RequestError(
            f"the model has layers of {', '.join(foreign)}, which cannot be switched off from here, so there is nothing to "
            "compare locality with; give the unedited model as base"
        )
    return False


@contextmanager
def unedited(model: torch.nn.Module):
    """Inside, the model without its edits: hooked layers off; where there are none, PEFT's adapters."""
    if attachments(model) or not has_edits(model):
        with disabled(model):
            yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:  # adapters that Transformers itself put in
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
