"""SERAC: a cache of edits, a classifier of what they are about, and a counterfactual model (Mitchell et al. 2022, arXiv 2206.06520)."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.edit_table import Questions, questions_in
from comeba_ext.layers.hooked_linear import device_of, shape_of
from comeba_ext.layers.sequence_context import NEVER
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.in_context import PLACE, Facts, check_named, fact_of
from comeba_ext.methods.trained import Learner, Trained, TrainedConfig
from comeba_ext.ops.mentions import LONGEST, name_hash
from comeba_ext.text.encoding import input_device
from comeba_ext.text.episodes import Episode
from comeba_ext.text.names import named_in
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, answer_rows, check_length

MARK = "<edited fact>"  # what a prompt begins with that is answered by the counterfactual model
GRAMS = (3, 4, 5)  # letters of a word's parts, its ends marked
LEAST = 1e-6  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class SeracConfig(TrainedConfig):
    """Settings of SERAC; ``layers`` and ``parts`` are those that differ in the counterfactual model.

    Args:
        rank: of that model's LoRA, and ``lora_alpha``: its scale times the rank.
        buckets: of hashed words and parts of words, and ``width``: of the classifier's vectors.
        threshold: probability from which a prompt is in an edit's scope.
        named: a prompt that names an edit's subject is in its scope instead, and the counterfactual model learns to tell whether it
            asks for the fact: what else is asked about the subject it answers as the model does (ours).
            With ``question_floor``, what else is asked is not even given to it (ours).
    """

    rank: int = 8
    lora_alpha: float = 32.0
    buckets: int = 16384
    width: int = 64
    threshold: float = 0.5
    named: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("lora_alpha", "threshold"), counts=("rank", "buckets", "width"), flags=("named",))
        check_named(self)


def features(text: str, buckets: int) -> list[int]:
    """Numbers of a text's words and their parts, hashed; one where there is none."""
    found = []
    for word in re.findall(r"\w+", text.lower()):
        whole = f"<{word}>"
        found += [whole, *(whole[n : n + size] for size in GRAMS for n in range(len(whole) - size + 1))]
    return [zlib.crc32(part.encode()) % buckets for part in found or [""]]


def encode(text: str, table: torch.Tensor) -> torch.Tensor:
    """A text's vector ``(width,)``: the mean of its features' rows of ``table (buckets, width)``."""
    return table[torch.tensor(features(text, len(table)), device=table.device)].mean(0)


def stated(fact: str, prompt: str) -> str:
    """What is asked instead of a prompt that is in the scope of a fact."""
    return f"{MARK} {fact}\nPrompt: {prompt}"


def mark_forms(tokenizer) -> list[list[int]]:
    """The mark's token ids as they stand at a text's beginning, behind a space and behind a new line: in a chat's template it may be
    anywhere, and a tokenizer may write a first word otherwise than a later one, or join it with the space."""
    found: list[list[int]] = []
    for before in ("", " ", "\n"):
        ids, first = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before + MARK, before))
        own = ids[len(first) :] if ids[: len(first)] == first else ids
        if own not in found:
            found.append(own)
    return found


class Scope(Facts):
    """The edits, and which of them a prompt is about: the one whose own prompt's vector is nearest, if ``exp(−‖q − k‖²)`` reaches the
    threshold (equation 3; published: of DistilBERT. An encoder of a text's letters needs no tokenizer where saved edits are loaded).
    Where edits are ``named``, the nearest of those whose subject the prompt names.

    Attributes:
        keys: ``(edits, width)``, of their prompts, in the order of the facts; table: ``(buckets, width)``, empty before any edit.
    """

    precise = (*Facts.precise, "keys", "table")
    by_edit = (*Facts.by_edit, "keys")
    appended = (*Facts.appended, "keys", "table")

    def __init__(self, threshold: float, width: int, device=None, named: bool = False, questions: Questions | None = None):
        super().__init__(1, device, named, questions)
        self.threshold = threshold
        for name in ("keys", "table"):
            self.register_buffer(name, torch.zeros(0, width, device=device))

    def probabilities(self, prompt: str) -> torch.Tensor:
        """Of being in each edit's scope."""
        return _probabilities(prompt, self.keys, self.table)

    def rewrite(self, prompt: str) -> str:
        held = self._buffers  # one look: what is in it belongs together
        facts = self.unpacked(held["packed"])
        candidates = self.candidates(prompt, facts, held)
        if not candidates:
            return prompt
        probability, number = _probabilities(prompt, held["keys"], held["table"])[candidates].max(0)
        inside = self.named or probability >= self.threshold
        return stated(facts[candidates[number]]["fact"], prompt) if inside else prompt

    def join(self, other: Attachment) -> None:
        Attachment.join(self, other)  # each set was made with a classifier of its own


