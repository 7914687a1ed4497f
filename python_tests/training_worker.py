"""What one process of :func:`test_distributed.test_training_in_two_processes` does: ``torchrun … training_worker.py FOLDER``.

What it found goes to ``FOLDER/rank<n>.json``.
"""

import json
import sys
from pathlib import Path

import torch
from distributed_worker import outcome
from transformers import AutoModelForCausalLM, AutoTokenizer

from comeba_ext import Editor, EditRequest, distributed
from comeba_ext.methods import method_named
from comeba_ext.training import TrainConfig, Trainer

SETTINGS = {
    "KE": {"hidden": 8, "condition": 6},
    "MEND": {"edit_rate": 0.03, "rank": 6},
    "SERAC": {"rank": 2, "buckets": 4096, "width": 32},
}
CONFIG = {"steps": 4, "edits": 2, "accumulate": 2, "validate_every": 2, "validations": 2, "save_every": 3, "lr": 1e-3}


def made(folder: Path, out: str, method: str = "KE", **changes) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    settings = method_named(method).config_class(layers=(1, 2), **SETTINGS[method])
    editor = Editor(model, AutoTokenizer.from_pretrained(folder / "model"), settings, method=method)
    records = [EditRequest.from_record(record) for record in json.loads((folder / "records.json").read_text())]
    return Trainer(editor, records[:6], records[6:], folder / out, TrainConfig(**(CONFIG | changes)))


def fail_at(trainer: Trainer, step: int, rank: int) -> None:
    """Let the loss of a process become NaN there."""
    forward, calls = trainer.learner.forward, []

    def diverging(episodes):
        calls.append(1)
        loss, parts = forward(episodes)
        wrong = distributed.rank() == rank and len(calls) > trainer.config.accumulate * step
        return (loss * torch.nan if wrong else loss), parts

    trainer.learner.forward = diverging


def scenarios(folder: Path) -> dict:
    """Trainings, then what is refused; by name, what each gave or said."""
    found = {method: made(folder, method, method).run(progress=False) for method in SETTINGS}
    found["too many"] = outcome(made(folder, "many", edits=1).run)
    found["other settings"] = outcome(made(folder, "settings", seed=distributed.rank()).run)
    stopped = made(folder, "stopped")
    fail_at(stopped, 3, rank=1)
    found["stopped"] = outcome(lambda: stopped.run(progress=False))
    found["resumed"] = made(folder, "stopped").run(progress=False)
    found["held"] = outcome(lambda: made(folder, "held").run(progress=False))  # by whoever started this
    return found


def main(folder: Path) -> None:
    """The first training makes the process group, as ``torchrun`` asks for it."""
    found = scenarios(folder)
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
