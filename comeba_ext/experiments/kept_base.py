"""What the unedited model says, asked once an experiment: other processes and resumed runs find it in the experiment's folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from filelock import FileLock
from torch import nn

from comeba_ext import __version__
from comeba_ext.evaluation import BasePredictions, Writing, predict_base
from comeba_ext.evaluation.protocols import digest
from comeba_ext.evaluation.scoring import Prediction, Query
from comeba_ext.machine import versions
from comeba_ext.storage import identity, make_folder, write_text
from comeba_ext.text.request import EditRequest


def kept_base(
    path: Path, model: nn.Module, tokenizer, records: list[EditRequest], *, generate: bool, writing: Writing | None, progress: bool = False
) -> BasePredictions:
    """:func:`predict_base`, from the file ``path`` where it holds the same question; else asked, and kept there.

    A file that answers another question (records, model, device, versions), or cannot be read, is written anew.
    """
    asked = {
        "records": digest([record.to_record() for record in records]),
        "model": digest([identity(model, []), str(model.dtype), model.device.type]),
        "generate": generate,
        "writing": None if writing is None else dataclasses.asdict(writing),
        "version": __version__,
        "versions": versions(),
    }
    make_folder(path.parent)
    with FileLock(path.with_name(f".{path.stem}.lock")):  # one of several processes asks
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["asked"] == asked:
                return _read(found, generate, writing)
        except (OSError, ValueError, LookupError, TypeError):
            pass
        base = predict_base(model, tokenizer, records, generate=generate, writing=writing, progress=progress)
        predictions = [[q.prompt_ids, q.target_ids, p.forced, p.generated] for q, p in base.predictions.items()]
        write_text(path, json.dumps({"asked": asked, "predictions": predictions, "answers": list(base.answers.items())}) + "\n")
    return base


def _read(found: dict, generate: bool, writing: Writing | None) -> BasePredictions:
    predictions = {
        Query(tuple(prompt), tuple(target)): Prediction(tuple(forced), None if generated is None else tuple(generated))
        for prompt, target, forced, generated in found["predictions"]
    }
    return BasePredictions(predictions, generate, writing, {tuple(ids): text for ids, text in found["answers"]})
