"""What a folder of an experiment holds, or an evaluation's file, and what follows from its records: differences, retention, examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from comeba_ext.errors import StorageError
from comeba_ext.evaluation.metrics import bootstrap_interval
from comeba_ext.evaluation.queries import METRICS
from comeba_ext.evaluation.ways import WAYS
from comeba_ext.experiments.table import leading_way

AGES, AGE = 10, 10  # groups of edits at most, from the oldest to the last, and edits in one at least
EXAMPLES = 30  # records a case, wrong ones first
LESS_IS_BETTER = ("hallucination",)
EVALUATION = "evaluation"  # instead of a protocol
TAKEN = "what 'comeba experiment' wrote to its --out, or 'comeba eval … --predictions answers.jsonl --json > eval.json'"


@dataclass
class Results:
    """An experiment's result, and every record's answers at the end of each of its cases.

    Attributes:
        result: what :func:`comeba_ext.experiments.run` returned.
        records: data set to case to the rows of :func:`comeba_ext.evaluation.evaluate` at the last checkpoint, in the order of the
            edits; a case whose log is not there has none, nor has an evaluation whose predictions are not.
    """

    result: dict
    records: dict[str, dict[str, list[dict]]] = field(default_factory=dict)

    def cases(self, dataset: str) -> list[dict]:
        """The last row of every case that measured something."""
        rows = [row for row in self.result["rows"] if row["dataset"] == dataset and row["reliability"] is not None]
        return list({row["case"]: row for row in rows}.values())

    def way(self, dataset: str) -> str:
        """The suffix of the scores that lead: what was written, where it was asked for."""
        return leading_way(self.cases(dataset))


def read(folder: str | Path) -> list[Results]:
    """The experiments in a folder that ``comeba experiment`` wrote, or of one of its JSON files, or what ``comeba eval --json`` printed,
    as an experiment of one case; the examples are in the file that it had for ``--predictions``, here or beside it.

    Raises:
        StorageError: there is none, or one is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        found = [_result(folder)]
    elif folder.is_dir():
        found = [own for path in sorted(folder.glob("*.json")) if (own := _result(path, strict=False)) is not None]
    else:
        raise StorageError(f"{folder}: no such file or folder")
    if not found or found == [None]:
        raise StorageError(f"{folder}: holds no result (a .json file with rows and records); a report is made from {TAKEN}")
    home = folder.parent if folder.is_file() else folder
    return [Results(own, _records(own, home)) for own in found]


def _evaluation(value: dict, path: Path) -> dict:
    """What ``comeba eval --json`` printed as the result of an experiment."""
    model, edits, data = (value.get(name) for name in ("model", "edits_folder", "data"))
    case, dataset = Path(edits).name if edits else "without edits", Path(data).stem if data else path.stem
    settings = {"model": model, "edits": edits, "base": value.get("base"), "records": data}
    return {
        "experiment": path.stem,
        "title": f"Evaluation of {Path(model).name if model else 'a model'}" + (f" with {edits}" if edits else ""),
        "protocol": EVALUATION,
        "note": "" if value.get("predictions") else "Examples are there where 'comeba eval' had --predictions FILE.",
        "records": {dataset: value["records"]},
        "rows": [{**value, "dataset": dataset, "case": case, "edits": value["records"]["used"], "settings": settings}],
        "versions": {"comeba_ext": value["version"]},
        "command": value.get("command"),
    }


