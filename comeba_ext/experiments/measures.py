"""What an experiment can measure at a checkpoint beside reliability, generality and locality."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError
from comeba_ext.evaluation import Writing, counterfact_scores, evaluate, fluency
from comeba_ext.evaluation.ability import UnrelatedText, harness
from comeba_ext.evaluation.queries import record_queries
from comeba_ext.evaluation.scopes import token_scores
from comeba_ext.evaluation.scoring import greedy, predict
from comeba_ext.forward.partial import evaluating
from comeba_ext.text.encoding import encode, input_device, micro_batches, pad, pad_id
from comeba_ext.text.request import SLOT, EditRequest

log = logging.getLogger(__name__)

FLUENCY_PROMPTS = 50
TIMED, TIMED_TOKENS = 7, 16  # prompts whose tokens are timed, and how many of each
OTHER_RECORDS = 100  # whose subjects are asked about other things
OTHER_QUESTIONS = (
    "The religion of {} is",
    "The headquarters of {} are in",
    "The twin city of {} is",
    "The year in which {} began is",
    "{} is famous for",
)
NAMES = ("reliability", "generality", "locality")


def make(
    names: tuple[str, ...], texts: list[str], progress: bool = False, tasks: Tasks | None = None
) -> Callable[[Editor, list[EditRequest]], dict]:
    """A measure for :func:`run_protocol` that joins the named ones.

    Args:
        names: ``probabilities`` (CounterFact's scores and magnitudes), ``fluency``, ``text`` (perplexity of plain text before and after,
            share of next-token predictions on it that changed: :class:`UnrelatedText`), ``other_facts`` (what is written to other
            questions about the edited subjects), ``costs`` (time of a token, bytes of the edits), ``scores`` (the highest scope score
            of every edited, rephrased and other prompt), ``conditions`` (behind other text, unpadded), ``abilities`` (tasks of
            lm-evaluation-harness, before and after).
        texts: plain texts for ``text``; ``progress``: with a bar.
        tasks: for ``abilities``.

    Returns:
        a function of an editor and the requests edited so far; for one unedited model, whose own predictions it keeps. Where one of
        the measures fails, ``<name>_error`` says how, and the others are there.
    """
    read = UnrelatedText(texts, progress=progress)
    text = lambda editor, requests: read(editor.model, editor.tokenizer, requests)  # noqa: E731
    known = {**_MEASURES, "text": text, "abilities": _Abilities(tasks or Tasks(()))}

    def measure(editor: Editor, requests: list[EditRequest]) -> dict:
        found: dict = {}
        for name in names:
            try:
                found |= known[name](editor, requests)
            except Exception as error:  # hours of editing, and what the other measures found, are not to be lost to it
                log.warning("the measure %r failed: %s", name, error)
                found[f"{name}_error"] = f"{type(error).__name__}: {error}"
        return found

    return measure


@dataclass(frozen=True)
class Tasks:
    """Of lm-evaluation-harness: names, a folder of task files of one's own, and how many examples of each at most."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None


