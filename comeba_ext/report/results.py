"""What a folder of an experiment holds, or an evaluation's file, and what follows from its records: differences, retention, examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from comeba_ext.errors import StorageError
from comeba_ext.evaluation.metrics import record_means
from comeba_ext.evaluation.queries import METRICS
from comeba_ext.evaluation.ways import WAYS
from comeba_ext.experiments.table import leading_way

EXAMPLES = 30  # records a case, wrong ones first
EVALUATION = "evaluation"  # instead of a protocol
TAKEN = "what 'comeba experiment' wrote to its --out, or 'comeba eval … --predictions answers.jsonl --json > eval.json'"


@dataclass
class Results:
    """An experiment's result, and every record's answers at the end of each of its cases.

    Attributes:
        result: what :func:`comeba_ext.experiments.run` returned.
        records: data set to case to the rows of :func:`comeba_ext.evaluation.evaluate` at the last checkpoint, in the order of the
            edits, of several orders every record's means; a case whose log is not there has none, nor has an evaluation whose
            predictions are not.
        orders: the same, a list of rows an order.
    """

    result: dict
    records: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    orders: dict[str, dict[str, list[list[dict]]]] = field(default_factory=dict)

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
    orders = [_orders(own, home) for own in found]
    means = [{name: {case: record_means(runs) for case, runs in cases.items()} for name, cases in own.items()} for own in orders]
    return [Results(*own) for own in zip(found, means, orders, strict=True)]


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


def _orders(result: dict, home: Path) -> dict[str, dict[str, list[list[dict]]]]:
    found: dict[str, dict[str, list[list[dict]]]] = {name: {} for name in result["records"]}
    for row in result["rows"]:
        if result["protocol"] == EVALUATION:
            if rows := _predictions(row.get("predictions"), home):
                found[row["dataset"]][row["case"]] = [rows]
        elif row.get("log"):
            folder, whole = home / row["log"], result["protocol"] == "single_round"  # every batch was evaluated on its own
            logs = [folder / (f"order-{n}" if n else "") / "log.jsonl" for n in range(row.get("orders", 1))]
            runs = [_last_rows(path, whole) for path in logs if path.is_file()]
            if runs := [rows for rows in runs if rows]:
                found[row["dataset"]][row["case"]] = runs
    return found


def _last_rows(path: Path, whole: bool) -> list[dict]:
    """A log's rows of records at its last checkpoint, or all."""
    rows: dict[int, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("event") == "record":
            rows.setdefault(event["edits"], []).append(event)
    return [row for own in rows.values() for row in own] if whole or not rows else rows[max(rows)]


def _predictions(name: str | None, home: Path) -> list[dict]:
    """The rows of ``comeba eval --predictions``, where the file still is."""
    path = next((own for own in (home / Path(name).name, Path(name)) if own.is_file()), None) if name else None
    try:
        return [] if path is None else [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StorageError(f"{path}: not what 'comeba eval --predictions' wrote ({error})") from None


def examples(rows: list[dict], way: str, count: int = EXAMPLES) -> list[dict]:
    """Records with what was asked, wanted and answered, the ones with most wrong answers first: ``prompt``, ``subject``,
    ``target``, ``wrong`` (how many), and ``answers`` (``metric``, ``prompt``, ``wanted``, ``answer``, what was written ``before``, and
    whether it is ``right``: ``None`` where no right answer could be written)."""
    found = []
    for number, row in enumerate(rows):
        answers = [_answer(answer, row, way) for answer in row["answers"]]
        answers += [own for verdict in row.get("questions", ()) if verdict["counted"] for own in _question(verdict)]
        wrong = sum(answer["right"] is False for answer in answers)
        found.append({"edit": number + 1, "subject": row["subject"], "target": row["target_new"], "wrong": wrong, "answers": answers})
    return sorted(found, key=lambda own: -own["wrong"])[:count]


def _answer(answer: dict, row: dict, way: str) -> dict:
    """One prompt's answer; right as the record's score has it, and what the unedited model wrote ``before``, where that was asked."""
    from comeba_ext.evaluation.written import is_written, normalised

    local = answer["metric"] == "locality"
    wanted, before = answer["wanted"], None
    if way == "_written" and answer.get("written") is not None:
        text, before = answer["written"], answer.get("unedited_written")
        wanted = before if local else wanted
        right = answer.get("right")
        if "right" not in answer:  # a log of an earlier version, whose aliases only the record's own score knows of
            right = normalised(text) == normalised(wanted) if local else is_written(text, [wanted])
            if sum(other["metric"] == answer["metric"] for other in row["answers"]) == 1 and row.get(answer["metric"] + way) is not None:
                right = row[answer["metric"] + way] == 1
    elif answer.get("generated") is not None:
        text, wanted = answer["generated"], answer.get("unedited", wanted)
        right = text == wanted
    else:
        text, right = answer["predicted"], answer["score"] == 1
    right = None if right is None else bool(right)
    return {"metric": answer["metric"], "prompt": answer["prompt"], "wanted": wanted, "answer": text, "before": before, "right": right}


def _question(verdict: dict) -> list[dict]:
    """A question's answers, each as right as the whole is."""
    shared = {"metric": verdict["criterion"], "before": None, "right": bool(verdict["written"])}
    return [{**shared, "prompt": own["prompt"], "wanted": own["wanted"], "answer": own["written"]} for own in verdict["answers"]]


def scores(way: str) -> list[tuple[str, str]]:
    """Keys of the metrics scored in one way, and what they are called."""
    head = WAYS[way][0]
    return [(metric + way, f"{metric}, {head}") for metric in METRICS]
