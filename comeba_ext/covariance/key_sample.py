"""Keys of single corpus tokens, kept beside the covariance: what ordinary text looks like to an edited layer.

The covariance says how keys spread; how close ordinary tokens come to one edited key only tokens can tell. Some thousand
of them are drawn while the corpus is read anyway, the first of every text among them, because there many models keep a
state that is the same whatever the token (attention sinks). With each token come the ones before it, so that a mention
of an edited subject is not taken for a false alarm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SIZE = 8192  # tokens, about
FIRST = 4  # positions of every text that are all taken
TOKENS = 12  # ids kept of a token and those before it
_REMEMBERED = 1024  # subjects whose mentions are


@dataclass
class KeySample:
    """Attributes:
    keys: layer name to ``(n, d_in)`` bfloat16, on the host; empty where none was drawn.
    tokens: ``(n, TOKENS)`` int32, the token's id last, those before it in front, −1 where there was none.
    unit: ``(n,)`` int64, the corpus unit that each comes from, which orders them.
    """

    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(0, TOKENS, dtype=torch.int32))
    unit: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _mentions: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.unit)

    def extended(self, others: list[KeySample]) -> KeySample:
        """All of them together, in the order of the corpus, whoever drew them."""
        parts = [part for part in (self, *others) if len(part)]
        if not parts:
            return self
        unit = torch.cat([part.unit for part in parts])
        order = unit.argsort(stable=True)
        keys = {name: torch.cat([part.keys[name] for part in parts])[order] for name in parts[0].keys}
        return KeySample(keys, torch.cat([part.tokens for part in parts])[order], unit[order])

    def mentions(self, forms: list[list[int]]) -> torch.Tensor:
        """``(n,)`` bool: tokens that end one of the given forms of a subject, each a list of token ids."""
        key = tuple(tuple(form[-TOKENS:]) for form in forms)
        if key not in self._mentions:  # asked again in every layer and behind every prefix
            if len(self._mentions) >= _REMEMBERED:
                self._mentions.clear()
            ends = [(self.tokens[:, TOKENS - len(own) :] == torch.tensor(own, dtype=self.tokens.dtype)).all(-1) for own in key]
            self._mentions[key] = torch.stack(ends).any(0)
        return self._mentions[key]

    def holds(self, forms: list[list[int]]) -> bool:
        """Whether one of these forms is anywhere in the texts that the tokens are of."""
        return any(
            (self.tokens.unfold(1, len(own), 1) == torch.tensor(own, dtype=self.tokens.dtype)).all(-1).any()
            for own in forms
            if len(own) <= TOKENS
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By names, for :meth:`from_tensors`."""
        if not len(self):
            return {}
        return {**{f"{name}.sample": keys for name, keys in self.keys.items()}, "sample.tokens": self.tokens, "sample.unit": self.unit}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> KeySample:
        """Takes its own out of ``tensors``; nothing there gives an empty sample."""
        keys = {name[: -len(".sample")]: tensors.pop(name) for name in list(tensors) if name.endswith(".sample")}
        if not keys:
            return cls()
        return cls(keys, tensors.pop("sample.tokens"), tensors.pop("sample.unit"))


class Draw:
    """Draws tokens of corpus units: the same ones, whatever the number of processes and the size of batches.

    Args:
        wanted: corpus tokens in all.
    """

    def __init__(self, wanted: int):
        self.stride = -(-wanted // SIZE)
        self._parts: list[KeySample] = []
        self._keys: dict[str, torch.Tensor] = {}

    def places(self, rows: list[list[int]], number: int) -> list[list[int]]:
        """The drawn positions of every row of unit ``number``."""
        found, index = [], number  # so that units do not all begin alike
        for row in rows:
            found.append([p for p in range(len(row)) if p < FIRST or (index + p) % self.stride == 0])
            index += len(row)
        return found

    def tap(self, name: str, x: torch.Tensor, index: torch.Tensor) -> None:
        """Take the keys at ``index`` of one batch's ``x (tokens, d_in)``."""
        self._keys[name] = x[index.to(x.device)].to("cpu", torch.bfloat16)

    def add(self, batch: list[list[int]], places: list[list[int]], number: int) -> None:
        """What :meth:`tap` took of a batch belongs to these rows' places."""
        tokens = [
            [-1] * (TOKENS - 1 - p) + row[max(0, p - TOKENS + 1) : p + 1] for row, own in zip(batch, places, strict=True) for p in own
        ]
        tokens = torch.tensor(tokens, dtype=torch.int32).reshape(-1, TOKENS)
        self._parts.append(KeySample(self._keys, tokens, torch.full((len(tokens),), number)))
        self._keys = {}

    def taken(self, into: KeySample) -> KeySample:
        """``into`` with everything drawn since the last call."""
        parts, self._parts = self._parts, []
        return into.extended(parts)
