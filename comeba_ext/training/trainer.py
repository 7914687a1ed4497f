"""The loop: episodes into a learner, validation, the best editor kept; a killed run ends with the bits of one that was not.

A step takes its episodes from a permutation of the records that depends on the seed and the epoch alone, and draws their wordings by the
seed and the step. So all that a checkpoint (``last.safetensors``) holds beside the learner is Adam's state and where the run is.

accelerate runs it: mixed precision, several processes (each takes its share of a step's edits), accumulation.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from comeba_ext.distributed import require_replicated, require_same, together, world_size
from comeba_ext.editing.config import check_fields
from comeba_ext.editing.report import peak_memory, reset_peak_memory
from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.machine import machine
from comeba_ext.methods.trained import ABOUT, FILE, Learner, Trained, save_learner
from comeba_ext.storage import alone, read_tensors, write_tensors, write_text
from comeba_ext.text.encoding import input_device
from comeba_ext.text.episodes import episodes_of
from comeba_ext.text.request import EditRequest

LAST = "last.safetensors"
MEASURED = ("loss", "reliability", "generality", "locality")


@dataclass(frozen=True)
class TrainConfig:
    """How a learner is trained.

    Args:
        steps: of the optimiser, at most.
        edits: requests that are edited together in a forward pass, or, with several processes, shared by them in one; and
            ``accumulate``: passes a step.
        lr: Adam's rate; ``None``: the learner's.
        clip: bound on the gradient's norm.
        validate_every: steps between validations; ``validations``: records each, the first ones.
        patience: validations without a lower loss after which it ends.
        save_every: steps between checkpoints, which a killed run goes on from.
        seed: of the order and the wordings.
        mixed_precision: ``"no"``, ``"bf16"`` or, on a GPU, ``"fp16"`` (accelerate's).
        minutes: after which it ends, with a last validation; the same command with more of them goes on.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 2000
    edits: int = 1
    accumulate: int = 4
    lr: float | None = None
    clip: float = 100.0
    validate_every: int = 100
    validations: int = 50
    patience: int = 5
    save_every: int = 50
    seed: int = 0
    mixed_precision: str = "no"
    minutes: float | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "edits", "accumulate", "validate_every", "validations", "patience", "save_every")
        check_fields(self, counts=counts, positive=("clip",), positive_or_none=("lr", "minutes"))
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"mixed_precision must be no, bf16 or fp16, got {self.mixed_precision!r}")


