"""Reliability, generality, locality and portability of the edits in a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.evaluation.answers import WrittenAnswers, mean
from comeba_ext.evaluation.base import BasePredictions, has_edits, predict_base
from comeba_ext.evaluation.judge import Judge
from comeba_ext.evaluation.queries import METRICS, check_context, question_queries, record_queries
from comeba_ext.evaluation.scoring import Prediction, predict
from comeba_ext.evaluation.ways import FORCED, WAYS, WRITTEN
from comeba_ext.evaluation.written import Writing, likeness
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.text.encoding import pad_id
from comeba_ext.text.request import as_requests

SCORES = (*(name + suffix for name in METRICS for suffix in WAYS), "hallucination")  # of a record


class Metrics(dict):
    """What :func:`evaluate` returns: a JSON-serialisable dict whose entries are also attributes."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no metric {name!r}; there are {list(self)}") from None

    def to_dict(self, per_record: bool = False) -> dict:
        """A plain dict, without ``per_record`` unless asked for."""
        return {key: value for key, value in self.items() if per_record or key != "per_record"}


def evaluate(
    model: torch.nn.Module,
    tokenizer,
    records,
    base: torch.nn.Module | BasePredictions | None = None,
    *,
    max_tokens: int = 4096,
    generate: bool = True,
    writing: Writing | None = None,
    judge: Judge | None = None,
    progress: bool = False,
    seed: int = 0,
) -> Metrics:
    """Score a model on edit records.

    Reliability asks every prompt for ``target_new``, generality every rephrase prompt, portability every portability
    prompt for its own answer, and locality compares every locality prompt with the unedited model's prediction, not
    with the answer in the record (that only says how many tokens are compared: one when there is none).

    Each of the four has three scores. ``<name>`` is EasyEdit's (``compute_edit_quality``): teacher-forced, the share
    of target tokens that are the argmax. ``<name>_exact`` counts a prompt only if all of them are. Both know the
    target while they score, so ``<name>_generation`` counts a prompt only if greedy generation from the prompt alone
    writes exactly the target (locality: exactly what the unedited model writes). Each is averaged over the prompts of
    a record, then over the records that have such prompts.

    With ``writing`` the model also writes to a natural end behind the prompt alone, in its chat template if that is asked for, and
    ``<name>_written`` counts a prompt if the answer is the target or one of its aliases, or opens with it (locality: if
    it is what the unedited model writes), ``<name>_contained`` if one of them stands in it (:mod:`comeba_ext.evaluation.written`).
    ``hallucination`` is the share of locality prompts in whose answers the new object stands only since the edits.
    It is asked the records' ``questions`` as well (:mod:`comeba_ext.text.questions`).

    Args:
        model: causal language model; left as it was, training flags and generation config included.
        tokenizer: its tokenizer.
        records: anything :func:`as_requests` accepts.
        base: the unedited model, for locality. ``None``: ``model`` with its hooked layers switched off, or PEFT's adapters
            where it has none (a model without either is its own base, locality 1). A module: that model, same
            tokenizer, likewise switched off. :class:`BasePredictions`: what :func:`predict_base` computed before.
        max_tokens: padded tokens in one forward pass; bounds the memory of the logits.
        generate: compute ``<name>_generation``; otherwise these are ``None``.
        writing: compute ``<name>_written`` and ``<name>_contained``, so; otherwise there are none.
        judge: asked about what was written, for ``<name>_judged``; needs ``writing``. One that cannot be reached or refuses costs
            nothing else: there is no ``<name>_judged``, and ``judge_error`` says why.
        progress: show a progress bar.
        seed: of the bootstrap; the global generators are not touched.

    Returns:
        :class:`Metrics` with, for each name: ``<name>``, ``<name>_exact``, ``<name>_generation`` (floats in [0, 1]),
        each with ``…_interval``, ``[low, high]`` from :func:`bootstrap_interval` over the records, and
        ``<name>_prompts``, how many prompts were scored; with ``writing`` ``<name>_unwritable``, to how many of them no right answer could
        be written (:meth:`Writing.fits`), which are left out of ``<name>_written`` and ``<name>_contained``. A score without prompts is
        ``None``, and so is its interval. ``records`` is their number. With ``writing``, where records have questions, ``questions`` has
        for each criterion how many there are, how many are ``counted``, and the shares ``written`` and ``contained`` with their
        intervals. With ``judge``, ``judge`` says how many ``answers`` there were, and of the judge so far, how many
        verdicts it gave when ``asked`` (what is right word for word or was judged before needs no asking) and how many answers are
        ``without_verdict``.

        ``per_record`` lists, record by record, ``request_id``, ``prompt`` (with its slot), ``subject``, ``target_new``, the
        record's scores, ``predicted`` (text of the teacher-forced argmax) and ``generated`` (greedy text or ``None``), the last
        two for the record's own prompt, and ``answers``: the same for every prompt asked, with its ``metric``, ``wanted`` text (for
        locality the unedited model's, and what that generates as ``unedited``), ``score`` and ``tokens``, the prompt's length; with
        ``writing`` what was ``written``, the ``unedited_written`` before it and whether it is ``right``, and the verdicts on its
        ``questions``.

    Raises:
        ConfigError: there is a judge, and nothing is written for it.
        ComebaError: the likeness of long answers is asked for, and ``rouge_score`` is not installed; nothing was run.
        RequestError: a record cannot be used, a text is longer than the model's context, or the base predictions do
            not fit the records, or the model has adapters that cannot be switched off and no base is given; nothing was run.
    """
    requests = as_requests(records)
    if judge is not None and writing is None:
        raise ConfigError("a judge reads what the model writes: give writing=Writing() too")
    if writing is not None and writing.long:
        likeness()  # what it needs may not be installed
    queries = [record_queries(tokenizer, request, index) for index, request in enumerate(requests)]
    rewrite = prompt_rewriter(model)  # of in-context methods; base predictions are of the prompts as they are
    asked = queries if rewrite is None else [record_queries(tokenizer, r, n, rewrite) for n, r in enumerate(requests)]
    for index, (request, own) in enumerate(zip(requests, asked)):
        further = question_queries(tokenizer, request, rewrite) if writing is not None else []
        check_context(model, [query for name in METRICS for query in own[name]] + further, index, request)
    if isinstance(base, BasePredictions):
        base.check([own["locality"] for own in queries], requests, generate, writing)
    elif base is not None or has_edits(model):
        base = predict_base(
            model if base is None else base,
            tokenizer,
            requests,
            max_tokens=max_tokens,
            generate=generate,
            writing=writing,
            progress=progress,
        )

    written = None if writing is None else WrittenAnswers(tokenizer, requests, writing, rewrite)
    if written is not None and base is not None:
        written.check(base.answers)

    # Locality is run on its own, as predict_base does: with the same batches, rounding cannot make a difference
    # between two equal models.
    pools = [
        dict.fromkeys(query for own in asked for name in METRICS if name != "locality" for query in own[name]),
        dict.fromkeys(query for own in asked for query in own["locality"]),
    ]
    total = sum(map(len, pools)) * (1 + generate) + (0 if written is None else written.total)
    with tqdm(total=total, disable=not progress, desc="evaluate") as bar:
        run = lambda pool: predict(  # noqa: E731
            model, pool, pad_token=pad_id(tokenizer), max_tokens=max_tokens, generate=generate, bar=bar
        )
        edited, local = map(run, pools)
        if written is not None:
            written.ask(model, None if base is None else base.answers, max_tokens=max_tokens, bar=bar)
        judge_error = None
        if written is not None and judge is not None:
            try:
                written.ask_judge(judge, progress)
            except ComebaError as error:  # everything else is there
                judge_error = str(error)
    unedited = local if base is None else base.predictions  # without a base there is nothing that rewrites

    rows = []
    for n, (request, own, put) in enumerate(zip(requests, queries, asked)):
        row = {field: getattr(request, field) for field in ("request_id", "prompt", "subject", "target_new")}
        answers = []
        for name in METRICS:
            found = local if name == "locality" else edited
            if name == "locality":
                wanted = [(unedited[q].forced, unedited[q].generated) for q in own[name]]
            else:
                wanted = [(q.target_ids,) * 2 for q in put[name]]
            answered = [found[q] for q in put[name]]
            scores = [_score(answer, *pair) for answer, pair in zip(answered, wanted, strict=True)]
            for place, suffix in enumerate(FORCED):
                row[name + suffix] = mean([score[place] for score in scores])
            answers += [
                {
                    "metric": name,
                    "prompt": _text(tokenizer, q.prompt_ids),
                    "wanted": _text(tokenizer, pair[0]),
                    **({"unedited": _text(tokenizer, pair[1])} if name == "locality" else {}),
                    "predicted": _text(tokenizer, answer.forced),
                    "generated": _text(tokenizer, answer.generated),
                    "score": score[0],
                    "tokens": len(q.prompt_ids),
                }
                for q, pair, score, answer in zip(own[name], wanted, scores, answered, strict=True)
            ]
        answer = edited[put["reliability"][0]]
        row["predicted"] = _text(tokenizer, answer.forced)
        row["generated"] = _text(tokenizer, answer.generated)
        row["answers"] = answers
        if written is not None:
            row |= written.scores(n)
            row["answers"] = [answer | texts for answer, texts in zip(answers, written.texts(n), strict=True)]
            if request.questions:
                row["questions"] = written.verdicts(n)
        rows.append(row)
    metrics = summarise(rows, seed)
    if judge is not None:
        metrics["judge"] = {"answers": len(written.judged or ()), "asked": judge.asked, "without_verdict": judge.nothing}
    if judge_error is not None:
        metrics["judge_error"] = judge_error
    return metrics


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 1000, level: float = 0.95) -> list[float] | None:
    """Percentile bootstrap interval of the mean.

    Args:
        values: one number a record; ``None`` entries are left out.
        seed: of a generator of its own.
        resamples: how often the values are drawn anew, with replacement.
        level: share of the resampled means inside the interval.

    Returns:
        ``[low, high]``, or ``None`` when there is no value.
    """
    sample = np.array([value for value in values if value is not None], dtype=float)
    if not sample.size:
        return None
    if sample.size == 1:
        return [float(sample[0])] * 2
    from scipy import stats  # a second to load, for those who ask for intervals

    batch = max(1, 1_000_000 // sample.size)  # memory does not grow with resamples × records
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        batch=batch,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return [float(bound) for bound in found.confidence_interval]


def summarise(rows: list[dict], seed: int = 0) -> Metrics:
    """What :func:`evaluate` returns, from its ``per_record`` rows: means over records, intervals, numbers of prompts."""
    metrics = Metrics(records=len(rows))
    for name in METRICS:
        for suffix in WAYS:
            key = name + suffix
            values = [row.get(key) for row in rows]
            if suffix in WRITTEN and not any(name + suffix in row for name in METRICS for row in rows):
                continue  # not asked for
            metrics[key] = mean(values)
            metrics[f"{key}_interval"] = bootstrap_interval(values, seed)
        own = [answer for row in rows for answer in row["answers"] if answer["metric"] == name]
        metrics[f"{name}_prompts"] = len(own)
        if any("right" in answer for answer in own):
            metrics[f"{name}_unwritable"] = sum(answer.get("right", True) is None for answer in own)
    if any("hallucination" in row for row in rows):
        values = [row.get("hallucination") for row in rows]
        metrics["hallucination"], metrics["hallucination_interval"] = mean(values), bootstrap_interval(values, seed)
    if any("questions" in row for row in rows):
        metrics["questions"] = _questions([rows], seed)
    metrics["per_record"] = rows
    return metrics


def averaged(found: list[Metrics], seed: int = 0) -> Metrics:
    """Of several runs over the same records: every record's mean, and over those the means and intervals, beside each score its
    ``…_spread``, the standard deviation of the runs' own (with one run's less, n − 1). At a checkpoint before the end the runs have
    edited different records; ``records`` is how many a run was asked, on the average."""
    result = summarise(record_means([metrics.per_record for metrics in found]), seed)
    result["records"] = round(sum(metrics.records for metrics in found) / len(found))
    spread = lambda values: float(np.std(values, ddof=1)) if len(values) > 1 else None  # noqa: E731
    for key in SCORES:
        if (own := spread([metrics[key] for metrics in found if metrics.get(key) is not None])) is not None:
            result[f"{key}_spread"] = own
    if "questions" in result:
        result["questions"] = _questions([metrics.per_record for metrics in found], seed)
        for criterion, own in result["questions"].items():
            each = [metrics["questions"][criterion] for metrics in found if criterion in metrics.get("questions", ())]
            for way in ("written", "contained"):
                own[f"{way}_spread"] = spread([values[way] for values in each if values[way] is not None])
    return result


def record_means(runs: list[list[dict]]) -> list[dict]:
    """A row for every record of several runs: the first run's that has it, with the means of its scores over all that have."""
    by_record: dict[tuple, list[dict]] = {}
    for row in (row for run in runs for row in run):
        by_record.setdefault(record_name(row), []).append(row)
    return [rows[0] | {key: mean([row.get(key) for row in rows]) for key in SCORES if key in rows[0]} for rows in by_record.values()]


def record_name(row: dict) -> tuple:
    """What tells a record's row from another's."""
    return row["request_id"], row["prompt"], row["subject"], row["target_new"]


def _questions(runs: list[list[dict]], seed: int) -> dict[str, dict]:
    """By criterion: the shares of questions answered, averaged over those of a record, then over records. Where an edit asks the questions
    of several records (of MQuAKE's cases, those that share their last fact), each counts as itself. Of several runs over the same records,
    a record's value is their mean."""
    asked: dict[str, dict[tuple, list[list[dict]]]] = {}  # criterion, record and case: its verdicts, a list a run
    for run in runs:
        own: dict[tuple, list[dict]] = {}
        for n, row in enumerate(run):
            for verdict in row.get("questions", ()):
                case = verdict.get("case")
                name = n if len(runs) == 1 else (row["prompt"], row["subject"])
                own.setdefault((verdict["criterion"], name, case), []).append(verdict)
        for (criterion, *record), verdicts in own.items():
            asked.setdefault(criterion, {}).setdefault(tuple(record), []).append(verdicts)
    found = {}
    for criterion, records in asked.items():
        counted = {name: [[one for one in own if one["counted"]] for own in runs_of] for name, runs_of in records.items()}
        number = lambda groups: round(sum(len(own) for runs_of in groups.values() for own in runs_of) / len(runs))  # noqa: E731
        found[criterion] = {"questions": number(records), "counted": number(counted)}
        for way in ("written", "contained"):
            values = [mean([mean([one[way] for one in own]) for own in runs_of]) for runs_of in counted.values()]
            found[criterion] |= {way: mean(values), f"{way}_interval": bootstrap_interval(values, seed)}
    return found


def _score(found: Prediction, forced: tuple[int, ...], generated: tuple[int, ...] | None) -> tuple:
    """Share of equal teacher-forced tokens, whether all are equal, whether the generated ones all are (or None)."""
    share = sum(a == b for a, b in zip(found.forced, forced, strict=True)) / len(forced)
    return share, float(share == 1), None if found.generated is None else float(found.generated == generated)


def _text(tokenizer, ids: tuple[int, ...] | None) -> str | None:
    return None if ids is None else tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()
