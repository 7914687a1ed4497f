"""Which prompts of a record are asked for which metric."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import torch

from comeba_ext.errors import RequestError
from comeba_ext.evaluation.scoring import Query
from comeba_ext.forward.architectures import context_length
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import longer_part

METRICS = ("reliability", "generality", "locality", "portability")


class Asked(NamedTuple):
    """A prompt of a record, its answer if there is one, and other names of that."""

    prompt: str
    answer: str | None
    aliases: tuple[str, ...] = ()


def record_prompts(request: EditRequest) -> dict[str, list[Asked]]:
    """What is asked of a request by metric; a metric without prompts has an empty list.

    Portability prompts without an answer cannot be scored and are left out. Locality prompts without one are compared
    in the next token.
    """
    portability = zip_longest(request.portability_prompts, request.portability_aliases[: len(request.portability_prompts)], fillvalue=())
    return {
        "reliability": [Asked(request.text, request.target_new, request.aliases)],
        "generality": [Asked(prompt, request.target_new, request.aliases) for prompt in request.rephrase_prompts],
        "locality": [Asked(*pair) for pair in request.locality_prompts],
        "portability": [Asked(p, answer, own) for (p, answer), own in portability if answer and answer.strip()],
    }


def record_queries(
    tokenizer, request: EditRequest, index: int | None, rewrite: Callable[[str], str] | None = None
) -> dict[str, list[Query]]:
    """:func:`record_prompts`, tokenised.

    Args:
        rewrite: how the model is to be asked (:func:`~comeba_ext.layers.prompts.prompt_rewriter`).

    Raises:
        RequestError: a prompt or target has no token; the message names the record.
    """
    asked = rewrite or (lambda prompt: prompt)
    try:
        return {
            name: [Query.of(tokenizer, asked(own.prompt), own.answer) for own in prompts]
            for name, prompts in record_prompts(request).items()
        }
    except RequestError as error:
        raise RequestError(f"{where(index, request)}{error}") from None


def check_context(model: torch.nn.Module, queries: list[Query], index: int | None, request: EditRequest) -> None:
    """Raises a RequestError that names the record when one of its queries is longer than the model's context."""
    limit = context_length(model)
    longest = max(queries, key=lambda query: len(query.ids), default=None)
    if limit is not None and longest is not None and len(longest.ids) > limit:
        raise RequestError(
            f"{where(index, request)}a prompt with its target has {len(longest.ids)} tokens, the model's context is {limit}; "
            f"shorten the {longer_part(len(longest.prompt_ids), len(longest.target_ids))}"
        )


def question_queries(tokenizer, request: EditRequest, rewrite: Callable[[str], str] | None = None) -> list[Query]:
    """What a request's questions ask, tokenised; ``rewrite`` as of :func:`record_queries`, but not of what the unedited model is asked."""
    asked = rewrite or (lambda prompt: prompt)
    prompts = [asked(probe.prompt) for question in request.questions for probe in question.probes]
    prompts += [probe.prompt for question in request.questions for probe in question.conditions]
    return [Query.of(tokenizer, prompt, None) for prompt in prompts]


def check_record(model: torch.nn.Module, tokenizer, request: EditRequest) -> None:
    """Raises a RequestError when one of a record's prompts cannot be asked."""
    queries = record_queries(tokenizer, request, None)
    check_context(model, [query for own in queries.values() for query in own] + question_queries(tokenizer, request), None, request)


def where(index: int | None, request: EditRequest) -> str:
    """How messages begin that are about a record: its number, unless who reads them knows it, and its name."""
    name = "" if request.request_id is None else f"request {request.request_id!r}"
    if index is None:
        return f"{name}: " if name else ""
    return f"record {index} ({name}): " if name else f"record {index}: "