class Trainer:
    """Trains a method's editor for a model.

    Args:
        editor: of an unedited model, with a method that is trained (:class:`~comeba_ext.methods.trained.Trained`).
        train, val: records with locality prompts; no fact of one should be in the other.
        out: folder for ``editor.safetensors`` (the best by validation loss), ``last.safetensors`` (a run that was interrupted goes on
            there), ``log.jsonl`` and, at the end, ``train.json`` and ``curve.png``.

    Raises:
        ConfigError: the method cannot be trained, or not in this precision here.
        RequestError: a record cannot be edited, there is none, or the model is edited already.
    """

    def __init__(
        self, editor: Editor, train: list[EditRequest], val: list[EditRequest], out: str | Path, config: TrainConfig | None = None
    ):
        if not isinstance(editor.method, Trained):
            raise ConfigError(f"{editor.method.name} is not trained; it edits as it is")
        if editor.step:
            raise RequestError("the model is edited already; train on the unedited one")
        if not train or not val:
            raise RequestError(f"there are {len(train)} records to train on and {len(val)} to validate on; each needs one at least")
        for request in (*train, *val):  # each by itself: what contradicts another fact is never edited together with it
            editor.check([request])
        self.editor, self.train, self.val, self.out = editor, train, val, Path(out)
        self.config = config or TrainConfig()
        if self.config.mixed_precision == "fp16" and input_device(editor.model).type == "cpu":
            raise ConfigError("mixed_precision fp16 is for GPUs; on the CPU use bf16 or no")
        self.learner: Learner = editor.method.new_learner()
        self._shuffled: tuple[int | None, list[int]] = None, []  # an epoch and its order
        self.shown = [own for n in range(len(val[: self.config.validations])) for own in episodes_of(val, [n], random.Random(n))]

    def run(self, progress: bool = True, on_validation: Callable[[dict], None] | None = None) -> dict:
        """Train, or go on with what was interrupted in ``out``.

        Returns:
            ``steps``, ``seconds``, ``best`` (a validation: ``step``, ``loss``, ``reliability``, ``generality``, ``locality``),
            ``validations``, ``parameters``, ``bytes`` of the editor, ``peak_memory`` in bytes (of the process that ended it), ``machine``;
            of several processes the first has it, the others nothing.

        Raises:
            StorageError: ``out`` holds the training of something else, or another process writes there.
            ConfigError: more processes than ``edits``, which they share.
            ComebaError: the loss became NaN or infinite; the best editor so far is kept.
        """
        device = input_device(self.editor.model)
        with _accelerator(self.config.mixed_precision, device) as accelerator, ExitStack() as held:
            self._check_processes(accelerator, device)
            together(lambda: held.enter_context(alone(self.out)) if accelerator.is_main_process else None)  # the one that writes
            return self._run(accelerator, device, progress, on_validation)

    def _check_processes(self, accelerator, device: torch.device) -> None:
        """Raises, in all processes alike, where they cannot share a training."""
        count = accelerator.num_processes
        if count != world_size():
            raise ComebaError(f"of {world_size()} processes accelerate knows {count}; start them with torchrun or accelerate launch")
        if self.config.edits < count:  # each pass's are shared
            raise ConfigError(f"{count} processes share the edits of a pass, which are {self.config.edits}; give edits={count} or more")
        if count > 1:
            require_replicated(self.editor.model)
            require_same((self._header(), self.config), "records or settings")

            def placed() -> None:
                if device.type != "cpu" and device != accelerator.device:
                    raise ComebaError(f"the model is on {device}; put it on {accelerator.device}, which is this process's")

            together(placed)

    def _run(self, accelerator, device: torch.device, progress: bool, on_validation: Callable[[dict], None] | None) -> dict:
        config, scaler = self.config, accelerator.scaler
        optimiser = torch.optim.Adam([{"lr": config.lr or self.learner.lr, **group} for group in self.learner.groups()])
        alone_does = lambda work: together(lambda: work() if accelerator.is_main_process else None)[0]  # noqa: E731
        step, lines = together(lambda: self._resume(optimiser, scaler))[accelerator.process_index]
        alone_does(lambda: self._save_best(lines))  # where it was killed before it could
        learner, optimiser = accelerator.prepare(self.learner, optimiser)
        start, before = time.monotonic(), lines[-1]["seconds"] if lines else 0.0
        seconds = lambda: before + time.monotonic() - start  # noqa: E731

        def validate() -> None:
            found = alone_does(self._validate)  # the same in all, so that they end alike
            lines.append({"event": "validation", "step": step, **found, "seconds": seconds()})

        def save() -> None:
            alone_does(lambda: self._save(step, optimiser, scaler, lines))
            if on_validation is not None and lines[-1]["event"] == "validation":
                on_validation(lines[-1])

        reset_peak_memory(device)
        with tqdm(total=config.steps, initial=step, disable=not progress, unit="step", desc=self.editor.method.name) as bar:
            ends = step >= config.steps or self._late(before)
            if ends and lines[-1]["event"] != "validation":  # it has had more steps, or time, than are asked for now
                validate()
                save()
            while not ends and not self._enough(lines):
                parts = self._step(accelerator, learner, optimiser, step)
                step += 1
                lines.append({"event": "step", "step": step, **parts, "seconds": seconds()})
                bar.set_postfix(loss=f"{parts['loss']:.3g}", refresh=False)
                bar.update()
                ends = step == config.steps or self._late(lines[-1]["seconds"])
                if ends or step % config.validate_every == 0:
                    validate()
                if lines[-1]["event"] == "validation" or step % config.save_every == 0:
                    save()
        result = alone_does(lambda: self._finish(device, lines))
        return result if accelerator.is_main_process else {}

    def _step(self, accelerator, learner, optimiser, step: int) -> dict[str, float]:
        """One of the optimiser; returns the loss's parts, means over its passes."""
        config, sums = self.config, {}
        learner.train()
        for number in range(config.accumulate):
            episodes = self._episodes(step, number)[accelerator.process_index :: accelerator.num_processes]
            loss, parts = self._loss(learner, episodes, step)
            accelerator.backward(loss / config.accumulate)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / config.accumulate
        accelerator.clip_grad_norm_(learner.parameters(), config.clip)
        optimiser.step()
        optimiser.zero_grad()
        return sums

    def _loss(self, learner, episodes: list, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Of a process's share; where it fails in one, none waits for the gradient of the others."""
        found = []

        def forward() -> None:
            found.extend(learner(episodes))
            if not torch.isfinite(found[0]):
                raise ComebaError(f"the loss became {found[0].item()} at step {step + 1}; the best editor so far is kept, lower lr")

        together(forward)
        return found[0], found[1]

    def _episodes(self, step: int, number: int) -> list:
        """Those of a pass: the next records of a permutation that every epoch has one of."""
        config, count = self.config, len(self.train)
        first = (step * config.accumulate + number) * config.edits
        numbers = [self._order((first + n) // count)[(first + n) % count] for n in range(config.edits)]
        return episodes_of(self.train, numbers, random.Random(f"{config.seed}:{step}:{number}"))

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            numbers = list(range(len(self.train)))
            random.Random(f"{self.config.seed}:{epoch}").shuffle(numbers)
            self._shuffled = epoch, numbers
        return self._shuffled[1]

    def _validate(self) -> dict[str, float]:
        self.learner.eval()
        found = [self.learner.measure(episode) for episode in self.shown]
        return {name: sum(own[name] for own in found) / len(found) for name in MEASURED}

    def _late(self, seconds: float) -> bool:
        """Whether the time is up, in all processes alike."""
        if self.config.minutes is None:
            return False
        return together(lambda: seconds > 60 * self.config.minutes)[0]

    def _enough(self, lines: list[dict]) -> bool:
        validations = _validations(lines)
        since = len(validations) - validations.index(_best(lines)) if validations else 0
        return since > self.config.patience

    # -- what is kept -------------------------------------------------------------------------------------------

    def _header(self) -> dict:
        """What this training is: another one is not gone on with."""
        data = [[request.to_record() for request in records] for records in (self.train, self.val)]
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("steps", "minutes")}  # more may be asked for
        return {"kind": "training", "method": self.editor.method.name, "data": digest, "training": settings}

    def _save_best(self, lines: list[dict]) -> None:
        """The learner as it is, where the last line says that none was better; behind the checkpoint that says so, from which a run that
        is killed between the two can write it."""
        if lines and lines[-1] is _best(lines):
            save_learner(self.learner, self.out / FILE, {**self._header(), "kind": "editor", "validation": lines[-1]})

    def _save(self, step: int, optimiser, scaler, lines: list[dict]) -> None:
        state = optimiser.state_dict()["state"]
        tensors = {f"learner.{name}": own for name, own in self.learner.state_dict().items()}
        tensors |= {f"optimiser.{n}.{key}": torch.as_tensor(own) for n, kept in state.items() for key, own in kept.items()}
        about = {**self._header(), "settings": self.editor.config.to_dict(), "step": step, "lines": len(lines)}
        if scaler is not None:  # of fp16: by how much the next loss is scaled decides whether its step is left out
            about["scaler"] = scaler.state_dict()
        write_text(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_tensors(self.out / LAST, tensors, about)
        self._save_best(lines)

    def _resume(self, optimiser, scaler) -> tuple[int, list[dict]]:
        """Step and log of the checkpoint, whose weights and states are taken; 0 and nothing where there is none."""
        if not (self.out / LAST).exists():
            if (self.out / FILE).exists():
                raise StorageError(f"{self.out} holds an editor that this run has not made; choose another folder")
            return 0, []
        tensors, about = read_tensors(self.out / LAST)
        wanted = {**self._header(), "settings": json.loads(json.dumps(self.editor.config.to_dict()))}
        differ = [key for key, value in wanted.items() if about.get(key) != value]
        if differ:
            raise StorageError(f"{self.out} holds another training ({', '.join(differ)} differ); choose another folder")
        try:
            own = {name[len("learner.") :]: tensor for name, tensor in tensors.items() if name.startswith("learner.")}
            self.learner.load_state_dict(own)
            state: dict[int, dict] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimiser."):
                    _, number, key = name.split(".")
                    state.setdefault(int(number), {})[key] = tensor
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
            if scaler is not None and "scaler" in about:
                scaler.load_state_dict(about["scaler"])
            text = (self.out / "log.jsonl").read_text(encoding="utf-8")
            step, lines = about["step"], [json.loads(line) for line in text.splitlines()[: about["lines"]]]
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise StorageError(f"{self.out / LAST} does not fit this training ({error}); remove the folder to start anew") from None
        best = _best(lines)
        if best is not None and best is not lines[-1] and not (self.out / FILE).exists():
            raise StorageError(f"{self.out} no longer holds the best editor, of step {best['step']}; remove the folder to start anew")
        return step, lines

    def _finish(self, device: torch.device, lines: list[dict]) -> dict:
        result = {
            **self._header(),
            "steps": lines[-1]["step"],
            "seconds": lines[-1]["seconds"],
            "best": _best(lines),
            "validations": _validations(lines),
            "parameters": sum(own.numel() for own in self.learner.parameters()),
            "bytes": (self.out / FILE).stat().st_size,
            "peak_memory": peak_memory(device),
            "machine": machine(),
        }
        write_text(self.out / ABOUT, json.dumps(result, indent=1) + "\n")
        _plot(lines, self.out / "curve.png")
        return result


@contextmanager
def _accelerator(mixed_precision: str, device: torch.device):
    """An ``Accelerator`` for a learner that is on its device already.

    accelerate keeps precision, device and accumulation once for a whole process. Inside they are this training's, afterwards as they were:
    the next training may choose others, and whoever has an ``Accelerator`` of their own keeps what they chose.

    Raises:
        ComebaError: it is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError:
        raise ComebaError("training needs the package accelerate: pip install 'comeba_ext[train]'") from None
    shared = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in shared]
    try:
        for state in shared:
            state.clear()
        yield Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu", device_placement=False)
    finally:
        for state, own in zip(shared, before, strict=True):
            state.clear()
            state.update(own)


def _validations(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["event"] == "validation"]


def _best(lines: list[dict]) -> dict | None:
    """The first validation with the lowest loss."""
    return min(_validations(lines), key=lambda own: own["loss"], default=None)


def _plot(lines: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3))
    steps, validations = [line for line in lines if line["event"] == "step"], _validations(lines)
    window = max(1, len(steps) // 100)
    parts = [steps[n : n + window] for n in range(0, len(steps), window)]
    means = [sum(line["loss"] for line in part) / len(part) for part in parts]
    left.plot([part[-1]["step"] for part in parts], means, color="#999999", label="training")
    left.plot([own["step"] for own in validations], [own["loss"] for own in validations], "o-", color="#0072B2", label="validation")
    left.set_ylabel("loss")
    left.legend(fontsize=8)
    for name, colour in (("reliability", "#0072B2"), ("generality", "#D55E00"), ("locality", "#009E73")):
        right.plot([own["step"] for own in validations], [own[name] for own in validations], "o-", color=colour, label=name)
    right.set_ylim(-0.02, 1.02)
    right.set_ylabel("a single edit, validation")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
