"""What an experiment can measure at a checkpoint beside reliability, generality and locality."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from comeba_ext.editor import Editor
from comeba_ext.evaluation import counterfact_scores, evaluate, fluency
from comeba_ext.evaluation.ability import Reading, harness, read_text
from comeba_ext.evaluation.queries import record_queries
from comeba_ext.evaluation.scopes import token_scores
from comeba_ext.evaluation.scoring import predict
from comeba_ext.text.encoding import encode, input_device, micro_batches, pad, pad_id
from comeba_ext.text.request import EditRequest

log = logging.getLogger(__name__)

FLUENCY_PROMPTS = 50
TEXT_TOKENS = 10_000  # of plain text at every checkpoint: a share of 0.005 is then known to 0.0007
NAMES = ("reliability", "generality", "locality")


def make(
    names: tuple[str, ...], texts: list[str], progress: bool = False, tasks: Tasks | None = None
) -> Callable[[Editor, list[EditRequest]], dict]:
    """A measure for :func:`run_protocol` that joins the named ones.

    Args:
        names: ``probabilities`` (CounterFact's scores and magnitudes), ``fluency``, ``text`` (perplexity of plain text
            before and after, share of next-token predictions on it that changed), ``scores`` (the highest scope score
            of every edited, rephrased and other prompt), ``conditions`` (behind other text, unpadded), ``abilities``
            (tasks of lm-evaluation-harness, before and after).
        texts: plain texts for ``text``, of which ``TEXT_TOKENS`` tokens are read; ``progress``: with a bar.
        tasks: for ``abilities``.

    Returns:
        a function of an editor and the requests edited so far; for one unedited model, whose own predictions it keeps. Where one of
        the measures fails, ``<name>_error`` says how, and the others are there.
    """
    known = {**_MEASURES, "text": _PlainText(texts, progress), "abilities": _Abilities(tasks or Tasks(()))}

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
        first = lambda own: next((n, v) for n, v in own.items() if isinstance(v, (int, float)) and "," in n and "stderr" not in n)  # noqa: E731
        return {task: (first(own)[0].partition(",")[0], first(own)[1]) for task, own in found.items()}


def _probabilities(editor: Editor, requests: list[EditRequest]) -> dict:
    return counterfact_scores(editor.model, editor.tokenizer, requests).to_dict(per_record=True)


def _fluency(editor: Editor, requests: list[EditRequest]) -> dict:
    prompts = [r.text for r in requests[:: max(1, len(requests) // FLUENCY_PROMPTS)]][:FLUENCY_PROMPTS]
    after = fluency(editor.model, editor.tokenizer, prompts)
    with editor.disabled():
        before = fluency(editor.model, editor.tokenizer, prompts)
    return {**after, **{f"{key}_before": value for key, value in before.items()}}


class _PlainText:
    """Perplexity of plain texts, and what became of the next-token predictions on them."""

    def __init__(self, texts: list[str], progress: bool = False):
        self.texts, self.progress = texts, progress
        self.unedited: dict[tuple[str, ...], Reading] = {}  # by texts, what the unedited model says

    def __call__(self, editor: Editor, requests: list[EditRequest]) -> dict:
        """Only texts that name no edited subject: what is said of those may change."""
        subjects = {request.subject for request in requests}
        chosen = tuple(text for text in self.texts if not any(subject in text for subject in subjects))
        if not chosen:
            return {}
        run = functools.partial(read_text, editor.model, editor.tokenizer, chosen, tokens=TEXT_TOKENS, progress=self.progress)
        after = run()
        if chosen not in self.unedited:
            with editor.disabled():
                self.unedited[chosen] = run()
        before = self.unedited[chosen]
        return {
            "texts": len(chosen),
            "text_tokens": len(after.next_tokens),
            "perplexity": after.perplexity,
            "perplexity_before": before.perplexity,
            "text_changed": (after.next_tokens != before.next_tokens).float().mean().item(),
        }


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


_MEASURES = {"probabilities": _probabilities, "fluency": _fluency, "scores": _scores, "conditions": _conditions}