def _result(path: Path, strict: bool = True) -> dict | None:
    """The result in a file; ``None`` where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: not a result ({error}); a report is made from {TAKEN}") from None
    if isinstance(value, dict) and {"experiment", "title", "rows", "records"} <= value.keys():
        return value
    if isinstance(value, dict) and {"version", "reliability", "records", "edits_folder"} <= value.keys():
        return _evaluation(value, path)
    if strict:
        raise StorageError(f"{path}: not a result, it has no rows and records; a report is made from {TAKEN}")
    return None


def _records(result: dict, home: Path) -> dict[str, dict[str, list[dict]]]:
    found: dict[str, dict[str, list[dict]]] = {name: {} for name in result["records"]}
    for row in result["rows"]:
        if result["protocol"] == EVALUATION:
            if rows := _predictions(row.get("predictions"), home):
                found[row["dataset"]][row["case"]] = rows
            continue
        path = home / row.get("log", "") / "log.jsonl"
        if not row.get("log") or not path.is_file():
            continue
        rows: dict[int, list[dict]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event.get("event") == "record":
                rows.setdefault(event["edits"], []).append(event)
        if rows:
            whole = result["protocol"] == "single_round"  # every batch was evaluated on its own
            found[row["dataset"]][row["case"]] = [row for own in rows.values() for row in own] if whole else rows[max(rows)]
    return found


def _predictions(name: str | None, home: Path) -> list[dict]:
    """The rows of ``comeba eval --predictions``, where the file still is."""
    path = next((own for own in (home / Path(name).name, Path(name)) if own.is_file()), None) if name else None
    try:
        return [] if path is None else [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StorageError(f"{path}: not what 'comeba eval --predictions' wrote ({error})") from None


def retention(rows: list[dict], key: str = "reliability", ages: int = AGES) -> list[dict]:
    """A score of the edits by when they were made: ``first`` and ``last`` edit of a group, ``value``, ``interval``.

    Args:
        rows: in the order of the edits, all asked after the last of them.
    """
    size = max(AGE, -(-len(rows) // ages))
    found = []
    for start in range(0, len(rows), size):
        values = [row.get(key) for row in rows[start : start + size]]
        present = [value for value in values if value is not None]
        if present:
            mean = sum(present) / len(present)
            found.append({"first": start + 1, "last": start + len(values), "value": mean, "interval": bootstrap_interval(present)})
    return found


def differences(records: dict[str, list[dict]], key: str) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """By how much every case is ahead of every other in a score: the mean difference over the records that both were asked, and its
    interval (paired bootstrap; an interval that holds 0 tells nothing apart)."""
    values = {case: {_name(row): row[key] for row in rows if row.get(key) is not None} for case, rows in records.items()}
    found: dict[str, dict[str, tuple[float, list[float]]]] = {case: {} for case in values}
    names = list(values)
    for n, one in enumerate(names):
        for other in names[n + 1 :]:
            own = [values[one][name] - values[other][name] for name in values[one] if name in values[other]]
            if own:
                mean, (low, high) = sum(own) / len(own), bootstrap_interval(own)
                found[one][other], found[other][one] = (mean, [low, high]), (0 - mean, [0 - high, 0 - low])
    return found


def best(records: dict[str, list[dict]], key: str) -> set[str]:
    """The cases that no other is ahead of."""
    ahead = (lambda low, high: low > 0) if key in LESS_IS_BETTER else (lambda low, high: high < 0)
    return {case for case, others in differences(records, key).items() if not any(ahead(*interval) for _, interval in others.values())}


def examples(rows: list[dict], way: str, count: int = EXAMPLES) -> list[dict]:
    """Records with what was asked, wanted and answered, the ones with most wrong answers first: ``prompt``, ``subject``,
    ``target``, ``wrong`` (how many), and ``answers`` (``metric``, ``prompt``, ``wanted``, ``answer``, ``right``)."""
    found = []
    for number, row in enumerate(rows):
        answers = [_answer(answer, row, way) for answer in row["answers"]]
        wrong = sum(not answer["right"] for answer in answers)
        found.append({"edit": number + 1, "subject": row["subject"], "target": row["target_new"], "wrong": wrong, "answers": answers})
    return sorted(found, key=lambda own: -own["wrong"])[:count]


def _answer(answer: dict, row: dict, way: str) -> dict:
    """One prompt's answer; right as the record's score would have it, were this its only prompt."""
    from comeba_ext.evaluation.written import is_written, normalised

    local = answer["metric"] == "locality"
    wanted = answer["wanted"]
    if way == "_written" and answer.get("written") is not None:
        text = answer["written"]
        wanted = answer["unedited_written"] if local else wanted
        right = normalised(text) == normalised(wanted) if local else is_written(text, [wanted])
    elif answer.get("generated") is not None:
        text, wanted = answer["generated"], answer.get("unedited", wanted)
        right = text == wanted
    else:
        text, right = answer["predicted"], answer["score"] == 1
    # (Aliases that count are not in the log: the record's own score knows of them.)
    prompts = sum(other["metric"] == answer["metric"] for other in row["answers"])
    if way and prompts == 1 and row.get(answer["metric"] + way) is not None:
        right = row[answer["metric"] + way] == 1
    return {"metric": answer["metric"], "prompt": answer["prompt"], "wanted": wanted, "answer": text, "right": bool(right)}


def scores(way: str) -> list[tuple[str, str]]:
    """Keys of the metrics scored in one way, and what they are called."""
    head = WAYS[way][0]
    return [(metric + way, f"{metric}, {head}") for metric in METRICS]


def _name(row: dict) -> tuple:
    return row["request_id"], row["prompt"], row["subject"], row["target_new"]
