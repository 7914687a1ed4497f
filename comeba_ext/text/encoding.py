"""From texts to padded token batches, with the positions editing and evaluation need.

A prompt and its target are tokenised *together*, as the model will meet them, and the boundary is found from character
offsets; so it makes no difference whether a tokenizer glues the space to the following word, emits it alone, or starts
every text with special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from comeba_ext.errors import RequestError


@dataclass(frozen=True)
class Encoded:
    """One tokenised text.

    Attributes:
        ids: token ids, special tokens included.
        subject_last: position of the last token of the subject, or ``None`` when no subject was given.
        target_start: position of the first target token; ``len(ids)`` when there is no target.
    """

    ids: list[int]
    subject_last: int | None
    target_start: int

    @property
    def target_ids(self) -> list[int]:
        return self.ids[self.target_start :]


def encode(tokenizer, prompt: str, target: str | None = None, subject_end: int | None = None) -> Encoded:
    """Tokenise ``prompt``, or ``prompt + " " + target``; :func:`encode_all` of one text."""
    return encode_all(tokenizer, [(prompt, target, subject_end)])[0]


def encode_all(tokenizer, texts: Sequence[tuple[str, str | None, int | None]]) -> list[Encoded]:
    """Tokenise ``prompt``, or ``prompt + " " + target``, for many texts in one call of the tokenizer, whose calls are dear.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow.
        texts: for each text

            * the prompt, without trailing space;
            * the target that follows it after one space, or at once where it ends a line (an answer in a chat), or ``None``;
            * the index in the prompt of the character after the subject, or ``None``.

    Raises:
        RequestError: a target or a subject has no token of its own.
    """
    whole = [prompt if target is None else prompt + ("" if prompt.endswith("\n") else " ") + target for prompt, target, _ in texts]
    if not whole:
        return []
    if tokenizer.is_fast:
        encoded = tokenizer(whole, return_offsets_mapping=True)
        spans = [list(zip(*offsets)) or [(), ()] for offsets in encoded["offset_mapping"]]
        found = [
            (ids, list(starts), [b if b > a else None for a, b in zip(starts, ends)])
            for ids, (starts, ends) in zip(encoded["input_ids"], spans, strict=True)
        ]
    else:
        rows = [tokenizer(text)["input_ids"] for text in whole]
        found = [(ids, *_slow_offsets(tokenizer, text, ids)) for text, ids in zip(whole, rows, strict=True)]
    return [_located(*own, *text) for own, text in zip(found, texts, strict=True)]


def _located(
    ids: list[int], starts: list[int], ends: list[int | None], prompt: str, target: str | None, subject_end: int | None
) -> Encoded:
    """Where a tokenised text's subject ends and its target begins; ``starts``, ``ends``: its tokens' characters, with no
    end for special ones."""
    if target is not None and ids and ends[-1] is None:  # an end-of-text token after the target is not part of it
        while ids and ends[-1] is None:
            ids, starts, ends = ids[:-1], starts[:-1], ends[:-1]
    target_start = len(ids)
    if target is not None:
        target_start = next((i for i, end in enumerate(ends) if end is not None and end > len(prompt)), len(ids))
        if target_start == len(ids):
            raise RequestError(f"target {target!r} of prompt {prompt!r} has no token")
    subject_last = None
    if subject_end is not None:
        touching = [i for i, end in enumerate(ends) if end is not None and starts[i] < subject_end]
        touching = [i for i in touching if i < target_start]
        if not touching:
            raise RequestError(f"the subject of prompt {prompt!r} has no token")
        # A token that goes on behind the subject (")?") is less of it than of what follows: every question may end in one.
        crosses = ends[touching[-1]] > subject_end and not prompt[subject_end : ends[touching[-1]]].isspace()
        subject_last = touching[-2] if crosses and len(touching) > 1 else touching[-1]
    return Encoded(list(ids), subject_last, target_start)


def _slow_offsets(tokenizer, text: str, ids: list[int]) -> tuple[list[int], list[int | None]]:
    """Character spans for tokenizers that keep none: each token ends where the decoded text so far ends."""
    starts: list[int] = []
    ends: list[int | None] = []
    special, position = set(tokenizer.all_special_ids), 0
    for i, token in enumerate(ids):
        starts.append(position)
        if token in special:
            ends.append(None)
            continue
        so_far = tokenizer.decode(ids[: i + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A decoder may or may not keep a leading space; compare from the right end of what the text shares.
        shared = len(so_far) if text.startswith(so_far) else len(so_far.lstrip()) + (len(text) - len(text.lstrip()))
        position = max(position, min(shared, len(text)))
        ends.append(position)
    return starts, ends


def pad_id(tokenizer) -> int:
    """The id to pad with; any id serves, because padding is masked out, so a tokenizer without one is no error."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if value is not None:
            return value if isinstance(value, int) else value[0]
    return 0


def input_device(model: torch.nn.Module) -> torch.device:
    """Where a model takes its token ids: with its embeddings, or its first weight where it names none; a model over several devices
    moves them on itself."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if (hook := getattr(embeddings, "_hf_hook", None)) is not None and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)  # accelerate's: the weights themselves may be elsewhere
    weight = getattr(embeddings, "weight", None)
    weight = next(model.parameters(), None) if weight is None else weight
    return torch.device("cpu") if weight is None else weight.device


def pad(rows: list[list[int]], pad_token: int, side: str = "right", device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 ``(len(rows), longest row)``."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_token)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for n, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[n, where] = torch.tensor(row)
        mask[n, where] = 1
    return ids.to(device), mask.to(device)


def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that a group, padded to its longest row, has at most ``max_tokens`` tokens.

    Rows of like length go together; a row longer than the budget goes alone. Every index appears exactly once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[index] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def dense_batches(lengths: list[int], max_tokens: int, launch: int) -> list[list[int]]:
    """Indices grouped by length so that padding and the number of groups together cost least.

    A group costs its padded tokens plus ``launch`` (:func:`budget.launch_tokens`). Groups hold at most ``max_tokens``
    padded tokens, or one longer row. Every index appears exactly once.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [n + 1 for n, index in enumerate(order) if n + 1 == len(order) or lengths[order[n + 1]] != lengths[index]]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # end of a group -> least cost up to it, start of that group
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + launch + (end - start) * longest, start) for start, (cost, _) in best.items())
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        each = max(1, max_tokens // lengths[order[end - 1]])
        groups += [order[i : min(i + each, end)] for i in range(start, end, each)]
        end = start
    return groups
