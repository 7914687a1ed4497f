"""What a score that compares keys must know of a batch, and what follows for the batch.

Such a score lets only those tokens meet the edits whose inputs are like one that was edited. So before a batch is written it is
asked whose keys are no one's own (:meth:`KeyRecognition.placed`); facts of one subject, whose keys are nearly the same, share a
value (:meth:`together`, :meth:`companions`); an edit is written at two keys (:meth:`keys`); and every layer's score is told the
directions to compare with, each with its threshold (:mod:`anchors`). Scores of responses need none of this: :class:`Recognition`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from comeba_ext.editing.anchors import APART, Anchors, Background, anchors_of, tells
from comeba_ext.editing.keys import LayerReading
from comeba_ext.editing.subject_shards import Member, SubjectShards
from comeba_ext.errors import RequestError
from comeba_ext.layers.edit_table import QUESTIONS, QuestionGate
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.ledger import Entry
from comeba_ext.ops.mentions import name_hash
from comeba_ext.text.decoys import decoy_rows
from comeba_ext.text.names import names_of
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import prompt_rows

if TYPE_CHECKING:
    from comeba_ext.methods.comeba_hk import ComebaHK

log = logging.getLogger(__name__)

KEYS = 2  # that an edit is written at in a layer
_SHARED_STATE = "the model keeps the same state for most texts where its subject ends (near the beginning of a text)"


class Recognition:
    """Of scores that compare no keys: every request is edited where it asks to be, with a value of its own, at its mean key.

    Args:
        method: whose layers, model and settings these are.

    Attributes:
        compares: whether the scores compare keys; then keys behind every prefix are read, and every subject's edits are kept apart.
        leverage: layer name to the leverage of every key of the batch that is being edited, ``(u,)``.
    """

    compares = False

    def __init__(self, method: ComebaHK):
        self.method = method
        self.leverage: dict[str, torch.Tensor] = {}

    def of(self, method: ComebaHK) -> Recognition:
        """The same for a method at work on a twin, with nothing of a batch."""
        other = copy.copy(self)
        other.method, other.leverage = method, {}
        return other

    def adopt(self, other: Recognition) -> None:
        """What has become of the edits on a twin."""

    def learn(self) -> None:
        """The method has another covariance, and its layers other metrics."""

    def placed(self, batch: list[EditRequest]) -> tuple[list[int], list[EditRequest], list[dict]]:
        """Which requests can be edited, those requests, and why the others cannot."""
        return list(range(len(batch))), batch, []

    def companions(self, batch: list[EditRequest]) -> list[Entry]:
        """Live edits that must be written anew together with these."""
        return []

    def check_memory(self, batch: list[EditRequest]) -> None:
        """These are going to be written.

        Raises:
            RequestError: what the model holds of its edits would exceed ``max_edit_memory``.
        """

    def together(self, batch: list[EditRequest]) -> list[list[int]]:
        """Which requests share a target value's δ."""
        return [[n] for n in range(len(batch))]

    def begin(self, batch: list[EditRequest]) -> None:
        """These are going to be written."""

    def keys(self, name: str, reading: LayerReading) -> torch.Tensor:
        """The keys that a layer's edits are written at, ``(u, m, d_in)``."""
        return reading.keys[:, None]

    def write(self, name: str, layer: HookedLinear, batch: list[EditRequest], keys: torch.Tensor, responses: torch.Tensor) -> None:
        """Tell a layer what a batch is to answer, ``(u, m, d_out)``, to its keys ``(u, m, d_in)``."""

    def marks(self, request: int) -> dict[str, tuple[torch.Tensor, ...]]:
        """Layer name to what a request of the batch left with the score: directions and their two thresholds, on the host."""
        return {}

    def lowest(self, name: str) -> float | None:
        """The lowest threshold of the batch, where thresholds follow from keys and not from prompts' scores."""
        return None

    def compare_with(self, live: list[Entry]) -> None:
        """Compare with the keys of these entries, and no others."""

    def forget(self, entries: list[Entry]) -> None:
        """Compare with the keys of these entries no longer."""


