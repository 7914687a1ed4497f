"""CounterFact's scores, by comparing probabilities (ROME, arXiv 2202.05262, section 3.4; MEMIT, arXiv 2210.07229).

The probability of an object behind a prompt is ``P = exp(mean log-probability of its tokens)``, teacher-forced, as in
MEMIT's evaluation. For a record with the new object ``o*`` and the true one ``o``:

* efficacy: ``P(o*) > P(o)`` behind the edited prompt; magnitude ``P(o*) − P(o)``;
* paraphrase: the same behind the rephrase prompts;
* neighborhood: ``P(answer) > P(o*)`` behind the locality prompts that have an answer (in CounterFact: ``o``); magnitude
  ``P(answer) − P(o*)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from comeba_ext.evaluation.metrics import Metrics, bootstrap_interval
from comeba_ext.evaluation.queries import check_context
from comeba_ext.evaluation.scoring import Query, grouped_batches
from comeba_ext.forward.logits import logits_at, room_for_logits
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.prompts import as_asked, prompt_rewriter
from comeba_ext.text.encoding import input_device, pad, pad_id
from comeba_ext.text.request import EditRequest, as_requests

NAMES = ("efficacy", "paraphrase", "neighborhood")


def counterfact_scores(model: torch.nn.Module, tokenizer, records, *, max_tokens: int = 4096, seed: int = 0) -> Metrics:
    """Scores and magnitudes of a model on edit records that name their true object.

    Args:
        model: causal language model; left as it was.
        records: anything :func:`as_requests` accepts; efficacy and paraphrase need ``ground_truth``.
        max_tokens: padded tokens in one forward pass.
        seed: of the bootstrap.

    Returns:
        :class:`Metrics` with ``<name>_score`` (share of prompts, in [0, 1]) and ``<name>_magnitude`` (in [−1, 1]) for
        each of efficacy, paraphrase and neighborhood, averaged over a record's prompts and then over records, each with
        ``…_interval``; ``score``, the harmonic mean of the three shares; ``per_record``. ``None`` without prompts.

    Raises:
        RequestError: a record cannot be used or a text is longer than the model's context.
    """
    requests = as_requests(records)
    rewrite = prompt_rewriter(model) or (lambda prompt: prompt)
    pairs = [_pairs(tokenizer, request, rewrite) for request in requests]
    for index, (request, own) in enumerate(zip(requests, pairs)):
        check_context(model, [q for name in NAMES for pair in own[name] for q in pair], index, request)
    queries = dict.fromkeys(q for own in pairs for name in NAMES for pair in own[name] for q in pair)
    found = probabilities(model, queries, pad_token=pad_id(tokenizer), max_tokens=max_tokens)
    rows = []
    for request, own in zip(requests, pairs):
        row: dict = {"request_id": request.request_id}
        for name in NAMES:
            wins = [float(found[a] > found[b]) for a, b in own[name]]
            gaps = [found[a] - found[b] for a, b in own[name]]
            row[f"{name}_score"] = sum(wins) / len(wins) if wins else None
            row[f"{name}_magnitude"] = sum(gaps) / len(gaps) if gaps else None
        rows.append(row)
    return _summary(rows, seed)


@torch.no_grad()
def probabilities(model, queries, *, pad_token: int, max_tokens: int) -> dict[Query, float]:
    """``exp(mean log-probability)`` of every query's target tokens behind its prompt."""
    queries = list(dict.fromkeys(queries))
    found: dict[Query, float] = {}
    device = input_device(model)
    with evaluating(model):
        for batch in grouped_batches(queries, room_for_logits(model, max_tokens), size=lambda q: len(q.ids)):
            ids, mask = pad([list(q.ids) for q in batch], pad_token, "right", device)
            columns = [range(len(q.prompt_ids) - 1, len(q.ids) - 1) for q in batch]
            with as_asked(model, [list(q.prompt_ids) for q in batch]):
                logits = logits_at(model, {"input_ids": ids, "attention_mask": mask}, columns)
            for read, q in zip(logits, batch, strict=True):
                target = torch.tensor(q.target_ids, device=device)
                nll = F.cross_entropy(read.to(torch.promote_types(read.dtype, torch.float32)), target).item()
                found[q] = 0.0 if math.isnan(nll) else math.exp(-nll)  # a destroyed model's logits are no numbers
    return found


def _pairs(tokenizer, request: EditRequest, rewrite: Callable[[str], str]) -> dict[str, list[tuple[Query, Query]]]:
    """``(wanted to win, wanted to lose)`` by score."""
    new, true = request.target_new, request.ground_truth
    pair = lambda prompt, a, b: tuple(Query.of(tokenizer, rewrite(prompt), answer) for answer in (a, b))  # noqa: E731
    known = true is not None and true.strip()
    answered = [(p, answer) for p, answer in request.locality_prompts if answer and answer.strip()]
    return {
        "efficacy": [pair(request.text, new, true)] if known else [],
        "paraphrase": [pair(prompt, new, true) for prompt in request.rephrase_prompts] if known else [],
        "neighborhood": [pair(prompt, answer, new) for prompt, answer in answered],
    }


def _summary(rows: list[dict], seed: int) -> Metrics:
    metrics = Metrics(records=len(rows))
    for name in NAMES:
        for key in (f"{name}_score", f"{name}_magnitude"):
            values = [row[key] for row in rows if row[key] is not None]
            metrics[key] = sum(values) / len(values) if values else None
            metrics[f"{key}_interval"] = bootstrap_interval(values, seed)
    shares = [metrics[f"{name}_score"] for name in NAMES]
    if None in shares:
        metrics["score"] = None
    else:
        metrics["score"] = len(shares) / sum(1 / s for s in shares) if all(shares) else 0.0
    metrics["per_record"] = rows
    return metrics
