"""What the scores of records say: of one case against another, and of old edits against new ones."""

from __future__ import annotations

import itertools

from comeba_ext.evaluation.metrics import bootstrap_interval, record_name

AGES, AGE = 10, 10  # groups of edits at most, from the oldest to the last, and edits in one at least
LEAST = 10  # records that two cases must share before one is said to be ahead: fewer are no sample
LESS_IS_BETTER = ("hallucination",)


def retention(rows: list[dict], key: str = "reliability", ages: int = AGES, orders: int = 1) -> list[dict]:
    """A score of the edits by when they were made: ``first`` and ``last`` edit of a group, ``value``, ``interval``.

    Args:
        rows: in the order of the edits, all asked after the last of them; of several orders, by turns.
        orders: so many.
    """
    count = -(-len(rows) // orders)
    size = max(AGE, -(-count // ages))
    found = []
    for start in range(0, count, size):
        values = [row.get(key) for row in rows[start * orders : (start + size) * orders]]
        present = [value for value in values if value is not None]
        if present:
            mean, last = sum(present) / len(present), min(start + size, count)
            found.append({"first": start + 1, "last": last, "value": mean, "interval": bootstrap_interval(present)})
    return found


def retention_over(runs: list[list[dict]], key: str) -> list[dict]:
    """:func:`retention` of several orders of the same records, each in the order of its edits."""
    by_turns = [row for own in itertools.zip_longest(*runs) for row in own if row is not None]
    return retention(by_turns, key, orders=max(1, len(runs)))


def differences(records: dict[str, list[dict]], key: str) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """By how much every case is ahead of every other in a score: the mean difference over the records that both were asked, and its
    interval (paired bootstrap; an interval that holds 0 tells nothing apart, nor do fewer than ``LEAST`` records, which have none)."""
    values = {case: {record_name(row): row[key] for row in rows if row.get(key) is not None} for case, rows in records.items()}
    found: dict[str, dict[str, tuple[float, list[float]]]] = {case: {} for case in values}
    names = list(values)
    for n, one in enumerate(names):
        for other in names[n + 1 :]:
            own = [values[one][name] - values[other][name] for name in values[one] if name in values[other]]
            if len(own) >= LEAST:
                mean, (low, high) = sum(own) / len(own), bootstrap_interval(own)
                found[one][other], found[other][one] = (mean, [low, high]), (0 - mean, [0 - high, 0 - low])
    return found


def best(records: dict[str, list[dict]], key: str) -> set[str]:
    """The cases that no other is ahead of; none where no two can be compared."""
    ahead = (lambda low, high: low > 0) if key in LESS_IS_BETTER else (lambda low, high: high < 0)
    found = differences(records, key)
    return {case for case, others in found.items() if others and not any(ahead(*interval) for _, interval in others.values())}


def pairs(records: dict[str, list[dict]], keys: list[str]) -> dict[str, list[dict]]:
    """:func:`differences` of several scores, every pair of cases once: score to ``ahead`` and ``behind`` (cases, by their means),
    ``mean``, ``interval``, and whether they are told ``apart``."""
    found: dict[str, list[dict]] = {}
    for key in keys:
        sign = -1 if key in LESS_IS_BETTER else 1
        seen: set[frozenset] = set()
        for one, others in differences(records, key).items():
            for other, (mean, (low, high)) in others.items():
                if sign * mean >= 0 and frozenset((one, other)) not in seen:
                    seen.add(frozenset((one, other)))
                    interval = [round(bound, 4) for bound in (low, high)]
                    own = {"ahead": one, "behind": other, "mean": round(mean, 4), "interval": interval, "apart": bool(low > 0 or high < 0)}
                    found.setdefault(key, []).append(own)
    return found