class KeyRecognition(Recognition):
    """Of scores that compare inputs with edited keys (:class:`~comeba_ext.scores.nearest.NearestScore`).

    Attributes:
        shards: layer name to what of the live edits is in which shard.
    """

    compares = True

    def __init__(self, method: ComebaHK):
        super().__init__(method)
        self._backgrounds: dict[str, Background] = {}
        self.shards = {name: SubjectShards() for name in method.layers}
        self._anchors: dict[str, Anchors] = {}  # of the batch
        self._subjects: list[list[list[int]]] = []
        self._decoys: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._names: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._at_end = torch.zeros(0, dtype=torch.bool)

    def of(self, method: ComebaHK) -> KeyRecognition:
        other = super().of(method)
        other._anchors, other.shards = {}, {name: own.copy() for name, own in self.shards.items()}
        return other

    def adopt(self, other: KeyRecognition) -> None:
        self.shards = other.shards

    def learn(self) -> None:
        self._backgrounds = {}

    def background(self, name: str) -> Background:
        """What a layer's scores look like on ordinary text, from the covariance; made when it is first asked for."""
        if name not in self._backgrounds:
            layer, covariance = self.method.layers[name], self.method.covariance
            moment, sample = covariance[name].to(layer.delta.device), covariance.sample
            projection = layer.score.projection.to(moment)
            # E‖P k‖² over the corpus stands for E ℓ = d_in.
            scale = layer.in_features / ((projection @ moment) * projection).sum().item()
            keys = sample.keys[name] if len(sample) else torch.zeros(0, layer.in_features)
            self._backgrounds[name] = Background(layer.score.directions(keys), sample, scale)
        return self._backgrounds[name]

    # -- before anything is written -----------------------------------------------------------------------------

    def placed(self, batch: list[EditRequest]) -> tuple[list[int], list[EditRequest], list[dict]]:
        """Which requests can be edited, those requests, and why the others cannot.

        A key that ordinary tokens share, at the value layer, where the answer is made up, opens the gate for them. A request
        with such a key is edited at its prompt's last token instead, if that one is its own.
        """
        kept, declined = list(range(len(batch))), []
        if self.method.covariance is None:
            return kept, batch, declined
        batch = list(batch)
        for n in self._telling_nothing(batch):
            request = batch[n]
            moved = dataclasses.replace(request, fact_token="last")
            if request != moved and not self._telling_nothing([moved]):
                batch[n] = moved
                log.info("%s (%r) is edited at the prompt's last token: %s", request.request_id, request.text, _SHARED_STATE)
            else:
                reason = f"{_SHARED_STATE}, so an edit there would answer all of them; begin the prompt with other words"
                declined.append(
                    {
                        "request_id": request.request_id,
                        "prompt": request.text,
                        "subject": request.subject,
                        "target_new": request.target_new,
                        "reason": reason,
                    }
                )
                log.warning("declined %s (%r): %s", request.request_id, request.text, reason)
                kept.remove(n)
        return kept, [batch[n] for n in kept], declined

    def companions(self, batch: list[EditRequest]) -> list[Entry]:
        """Live edits of other facts of the batch's subjects: what is written at nearly their keys would otherwise take their
        place."""
        subjects = {request.subject for request in batch if request.fact_token == "subject_last"}
        facts = {request.fact for request in batch}
        return [
            entry
            for entry in self.method.session.ledger.live()
            if entry.request.subject in subjects and entry.request.fact_token == "subject_last" and entry.request.fact not in facts
        ]

    def check_memory(self, batch: list[EditRequest]) -> None:
        count = len(batch)
        limit, layers = self.method.config.max_edit_memory, self.method.layers.values()
        if limit is None:
            return
        directions = self.method.config.prefixes + 2  # a key behind each prefix, the prompt's own, their mean
        needed = sum(layer.shards.nbytes_with(KEYS * count) + layer.score.nbytes_with(directions * count) for layer in layers)
        needed += self.gate.nbytes_with(sum(len(_answered(request)) for request in _at_subjects(batch))) if self.gate is not None else 0
        if needed > limit * 1e6:
            raise RequestError(
                f"with {count} more edits the model would hold {needed / 1e6:.1f} MB of edits, and max_edit_memory is {limit:g}; "
                "take some back, or raise it"
            )

    def together(self, batch: list[EditRequest]) -> list[list[int]]:
        """Facts of one subject."""
        groups: dict = {}
        for n, request in enumerate(batch):
            groups.setdefault(request.subject if request.fact_token == "subject_last" else (n,), []).append(n)
        return list(groups.values())

    def _telling_nothing(self, batch: list[EditRequest]) -> list[int]:
        """The requests whose own key most texts share."""
        method, tokenizer = self.method, self.method.session.tokenizer
        name, layer = list(method.layers.items())[-1]
        units = layer.score.directions(method.subject_keys(prompt_rows(tokenizer, batch, [""]), [name])[name])
        told = tells(units[:, None], self.background(name), self.subjects(batch))[:, 0]
        ends = [n for n, request in enumerate(batch) if request.fact_token == "last"]
        if ends:
            rows = decoy_rows(tokenizer, [batch[n] for n in ends])
            others = layer.score.directions(method.subject_keys(rows, [name])[name])
            for row, other in zip(rows, others, strict=True):
                told[ends[row.request]] &= units[ends[row.request]] @ other <= APART
        return (~told).nonzero()[:, 0].tolist()

    # -- while it is written ------------------------------------------------------------------------------------

    def begin(self, batch: list[EditRequest]) -> None:
        """Subjects' tokens, names and decoys' keys of the batch."""
        self._subjects, self._decoys = self.subjects(batch), self.decoys(batch)
        self._names = self.names(batch)
        self._at_end = torch.tensor([request.fact_token == "last" for request in batch])
        self._ask_of(batch)

    def keys(self, name: str, reading: LayerReading) -> torch.Tensor:
        """The two keys that an edit is written at, ``(u, 2, d_in)``: the mean over context prefixes, and that behind the prompt
        alone, which at the beginning of a text can be so different that what is written at the mean does not reach it. (One
        that says nothing is left to the mean, and out of it: in ``reading`` too.)"""
        layer, background, config = self.method.layers[name], self.background(name), self.method.config
        each, score = reading.each, layer.score
        units = score.directions(each)
        told = tells(units, background, self._subjects)
        told |= ~told.any(-1, keepdim=True)
        reading.keys = (each * told[..., None]).sum(1) / told.sum(1, keepdim=True)
        self.leverage[name] = background.scale * F.linear(reading.plain_keys.to(each), score.projection.to(each)).square().sum(-1)
        self._anchors[name] = anchors_of(
            units,
            score.directions(reading.keys),
            background,
            self._subjects,
            self._decoys[name],
            config.alpha_floor,
            config.unnamed_floor,
            self._at_end,
        )
        alone = torch.where(told[:, :1], reading.plain_keys.to(reading.keys), reading.keys)
        return torch.stack([reading.keys, alone], 1)

    def write(self, name: str, layer: HookedLinear, batch: list[EditRequest], keys: torch.Tensor, responses: torch.Tensor) -> None:
        step = self.method.session.step + 1
        members = [
            Member((request.request_id, step), keys[n], responses[n], *self._anchors[name].of(n), *self._names[n])
            for n, request in enumerate(batch)
        ]
        self.shards[name].add(layer, self.method.key_memory[name], [_on_host(member) for member in members])

    def members(self, name: str, entries: list[Entry]) -> list[Member]:
        """What entries left in a layer."""
        called = self.names([entry.request for entry in entries])
        return [
            Member((entry.request.request_id, entry.step), entry.keys[name], entry.responses[name], *entry.anchors[name], *own)
            for entry, own in zip(entries, called, strict=True)
        ]

    def marks(self, request: int) -> dict[str, tuple[torch.Tensor, ...]]:
        return {name: tuple(part.cpu() for part in anchors.of(request)) for name, anchors in self._anchors.items()}

    def lowest(self, name: str) -> float | None:
        own = self._anchors[name]
        return torch.minimum(own.thresholds, own.named).min().item() if len(own.named) else float("inf")

    def compare_with(self, live: list[Entry]) -> None:
        for name, layer in self.method.layers.items():
            self.shards[name].rebuild(layer, self.method.key_memory.get(name), self.members(name, live))
        if self.gate is not None:
            now = {entry.request.request_id: entry.request for entry in self.method.session.ledger.live()}
            # One that was edited again under its id may have had other wordings.
            same = {entry.request.request_id for entry in live if now.get(entry.request.request_id) == entry.request}
            stay = same & {own["id"] for own in self.gate.entries}
            self.gate.drop({own["id"] for own in self.gate.entries} - stay)
            self._ask_of([entry.request for entry in live if entry.request.request_id not in stay])

    def forget(self, entries: list[Entry]) -> None:
        names = {(entry.request.request_id, entry.step) for entry in entries}
        for name, layer in self.method.layers.items():
            self.shards[name].remove(layer, self.method.key_memory[name], names)
        if self.gate is not None:
            self.gate.drop({entry.request.request_id for entry in entries})

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def gate(self) -> QuestionGate | None:
        """What tells whether a prompt asks for an edit; ``None`` without ``question_floor``."""
        return self.method.attachments.get(QUESTIONS)

    def _ask_of(self, batch: list[EditRequest]) -> None:
        """Let the gate know what these ask."""
        batch = _at_subjects(batch) if self.gate is not None else []
        if batch:
            entries = [
                {
                    "id": request.request_id,
                    "subject": request.subject.strip(),
                    "names": [name_hash(ids) for ids in own.names],
                    "ends": [name_hash([end]) for end in own.ends],
                }
                for request, own in zip(batch, names_of(self.method.session.tokenizer, batch), strict=True)
                for _ in _answered(request)
            ]
            self.gate.add(entries, self.gate.questions_of([(_answered(request), request.subject) for request in batch]))

    def decoys(self, batch: list[EditRequest]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer name to the directions of other names' keys, and which request each belongs to."""
        layers, rows = self.method.layers, decoy_rows(self.method.session.tokenizer, batch)
        owner = torch.tensor([row.request for row in rows], dtype=torch.long)
        if not rows:
            return {name: (torch.zeros(0, len(layer.score.projection)), owner) for name, layer in layers.items()}
        keys = self.method.subject_keys(rows, list(layers))
        return {name: (layer.score.directions(keys[name]), owner) for name, layer in layers.items()}

    def names(self, batch: list[EditRequest]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What every request's subject is called, and the tokens that this ends in (:func:`~comeba_ext.text.names.names_of`), as
        :func:`name_hash`. An ordinary word names nobody."""
        found = zip(batch, names_of(self.method.session.tokenizer, batch), strict=True)
        hashed = lambda lists: tuple(map(name_hash, lists))  # noqa: E731
        return [
            (() if self._ordinary(request.subject, own.names) else hashed(own.names), hashed([end] for end in own.ends))
            for request, own in found
        ]

    def _ordinary(self, subject: str, names: list[list[int]]) -> bool:
        """Whether it is a single word in small letters that the corpus sample holds ("song"); a rarer one may be a name ("insulin")."""
        covariance = self.method.covariance
        if covariance is None or not len(covariance.sample) or not names:
            return False
        return subject.islower() and len(subject.split()) == 1 and bool(covariance.sample.holds(names))

    def subjects(self, batch: list[EditRequest]) -> list[list[list[int]]]:
        """Token ids of every request's subject, at the beginning of a text and behind other words."""
        forms = [form for request in batch for form in (request.subject, f" {request.subject}")]
        ids = self.method.session.tokenizer(forms, add_special_tokens=False)["input_ids"]
        return [ids[n : n + 2] for n in range(0, len(ids), 2)]


def _on_host(member: Member) -> Member:
    return Member(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in member))


def _at_subjects(batch: list[EditRequest]) -> list[EditRequest]:
    """Those that a gate knows. (One that is edited at its prompt's end is met where that prompt is.)"""
    return [request for request in batch if request.fact_token == "subject_last"]


def _answered(request: EditRequest) -> list[str]:
    """The texts that an edit answers."""
    return [request.text, *request.wordings]