def _costs(editor: Editor, requests: list[EditRequest]) -> dict:
    """What the edits cost whoever uses the model: ``prompt_seconds`` and ``prompt_seconds_before``, medians over prompts of the time to
    the first token, with the edits and without by turns; ``token_seconds`` and ``token_seconds_before``, of every further token;
    ``prompt_slowdown`` and ``token_slowdown``, the ratios; and ``edits_bytes``, what is stored of the edits for inference alone."""
    first: dict[bool, list[float]] = {True: [], False: []}
    further: dict[bool, list[float]] = {True: [], False: []}
    for request in requests[:: max(1, len(requests) // TIMED)][:TIMED]:
        ids = torch.tensor([editor.tokenizer(request.text)["input_ids"]], device=input_device(editor.model))
        for edited in first:
            with contextlib.nullcontext() if edited else editor.disabled():
                whole = _seconds(editor, ids, TIMED_TOKENS + 1)
                first[edited].append(_seconds(editor, ids, 1))
                further[edited].append((whole - first[edited][-1]) / TIMED_TOKENS)
    found = {}
    for name, seconds in (("prompt", first), ("token", further)):
        after, before = (statistics.median(own) for own in seconds.values())
        found |= {f"{name}_seconds": after, f"{name}_seconds_before": before, f"{name}_slowdown": after / before}
    with tempfile.TemporaryDirectory() as folder:
        editor.save_pretrained(Path(folder) / "edits", inference_only=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {**found, "edits_bytes": size}


def _seconds(editor: Editor, ids: torch.Tensor, tokens: int) -> float:
    model = editor.model
    with evaluating(model), torch.no_grad(), greedy(model, pad_id(editor.tokenizer)):
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens)
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _other_facts(editor: Editor, requests: list[EditRequest]) -> dict:
    """What is written to questions about the edited subjects that no edit is about: ``other_facts``, the share of answers that are the
    unedited model's, and ``other_facts_hallucination``, the share in which the new object stands only since the edits; means over
    records, of ``OTHER_RECORDS`` at most, with their intervals. Questions that share a word with the edit's own are not asked."""
    chosen = requests[:: max(1, -(-len(requests) // OTHER_RECORDS))]
    asked = [
        dataclasses.replace(r, locality_prompts=tuple(questions_beside(r)), rephrase_prompts=(), portability_prompts=(), questions=())
        for r in chosen
    ]
    asked = [request for request in asked if request.locality_prompts]
    if not asked:
        raise ComebaError("every question about the subjects shares a word with the edit's own")
    found = evaluate(editor.model, editor.tokenizer, asked, generate=False, writing=Writing())
    names = {"other_facts": "locality_written", "other_facts_hallucination": "hallucination"}
    return {f"{own}{end}": found[f"{name}{end}"] for own, name in names.items() for end in ("", "_interval")} | {
        "other_facts_records": len(asked)
    }


def questions_beside(request: EditRequest) -> list[tuple[str, None]]:
    """Locality prompts about a request's own subject, without those that share a word of four letters with its prompt."""
    words = lambda text: set(re.findall(r"\w{4,}", text.replace(SLOT, "").lower()))  # noqa: E731
    return [(text.replace(SLOT, request.subject), None) for text in OTHER_QUESTIONS if not words(text) & words(request.prompt)]


class _Abilities:
    """What the model can do beside its edits, and could before."""

    def __init__(self, tasks: Tasks):
        self.tasks = tasks
        self.unedited: dict[str, tuple[str, float]] | None = None

    def __call__(self, editor: Editor, requests: list[EditRequest]) -> dict:
        after = self._run(editor)
        if self.unedited is None:
            with editor.disabled():
                self.unedited = self._run(editor)
        return {
            "abilities": {
                task: {"metric": metric, "edited": value, "unedited": self.unedited[task][1]} for task, (metric, value) in after.items()
            }
        }

    def _run(self, editor: Editor) -> dict[str, tuple[str, float]]:
        """Every task's first metric."""
        with contextlib.redirect_stdout(sys.stderr):  # the harness writes to it
            found = harness(editor.model, editor.tokenizer, list(self.tasks.names), self.tasks.folder, limit=self.tasks.limit)
        numbers = lambda own: [(n, v) for n, v in own.items() if isinstance(v, (int, float)) and "," in n and "stderr" not in n]  # noqa: E731
        first = {task: numbers(own)[0] for task, own in found.items() if numbers(own)}  # a group of tasks may have none of its own
        return {task: (name.partition(",")[0], value) for task, (name, value) in first.items()}


def _probabilities(editor: Editor, requests: list[EditRequest]) -> dict:
    return counterfact_scores(editor.model, editor.tokenizer, requests).to_dict(per_record=True)


def _fluency(editor: Editor, requests: list[EditRequest]) -> dict:
    prompts = [r.text for r in requests[:: max(1, len(requests) // FLUENCY_PROMPTS)]][:FLUENCY_PROMPTS]
    after = fluency(editor.model, editor.tokenizer, prompts)
    with editor.disabled():
        before = fluency(editor.model, editor.tokenizer, prompts)
    return {**after, **{f"{key}_before": value for key, value in before.items()}}


@torch.no_grad()
def _scores(editor: Editor, requests: list[EditRequest]) -> dict:
    """Per layer and kind the highest score over every prompt's tokens, rounded; the thresholds; and how often they are reached."""
    prompts = {
        "edited": [r.text for r in requests],
        "rephrased": [p for r in requests for p in r.rephrase_prompts],
        "other": list(dict.fromkeys(p for r in requests for p, _ in r.locality_prompts)),
    }
    found = {kind: {name: [0.0] * len(own) for name in editor.layers} for kind, own in prompts.items()}
    inside = dict.fromkeys(prompts, 0)
    device = input_device(editor.model)
    for kind, own in prompts.items():
        rows = [encode(editor.tokenizer, p.rstrip()).ids for p in own]
        for group in micro_batches([len(row) for row in rows], editor.max_tokens):
            ids, mask = pad([rows[i] for i in group], pad_id(editor.tokenizer), device=device)
            for name, read in token_scores(editor.model, ids, mask).items():
                inside[kind] += int(read.in_scope.any(-1).sum())
                for place, score in zip(group, read.scores.amax(-1).tolist(), strict=True):
                    found[kind][name][place] = float(f"{score:.5g}")
    reached = {kind: count / max(1, len(prompts[kind]) * len(editor.layers)) for kind, count in inside.items()}
    return {
        "peak_scores": found,
        "told_apart": told_apart(found),
        "alpha": {name: layer.alpha.item() for name, layer in editor.layers.items()},
        **{f"in_scope_{kind}": share for kind, share in reached.items()},
    }


def told_apart(peaks: dict[str, dict[str, list[float]]]) -> float | None:
    """The chance that an edited prompt scores above another fact's, in the layer that does best; 0.5: not told apart.

    Args:
        peaks: by kind of prompt and layer, every prompt's highest score.
    """
    from scipy.stats import mannwhitneyu  # a second to load

    edited, other = peaks["edited"], peaks["other"]
    pairs = [(own, other[name]) for name, own in edited.items() if own and other[name]]
    return max((float(mannwhitneyu(own, against).statistic) / (len(own) * len(against)) for own, against in pairs), default=None)


def _conditions(editor: Editor, requests: list[EditRequest]) -> dict:
    """The same questions behind other text, by prompt length, and each alone in its batch.

    ``<name>_behind_text``: every prompt follows the record's own first locality prompt and answer. ``<name>_short`` and
    ``<name>_long``: the half of the records with the fewer and the more prompt tokens. ``padding_agreement``: share of
    prompts whose teacher-forced prediction is the same unpadded and in padded batches.
    """
    model, tokenizer = editor.model, editor.tokenizer
    found: dict = {}
    behind = [_behind(r) for r in requests if r.locality_prompts]
    if behind:
        metrics = evaluate(model, tokenizer, behind, generate=False)
        for name in NAMES:
            found[f"{name}_behind_text"], found[f"{name}_behind_text_interval"] = metrics[name], metrics[f"{name}_interval"]
    ordered = sorted(requests, key=lambda r: len(tokenizer(r.text)["input_ids"]))
    for kind, own in (("short", ordered[: len(ordered) // 2]), ("long", ordered[len(ordered) // 2 :])):
        if own:
            metrics = evaluate(model, tokenizer, own, generate=False)
            for name in NAMES:
                found[f"{name}_{kind}"], found[f"{name}_{kind}_interval"] = metrics[name], metrics[f"{name}_interval"]
    queries = [q for n, r in enumerate(requests) for own in record_queries(tokenizer, r, n).values() for q in own]
    padded, alone = (
        predict(model, queries, pad_token=pad_id(tokenizer), max_tokens=budget, generate=False) for budget in (editor.max_tokens, 1)
    )
    found["padding_agreement"] = sum(padded[q] == alone[q] for q in padded) / len(padded)
    return found


def _behind(request: EditRequest) -> EditRequest:
    prompt, answer = request.locality_prompts[0]
    text = f"{prompt.rstrip()} {answer}. " if answer else f"{prompt.rstrip()} "
    return dataclasses.replace(
        request,
        prompt=text.replace("{", "(").replace("}", ")") + request.prompt,
        rephrase_prompts=tuple(text + p for p in request.rephrase_prompts),
        locality_prompts=tuple((text + p, a) for p, a in request.locality_prompts[1:]),
        portability_prompts=(),
    )


_MEASURES = {
    "probabilities": _probabilities,
    "fluency": _fluency,
    "scores": _scores,
    "conditions": _conditions,
    "costs": _costs,
    "other_facts": _other_facts,
}
