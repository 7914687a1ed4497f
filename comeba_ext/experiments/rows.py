"""A case's rows of the table: one a checkpoint, of one run or on the average of several orders."""

from __future__ import annotations

import statistics

from comeba_ext.evaluation import Result
from comeba_ext.evaluation.comparing import AGE, retention_over
from comeba_ext.evaluation.metrics import METRICS, Metrics, averaged
from comeba_ext.evaluation.ways import WAYS
from comeba_ext.experiments import table


def rows_of(results: list[Result], seed: int) -> list[dict]:
    """What a case measured, in one order or on the average of several: a row a checkpoint, and where the method could not go on a
    last one that says why."""
    rows = []
    for there in _checkpoints(results):
        extras = [{k: v for k, v in result.extra.get(edits, {}).items() if k != "per_record"} for edits, result in there]
        costs = [result.efficiency(edits) for edits, result in there]
        found = [result.checkpoints[edits] for edits, result in there]
        edits = round(sum(edits for edits, _ in there) / len(there))
        if len(results) == 1:
            rows.append({"edits": edits, **_plain(found[0]), **costs[0], **extras[0]})
        else:
            peaks = [own["peak_memory"] for own in costs if own["peak_memory"] is not None]
            own = mean_of(costs) | {"peak_memory": max(peaks, default=None)}
            rows.append({"edits": edits, "orders": len(there), **_plain(averaged(found, seed)), **own, **mean_of(extras)})
    if rows and "saved_bytes" in rows[-1]:  # of one model that keeps its edits
        runs = [result.final.per_record for result in results if result.error is None]
        if max(map(len, runs), default=0) >= 2 * AGE:  # none where the method could not go on
            rows[-1]["retention"] = retention_over(runs, f"reliability{table.leading_way(rows[-1:])}")
    for result in results:
        if result.error is not None:
            rows.append({"edits": result.failed, **_plain(Metrics()), **result.efficiency(result.failed), "error": result.error})
            break
    return rows


def _checkpoints(results: list[Result]) -> list[list[tuple[int, Result]]]:
    """Of every checkpoint, each run's number of edits there. Cases are not split, so that orders may stop a little apart."""
    stops = [sorted(result.checkpoints) for result in results]
    if len(set(map(len, stops))) == 1:
        return [list(zip(own, results, strict=True)) for own in zip(*stops, strict=True)]
    return [[(edits, result) for result in results if edits in result.checkpoints] for edits in sorted(set().union(*stops))]


def mean_of(found: list[dict]) -> dict:
    """The means of what are numbers, also inside of mappings, of those that have them; what is none, as the first has it that has it.
    Intervals are of one order's records, so instead of one a mean has its ``…_spread`` over the orders."""
    means = {}
    for key in dict.fromkeys(key for own in found for key in own):
        values = [own[key] for own in found if own.get(key) is not None]
        if not values:
            means[key] = None
        elif all(isinstance(value, dict) for value in values):
            means[key] = mean_of(values)
        elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            means[key] = sum(values) / len(values)
            if len(values) > 1 and any(f"{key}_interval" in own for own in found):
                means[f"{key}_spread"] = statistics.stdev(values)
        elif not key.endswith("_interval"):
            means[key] = values[0]
    return means


def _plain(metrics) -> dict:
    names = [f"{name}{suffix}" for name in METRICS for suffix in WAYS]
    found = {key: metrics.get(key) for name in (*names, "hallucination") for key in (name, f"{name}_interval")}
    more = ("_spread", "_prompts", "_unwritable")
    found |= {key: value for key, value in metrics.items() if key.endswith(more) or key == "questions"}
    return {"records": metrics.get("records", 0), **found}
