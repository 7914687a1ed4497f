"""What a model wrote to the prompts of some records, and its scores (:mod:`comeba_ext.evaluation.written`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from comeba_ext.errors import RequestError
from comeba_ext.evaluation.judge import Answer, Judge
from comeba_ext.evaluation.queries import METRICS, Asked, record_prompts
from comeba_ext.evaluation.written import Writing, is_contained, is_same, is_written, likeness
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
        judged: verdicts on what was written, if any were asked for; all_judged: the judge was asked about all of it. Else there is no score
            of them: what needs no asking, right answers word for word among it, says nothing about the others.
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
        self.fits = functools.cache(functools.partial(writing.fits, tokenizer))  # whether one of these names can be written
        asked = {ids for own in self.ids for name in METRICS for ids in own[name]}
        self.total = len(asked | set(self.of_probe.values()))
        self.found: dict[str, Mapping[tuple[int, ...], str]] = {}
        self.before: Mapping[tuple[int, ...], str] = {}
        self.judged: dict[Answer, bool | None] | None = None
        self.all_judged = False
        self.likeness = likeness() if writing.long else None

    def check(self, unedited: Mapping[tuple[int, ...], str]) -> None:
        """Raises a RequestError unless it is known what the unedited model wrote to every condition of the questions."""
        if any(ids not in unedited for ids in self.conditions.values()):
            raise RequestError("the base predictions were made without these records' questions; call predict_base with these records")

    def ask(self, model: torch.nn.Module, unedited: Mapping[tuple[int, ...], str] | None, *, max_tokens: int, bar=None) -> None:
        """Let the model write; ``unedited``: what it wrote to these prompts and questions' conditions before, or ``None`` if it is
        unedited."""
        # Locality in batches of its own, as the unedited model's were: rounding cannot make a difference between equal models.
        pools = {"locality": [ids for own in self.ids for ids in own["locality"]]}
        pools["other"] = [ids for own in self.ids for name in METRICS if name != "locality" for ids in own[name]]
        pools["other"] += self.of_probe.values()
        if unedited is None:
            pools["conditions"] = list(self.conditions.values())
        for name, pool in pools.items():
            self.found[name] = self.writing.answers(model, self.tokenizer, pool, max_tokens=max_tokens, bar=bar)
        self.before = (
            {k: v for name in ("other", "locality", "conditions") for k, v in self.found[name].items()} if unedited is None else unedited
        )

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
                self.all_judged = True
            finally:
                self.judged |= judge.known(asked)

    def _judgeable(self, record: int, name: str) -> list[Answer]:
        pairs = zip(self.prompts[record][name], self._answers(record, name), strict=True)
        return [Answer(own.prompt, _names(own), text) for own, text in pairs]

    def _answers(self, record: int, name: str) -> list[str]:
        found = self.found["locality" if name == "locality" else "other"]
        return [found[ids] for ids in self.ids[record][name]]

    def _before(self, record: int, name: str = "locality") -> list[str | None]:
        """What the unedited model wrote, if it was asked: locality's prompts, and the edited ones (by versions before not)."""
        return [self.before.get(ids) for ids in self.plain[record][name]]

    def _right(self, record: int, name: str, suffix: str) -> list[bool | None]:
        """Of every prompt but locality's, whether it is answered; ``None`` where no right answer could be written."""
        rule, pairs = _RULES[suffix], zip(self._answers(record, name), map(_names, self.prompts[record][name]), strict=True)
        return [rule(answer, names) if self.fits(names) else None for answer, names in pairs]

    def _same(self, record: int) -> list[bool]:
        return [is_same(a, b) for a, b in zip(self._answers(record, "locality"), self._before(record), strict=True)]

    def scores(self, record: int) -> dict[str, float | None]:
        """``<name>_written`` of every metric (with ``long`` ``<name>_similarity`` too), ``<name>_contained`` of all but locality, which
        is about equal answers, and ``hallucination``: how often the new object, if it can be written, stands in an answer about
        something else only since the edits."""
        found: dict[str, float | None] = {}
        for name in METRICS:
            answers = self._answers(record, name)
            if name == "locality":
                found["locality_written"] = mean(self._same(record))
                if self.likeness is not None:
                    found["locality_similarity"] = mean(list(map(self.likeness, answers, self._before(record))))
                own = _names(self.prompts[record]["reliability"][0])
                new = [[is_contained(text, own) for text in pair] for pair in zip(answers, self._before(record), strict=True)]
                found["hallucination"] = mean([after and not before for after, before in new]) if self.fits(own) else None
                continue
            for suffix in _RULES:
                found[name + suffix] = mean(self._right(record, name, suffix))
            if self.likeness is not None:
                likest = lambda answer, own: max(self.likeness(answer, target) for target in _names(own))  # noqa: E731
                found[name + "_similarity"] = mean(list(map(likest, answers, self.prompts[record][name])))
            if self.all_judged:
                found[name + "_judged"] = mean([self.judged[answer] for answer in self._judgeable(record, name)])
        return found

    def verdicts(self, record: int) -> list[dict]:
        """Of every question: its ``criterion``, whether it is ``counted`` (the unedited model answers its conditions, and the right answers
        can be written), whether it is answered, ``written`` or ``contained``, the ``answers`` to its prompts, and its ``case``, if it has
        one."""
        found = []
        for question in self.questions[record]:
            answers = [self.found["other"][self.of_probe[probe.prompt]] for probe in question.probes]
            known = [own.answered(self.before[self.conditions[own.prompt]], is_contained, is_contained) for own in question.conditions]
            fits = [all(self.fits(names) for names in (probe.answers, *probe.also)) for probe in question.probes]
            verdict = {"criterion": question.criterion, "counted": all(known) and (all(fits) if question.every else any(fits))}
            asked = list(zip(question.probes, answers, strict=True))
            for suffix, right in _RULES.items():
                each = [probe.answered(answer, right, is_contained) for probe, answer in asked]
                verdict[suffix.removeprefix("_")] = all(each) if question.every else any(each)
            verdict["answers"] = [
                {"prompt": p.prompt, "wanted": "; ".join(own[0] for own in (p.answers, *p.also)), "written": text} for p, text in asked
            ]
            found.append(verdict | ({} if question.case is None else {"case": question.case}))
        return found

    def texts(self, record: int) -> list[dict[str, str]]:
        """Of every prompt, metric by metric: what was ``written``, what was ``unedited_written`` before, where that is known, whether it is
        ``right`` (for locality: the same; ``None`` where no right answer could be written), and whether it is ``judged`` so."""
        found = []
        for name in METRICS:
            right = self._same(record) if name == "locality" else self._right(record, name, "_written")
            own = [{"written": answer, "right": one} for answer, one in zip(self._answers(record, name), right, strict=True)]
            own = [
                one if old is None else one | {"unedited_written": old} for one, old in zip(own, self._before(record, name), strict=True)
            ]
            if name != "locality" and self.judged is not None:
                own = [one | {"judged": self.judged[answer]} for one, answer in zip(own, self._judgeable(record, name), strict=True)]
            found += own
        return found


def _names(own: Asked) -> tuple[str, ...]:
    """What a prompt may be answered."""
    return own.answer, *own.aliases


def conditions_of(tokenizer, requests: list[EditRequest], writing: Writing) -> dict[str, tuple[int, ...]]:
    """What the unedited model is asked before questions count: prompts, and their tokens."""
    probes = (probe for request in requests for question in request.questions for probe in question.conditions)
    return {probe.prompt: writing.ids(tokenizer, probe.prompt) for probe in probes}


def mean(values: list) -> float | None:
    """Of those that are there; of truth values, the share of true ones."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None