def _probabilities(prompt: str, keys: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (-(keys - encode(prompt, table)).square().sum(-1)).exp()


class Counterfactual(Attachment):
    """``base_layer(x) + scale · up down x`` for the tokens behind :data:`MARK`; every other token is the base layer's, bit for bit.

    Attributes:
        down: ``(rank, d_in)``, up: ``(rank, d_out)``, float32; mark: ``(forms, 2)``, the hashes of the mark's forms and their numbers
            of tokens; all empty before any edit.
        trained: in training, ``down``, ``up`` and ``mark`` that take their place.
    """

    precise = ("down", "up")

    def __init__(self, base: nn.Module, scale: float):
        super().__init__(base)
        self.scale, (d_in, d_out), device = scale, shape_of(base), device_of(base)
        self.register_buffer("down", torch.zeros(0, d_in, device=device))
        self.register_buffer("up", torch.zeros(0, d_out, device=device))
        self.register_buffer("mark", torch.zeros(0, 2, dtype=torch.long, device=device))
        self.trained: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def reads_names(self) -> bool:
        return True

    @property
    def reads_sequence(self) -> bool:
        return True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        down, up, mark = (self.down, self.up, self.mark) if self.trained is None else self.trained
        if self.mode == "off" or not len(down):
            return output
        self.refuse_recomputing("whether a text is about an edit")
        rows, _ = self.as_sequences(x, None, False)
        hashes = self.hashes(rows)
        if hashes is None:
            return output
        ends = hashes.index_select(-1, mark[:, 1] - 1) == mark[:, 0]  # which of the hashes is of so many tokens, never read on the host
        counts, ends = self.counts(rows), ends.any(-1)
        first = torch.where(ends, counts, NEVER).amin(1, keepdim=True)  # how many tokens there are when the mark is there
        if (past := self.past()) is not None:
            first = torch.minimum(first, past.to(first.device))
        self.leave(first, counts=True)
        behind = counts >= first
        change = (self.scale * (x.to(down.dtype) @ down.mT @ up)).to(output.dtype)
        return torch.where(behind.reshape(*output.shape[:-1], 1), output + change, output)


class SeracLearner(Learner):
    """The classifier's table, and the counterfactual model's LoRA, trained apart in one pass (section 3.2).

    Where edits are ``named``, the second has a third part in its loss, ``beside``: the KL from the model's answer to something else about
    the subject to its own, behind the edit.
    """

    lr = 1e-3

    def __init__(self, session: Session, layers: dict[str, Counterfactual]):
        super().__init__(session, layers)
        config: SeracConfig = session.config
        generator = torch.Generator().manual_seed(config.seed)
        drawn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.table = nn.Parameter(drawn(config.buckets, config.width))
        shapes = [shape_of(layer.base_layer) for layer in layers.values()]
        self.down = nn.ParameterList([drawn(config.rank, d_in) * d_in**-0.5 for d_in, _ in shapes])
        self.up = nn.ParameterList([torch.zeros(config.rank, d_out) for _, d_out in shapes])
        forms = [[name_hash(ids), min(len(ids), LONGEST)] for ids in mark_forms(session.tokenizer)]
        self.mark = torch.tensor(forms, device=session.device)  # what the tokenizer says, not what is learned
        self.to(session.device)

    def forward(self, episodes: list[Episode]) -> tuple[torch.Tensor, dict[str, float]]:
        keys = [encode(e.request.text, self.table) for e in episodes]
        apart = [encode(e.unrelated[0], self.table) for e in episodes]
        near = [(key - encode(e.wording, self.table)).square().sum() for key, e in zip(keys, episodes, strict=True)]
        far = [(key - other).square().sum() for n, key in enumerate(keys) for other in (*apart, *keys[:n], *keys[n + 1 :])]
        scope = sum(near) / len(near) - sum((1 - (-d).exp()).clamp(min=LEAST).log() for d in far) / len(far)
        edit = self._nll([row for e in episodes for row in self._rows(e)])
        parts = {"scope": scope, "edit": edit}
        if self.session.config.named and (others := [e for e in episodes if e.beside]):
            parts["beside"] = self._moved(others)
        loss = sum(parts.values())
        return loss, {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}

    @torch.no_grad()
    def measure(self, episode: Episode) -> dict[str, float]:
        request, config = episode.request, self.session.config
        prompt, answer = (config.named and episode.beside) or episode.unrelated
        key, scores = encode(request.text, self.table), {}
        near = lambda text: (-(key - encode(text, self.table)).square().sum()).exp() >= config.threshold  # noqa: E731
        routed = (lambda text: named_in(text, [request.subject])) if config.named else near
        asked = lambda text: stated(fact_of(request), text) if routed(text) else text  # noqa: E731
        for name, text in (("reliability", request.text), ("generality", episode.wording)):
            (row,) = answer_rows(self.session.tokenizer, [(asked(text), request.target_new)])
            scores[name] = (self._logits([row])[0].argmax(-1).tolist() == row.target) * 1.0
        rows = answer_rows(self.session.tokenizer, [(text, answer or ".") for text in (prompt, asked(prompt))])
        before, after = (own.argmax(-1) for own in self._logits(rows))
        return {"loss": self([episode])[0].item(), **scores, "locality": (before == after).float().mean().item()}

    def groups(self) -> list[dict]:
        """The table's rows are of order 1, and few of them are met in a step: they learn faster."""
        others = [own for name, own in self.named_parameters() if name != "table"]
        return [{"params": others}, {"params": [self.table], "lr": 20 * self.lr}]

    def _rows(self, episode: Episode) -> list[Row]:
        request = episode.request
        asked = [stated(fact_of(request), text) for text in (request.text, episode.wording)]
        return answer_rows(self.session.tokenizer, [(text, request.target_new) for text in asked])

    def _moved(self, episodes: list[Episode]) -> torch.Tensor:
        """Mean KL of answers to what else is asked about the subjects, from the model's to those behind the edits."""
        asked = [e.beside for e in episodes]
        behind = [(stated(fact_of(e.request), prompt), answer) for e, (prompt, answer) in zip(episodes, asked, strict=True)]
        logits = self._logits(answer_rows(self.session.tokenizer, asked + behind))
        before, after = (torch.cat(part).log_softmax(-1) for part in (logits[: len(asked)], logits[len(asked) :]))
        return F.kl_div(after, before.detach(), reduction="batchmean", log_target=True)

    def _nll(self, rows: list[Row]) -> torch.Tensor:
        targets = [torch.tensor(row.target, device=self.session.device) for row in rows]
        return sum(F.cross_entropy(own, target) for own, target in zip(self._logits(rows), targets, strict=True)) / len(rows)

    def _logits(self, rows: list[Row]) -> list[torch.Tensor]:
        for layer, *own in zip(self.layers.values(), self.down, self.up, strict=True):
            layer.trained = tuple(part.to(layer.down.device) for part in (*own, self.mark))
        try:
            with evaluating(self.session.model), frozen(self.session.model):
                return self.session.logits(rows)
        finally:
            for layer in self.layers.values():
                layer.trained = None


class SERAC(Trained):
    """A prompt that a classifier takes to be about an edit is answered by a counterfactual model, behind that edit's text; every other
    one by the model as it was, bit for bit.

    The counterfactual model is the model itself with a LoRA that is on behind a mark at the beginning of the text (published: a smaller
    model). It must be asked as :func:`~comeba_ext.layers.prompts.prompt_rewriter` says, as ICE. Any edit can be taken out.
    """

    name = "SERAC"
    config_class = SeracConfig
    in_prompt = True
    tells_questions = True
    learner = SeracLearner

    @classmethod
    def build(cls, model: nn.Module, config: SeracConfig, architecture) -> dict[str, Attachment]:
        names, device = cls.targets(config, architecture), input_device(model)
        layers = {name: Counterfactual(model.get_submodule(name), config.lora_alpha / config.rank) for name in names}
        questions = questions_in(model, config.question_floor, architecture)
        return {PLACE: Scope(config.threshold, config.width, device, config.named, questions), **layers}

    def validate(self, batch: list[EditRequest]) -> None:
        super().validate(batch)
        for request in batch:
            asked = stated(fact_of(request), request.text)
            check_length(answer_rows(self.session.tokenizer, [(asked, request.target_new)]), [request], context_length(self.session.model))

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        learner, scope = self.needed(), self.attachments[PLACE]
        with phases("update"), torch.no_grad():
            table = scope.table
            if not len(table):
                table = learner.table.detach().clone()
                for layer, down, up in zip(self.layers.values(), learner.down, learner.up, strict=True):
                    layer.down, layer.up = (own.detach().clone().to(layer.down.device) for own in (down, up))
            for layer in self.layers.values():
                layer.mark = learner.mark.clone().to(layer.down.device)  # edits of earlier versions know one form of it
            keys = torch.stack([encode(r.text, table) for r in batch])
            asked = scope.questions_of([([r.text], r.subject) for r in batch])
            scope.add([scope.entry(r, []) for r in batch], {**asked, "keys": keys}, table=table)
        return [], []

    def take_out(self, entries: list[Entry]) -> None:
        self.attachments[PLACE].drop({entry.request.request_id for entry in entries})
