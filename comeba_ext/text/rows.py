"""Token rows of a batch of requests: every context prefix before every prompt, with the positions that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from comeba_ext.errors import RequestError
from comeba_ext.text.chat import chat_wording
from comeba_ext.text.encoding import Encoded, encode_all, pad
from comeba_ext.text.request import EditRequest, last_place


@dataclass(frozen=True)
class Row:
    """One tokenised text of a request.

    Attributes:
        request: index of the request in its batch.
        ids: token ids.
        subject_last: position of the subject's last token, or whichever is edited (:attr:`EditRequest.fact_token`).
        target: target token ids, of which all but the last are in ``ids``; empty for rows without a target.
        prefix: number of its context prefix, 0 for the empty one and −1 for a row that is not a prompt.
        whole: the target's last token is in ``ids`` too: what comes behind it is read as well.
    """

    request: int
    ids: list[int]
    subject_last: int
    target: list[int]
    prefix: int
    whole: bool = False

    @property
    def plain(self) -> bool:
        """The prompt with the empty prefix, where ``h`` is read."""
        return self.prefix == 0

    @property
    def end(self) -> int:
        """Number of tokens up to the last position whose output is read, above the edited blocks."""
        return len(self.ids) if self.target else self.subject_last + 1

    @property
    def predicts(self) -> range:
        """Positions whose next token is a target token."""
        end = len(self.ids) - self.whole
        return range(end - len(self.target), end)


def prompt_rows(tokenizer, requests: list[EditRequest], prefixes: list[str]) -> list[Row]:
    """``prefix + prompt`` for every request and prefix: the rows keys are read from."""
    places, encoded = _encode(tokenizer, requests, prefixes, lambda request: None)
    return [Row(n, e.ids, e.subject_last, [], number) for (n, number), e in zip(places, encoded, strict=True)]


def target_rows(
    tokenizer, requests: list[EditRequest], prefixes: list[str], wordings: bool = False, whole: bool = False, chat: bool = False
) -> list[Row]:
    """``prefix + prompt + target`` without the target's last token: the rows target values are optimised on.

    Args:
        wordings: also a row for each of a request's other wordings, numbered on behind the prefixes.
        whole: with the target's last token.
        chat: beside the wordings, the prompt and each of them in the model's chat template, as a user's turn.
    """
    places, encoded = _encode(tokenizer, requests, prefixes, lambda request: request.target_new, wordings, chat)
    return [
        Row(n, e.ids if whole else e.ids[:-1], e.subject_last, e.target_ids, number, whole)
        for (n, number), e in zip(places, encoded, strict=True)
    ]


def answer_rows(tokenizer, asked: list[tuple[str, str]]) -> list[Row]:
    """``prompt + target`` without the target's last token, for prompts and targets with no subject in particular."""
    encoded = encode_all(tokenizer, [(prompt.rstrip(), target, None) for prompt, target in asked])
    return [Row(n, e.ids[:-1], -1, e.target_ids, 0) for n, e in enumerate(encoded)]


def essence_rows(tokenizer, requests: list[EditRequest]) -> list[Row]:
    """``"{subject} is a"``: the rows on which the model must go on knowing what the subject is (KL)."""
    texts = [f"{request.subject} is a" for request in requests]
    encoded = encode_all(tokenizer, [(text, None, r.place_in(text, 0)) for text, r in zip(texts, requests, strict=True)])
    return [Row(n, e.ids, e.subject_last, [], -1) for n, e in enumerate(encoded)]


def check_length(rows: list[Row], requests: list[EditRequest], limit: int | None) -> None:
    """Raises :class:`RequestError` for a row longer than the model's context."""
    for row in rows:
        if limit is not None and len(row.ids) > limit:
            raise RequestError(
                f"{requests[row.request].text[:60]!r}: {len(row.ids)} tokens with its target and context prefix exceed the model's context "
                f"of {limit}; shorten the {longer_part(len(row.ids) - len(row.target), len(row.target))}"
            )


def longer_part(prompt: int, target: int) -> str:
    """What to shorten of a prompt and a target of so many tokens."""
    return "target" if target > prompt else "prompt"


def batch_inputs(rows: list[Row], pad_token: int, device) -> dict[str, torch.Tensor]:
    """Right-padded decoder inputs, each ``(len(rows), seq)``."""
    ids, mask = pad([row.ids for row in rows], pad_token, device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _encode(
    tokenizer,
    requests: list[EditRequest],
    prefixes: list[str],
    target: Callable[[EditRequest], str | None],
    wordings: bool = False,
    chat: bool = False,
) -> tuple[list[tuple[int, int]], list[Encoded]]:
    """``(request, prefix)`` numbers of all rows, and what they hold."""
    places = [(n, number) for n in range(len(requests)) for number in range(len(prefixes))]
    texts = [(prefixes[p] + requests[n].text, target(requests[n]), len(prefixes[p]) + requests[n].place) for n, p in places]
    for n, request in enumerate(requests if wordings else ()):
        own = [(wording.rstrip(), wording.rstrip()) for wording in request.wordings]
        own += [(said, chat_wording(tokenizer, said)) for said in (request.text, *request.wordings)] if chat else []
        for number, (said, text) in enumerate(own, len(prefixes)):
            places.append((n, number))
            start = text.rfind(said.strip())  # of what is said there: a template's own words ("model") may be a subject's
            within = last_place(request.subject, said.strip() if start >= 0 else text)
            if within < 0:
                raise RequestError(f"the chat template leaves the subject {request.subject!r} out of {said!r}; edit without 'chat'")
            texts.append((text, target(request), request.place_in(text, max(0, start) + within)))
    return places, encode_all(tokenizer, texts)
