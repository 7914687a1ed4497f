"""Edit episodes: what methods that are trained to edit are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from comeba_ext.errors import RequestError
from comeba_ext.text.request import SLOT, EditRequest


@dataclass(frozen=True)
class Episode:
    """An edit, another wording that must then be answered alike, and a prompt whose answer must stay as it is.

    Attributes:
        wording: a rephrase of the request's prompt; its prompt where it has none.
        unrelated: ``(prompt, answer)``; the answer says how far the model is compared, not what is right.
        beside: the same of something else about the request's subject: another request's prompt with this subject in it. ``None``:
            there is no other prompt.
    """

    request: EditRequest
    wording: str
    unrelated: tuple[str, str]
    beside: tuple[str, str] | None = None


def episodes_of(requests: list[EditRequest], numbers: list[int], draw: random.Random) -> list[Episode]:
    """Episodes of some requests, with a wording and an unrelated prompt of each drawn at random.

    A request without locality prompts has another one's, of another subject.

    Raises:
        RequestError: no request has a locality prompt.
    """
    others = [n for n, request in enumerate(requests) if request.locality_prompts]
    if not others:
        raise RequestError("no record has a locality prompt, and what is to stay as it is cannot be learned without one")
    found = []
    for number in numbers:
        request = requests[number]
        wording = draw.choice(request.rephrase_prompts) if request.rephrase_prompts else request.text
        source = request
        for _ in range(100):  # where all are of one subject, any will do
            if source.locality_prompts and (source is request or source.subject != request.subject):
                break
            source = requests[draw.choice(others)]
        unrelated = draw.choice(source.locality_prompts)
        found.append(Episode(request, wording, unrelated, _beside(request, requests, random.Random(f"{number}:{wording}"))))
    return found


def _beside(request: EditRequest, requests: list[EditRequest], draw: random.Random) -> tuple[str, str] | None:
    """Of a request that has none of this one's prompts and objects, which a wording of the same relation may have."""
    own = {request.target_new, request.ground_truth}
    for _ in range(100):
        other = draw.choice(requests)
        if other.prompt != request.prompt and not own & {other.target_new, other.ground_truth or other.target_new}:
            return other.prompt.replace(SLOT, request.subject, 1), other.target_new
    return None
