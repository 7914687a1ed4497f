"""Edit episodes: what methods that are trained to edit are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from comeba_ext.errors import RequestError
from comeba_ext.text.request import EditRequest


@dataclass(frozen=True)
class Episode:
    """An edit, another wording that must then be answered alike, and a prompt whose answer must stay as it is.

    Attributes:
        wording: a rephrase of the request's prompt; its prompt where it has none.
        unrelated: ``(prompt, answer)``; the answer says how far the model is compared, not what is right.
    """

    request: EditRequest
    wording: str
    unrelated: tuple[str, str]


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
        found.append(Episode(request, wording, draw.choice(source.locality_prompts)))
    return found
