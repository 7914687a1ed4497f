"""What a model wrote to the prompts of some records, and its scores (:mod:`comeba_ext.evaluation.written`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from comeba_ext.errors import RequestError
from comeba_ext.evaluation.judge import Answer, Judge
from comeba_ext.evaluation.queries import METRICS, record_prompts
from comeba_ext.evaluation.written import Writing, is_contained, is_written, likeness, normalised
from comeba_ext.text.request import EditRequest

_RULES = {"_written": is_written, "_contained": is_contained}


class WrittenAnswers:
    """Of every prompt of some records, and of their questions.

    Args:
        requests: the records.
        writing: how the model is let write.
        rewrite: how it is to be asked (:func:`~comeba_ext.layers.prompts.prompt_rewriter`).

    Attributes:
        total: how many prompts are asked.
        judged: verdicts on what was written, if any were asked for.
    """

    def __init__(self, tokenizer, requests: list[EditRequest], writing: Writing, rewrite: Callable[[str], str] | None = None):
        self.tokenizer, self.writing = tokenizer, writing
        self.prompts = [record_prompts(request) for request in requests]
        ids = lambda how: [  # noqa: E731
            {name: [writing.ids(tokenizer, how(own.prompt)) for own in prompts[name]] for name in METRICS} for prompts in self.prompts
        ]
        self.plain = ids(lambda prompt: prompt)
        self.ids = self.plain if rewrite is None else ids(rewrite)
        how = rewrite or (lambda prompt: prompt)
        self.questions = [request.questions for request in requests]
        self.of_probe = {
            probe.prompt: writing.ids(tokenizer, how(probe.prompt))
            for own in self.questions
            for question in own
            for probe in question.probes
        }
        self.conditions = conditions_of(tokenizer, requests, writing)
        asked = {ids for own in self.ids for name in METRICS for ids in own[name]}
        self.total = len(asked | set(self.of_probe.values()))
        self.found: dict[str, Mapping[tuple[int, ...], str]] = {}
        self.before: Mapping[tuple[int, ...], str] = {}
        self.judged: dict[Answer, bool | None] | None = None
        self.likeness = likeness() if writing.long else None

    def check(self, unedited: Mapping[tuple[int, ...], str]) -> None:
        """Raises a RequestError unless it is known what the unedited model wrote to every condition of the questions."""
        if any(ids not in unedited for ids in self.conditions.values()):
            raise RequestError("the base predictions were made without these records' questions; call predict_base with these records")

    def ask(self, model: torch.nn.Module, unedited: Mapping[tuple[int, ...], str] | None, *, max_tokens: int, bar=None) -> None:
        """Let the model write; ``unedited``: what it wrote to the locality prompts and questions' conditions before, or ``None`` if it
        is unedited."""
        # Locality in batches of its own, as the unedited model's were: rounding cannot make a difference between equal models.
        pools = {"locality": [ids for own in self.ids for ids in own["locality"]]}
        pools["other"] = [ids for own in self.ids for name in METRICS if name != "locality" for ids in own[name]]
        pools["other"] += self.of_probe.values()
        if unedited is None:
            pools["conditions"] = list(self.conditions.values())
        for name, pool in pools.items():
            self.found[name] = self.writing.answers(model, self.tokenizer, pool, max_tokens=max_tokens, bar=bar)
        self.before = {**self.found["locality"], **self.found["conditions"]} if unedited is None else unedited

    def ask_judge(self, judge: Judge, progress: bool = False) -> None:
        """Have a judge say which answers are right; what it had not said when it failed stays unjudged.

        Raises:
            ComebaError: it cannot be reached or refuses.
        """
        names = [name for name in METRICS if name != "locality"]
        asked = [answer for record in range(len(self.prompts)) for name in names for answer in self._judgeable(record, name)]
        self.judged = dict.fromkeys(asked)
        with tqdm(total=len(self.judged), disable=not progress, unit="answer", desc="judge") as bar:
            try:
                self.judged |= judge.verdicts(asked, bar)
            finally:
                self.judged |= judge.known(asked)

    def _judgeable(self, record: int, name: str) -> list[Answer]:
        pairs = zip(self.prompts[record][name], self._answers(record, name), strict=True)
        return [Answer(own.prompt, (own.answer, *own.aliases), text) for own, text in pairs]

    def _answers(self, record: int, name: str) -> list[str]:
        found = self.found["locality" if name == "locality" else "other"]
        return [found[ids] for ids in self.ids[record][name]]

    def _before(self, record: int) -> list[str]:
        return [self.before[ids] for ids in self.plain[record]["locality"]]

    def scores(self, record: int) -> dict[str, float | None]:
        """``<name>_written`` of every metric (with ``long`` ``<name>_similarity`` too), ``<name>_contained`` of all but locality, which
        is about equal answers, and ``hallucination``: how often the new object stands in an answer about something else only since
        the edits."""
        found: dict[str, float | None] = {}
        for name in METRICS:
            answers = self._answers(record, name)
            if name == "locality":
                same = [normalised(a) == normalised(b) for a, b in zip(answers, self._before(record), strict=True)]
                found["locality_written"] = mean([float(own) for own in same])
                if self.likeness is not None:
                    found["locality_similarity"] = mean(list(map(self.likeness, answers, self._before(record))))
                own = self.prompts[record]["reliability"][0]
                new = [[is_contained(text, (own.answer, *own.aliases)) for text in pair] for pair in zip(answers, self._before(record))]
                found["hallucination"] = mean([float(after and not before) for after, before in new])
                continue
            for suffix, right in _RULES.items():
                asked = zip(answers, self.prompts[record][name], strict=True)
                found[name + suffix] = mean([float(right(answer, (own.answer, *own.aliases))) for answer, own in asked])
            if self.likeness is not None:
                likest = lambda answer, own: max(self.likeness(answer, target) for target in (own.answer, *own.aliases))  # noqa: E731
                found[name + "_similarity"] = mean(list(map(likest, answers, self.prompts[record][name])))
            if self.judged is not None:
                found[name + "_judged"] = mean([self.judged[answer] for answer in self._judgeable(record, name)])
        return found

    def verdicts(self, record: int) -> list[dict]:
        """Of every question: its ``criterion``, whether it is ``counted`` (the unedited model answers its conditions), whether it is
        answered, ``written`` or ``contained``, and the ``answers`` to its prompts."""
        found = []
        for question in self.questions[record]:
            answers = [self.found["other"][self.of_probe[probe.prompt]] for probe in question.probes]
            known = [is_contained(self.before[self.conditions[own.prompt]], own.answers) for own in question.conditions]
            verdict = {"criterion": question.criterion, "counted": all(known)}
            for suffix, right in _RULES.items():
                each = [right(answer, probe.answers) for answer, probe in zip(answers, question.probes, strict=True)]
                verdict[suffix.removeprefix("_")] = all(each) if question.every else any(each)
            asked = zip(question.probes, answers, strict=True)
            found.append(verdict | {"answers": [{"prompt": p.prompt, "wanted": p.answers[0], "written": text} for p, text in asked]})
        return found

    def texts(self, record: int) -> list[dict[str, str]]:
        """Of every prompt, metric by metric: what was ``written``, for locality what was ``unedited_written``, and of others whether it
        is ``judged`` right."""
        found = []
        for name in METRICS:
            own = [{"written": answer} for answer in self._answers(record, name)]
            if name == "locality":
                own = [one | {"unedited_written": before} for one, before in zip(own, self._before(record), strict=True)]
            elif self.judged is not None:
                own = [one | {"judged": self.judged[answer]} for one, answer in zip(own, self._judgeable(record, name), strict=True)]
            found += own
        return found


def conditions_of(tokenizer, requests: list[EditRequest], writing: Writing) -> dict[str, tuple[int, ...]]:
    """What the unedited model is asked before questions count: prompts, and their tokens."""
    probes = (probe for request in requests for question in request.questions for probe in question.conditions)
    return {probe.prompt: writing.ids(tokenizer, probe.prompt) for probe in probes}


def mean(values: list) -> float | None:
    """Of those that are there."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
