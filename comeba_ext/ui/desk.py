"""What the page does, without the page: edits with their progress, answers before and after, retention, records, saving."""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from comeba_ext.data import ReadResult, read_requests
from comeba_ext.editing.report import EditReport
from comeba_ext.errors import ComebaError, RequestError, StorageError
from comeba_ext.evaluation import Metrics, Writing, evaluate, summarise
from comeba_ext.evaluation.queries import check_record
from comeba_ext.evaluation.scopes import TextScope, text_scope
from comeba_ext.evaluation.written import answer_of
from comeba_ext.serving.service import EditingService
from comeba_ext.storage import LOCK, MANIFEST
from comeba_ext.text.request import SLOT, EditRequest, consecutive_batches

Result = TypeVar("Result")
ANSWER_TOKENS = 24  # of what is shown before and after an edit
OLD = 600.0  # seconds after which an archive was downloaded or will not be
MEASURED_TOGETHER = 10  # records between two signs of progress


@dataclass(frozen=True)
class Working:
    """Something is being done: in words, the share that is, and the losses so far."""

    what: str
    share: float = 0.0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model writes behind a prompt; ``kind``: ``prompt``, ``rewording`` or ``neighbour``; ``scope``: after the edit, ``None``
    where no score decides."""

    kind: str
    prompt: str
    before: str
    after: str
    scope: TextScope | None


@dataclass(frozen=True)
class Edited:
    """An edit that is done."""

    request: EditRequest
    report: EditReport
    answers: list[Answer]


@dataclass(frozen=True)
class Batches:
    """Batches that are done: their reports, and how many requests there are in all."""

    reports: tuple[EditReport, ...]
    total: int


@dataclass(frozen=True)
class Tried:
    """A text that both models went on with."""

    text: str
    unedited: str
    edited: str
    scope: TextScope | None


class Desk:
    """Where a service is worked at; any number of pages may share one.

    Args:
        service: holds the model and its edits.
    """

    def __init__(self, service: EditingService):
        self.service = service
        self._own = {service.folder.resolve()} if service.folder is not None else set()  # folders that are written to again
        self._waiting: set[object] = set()  # batches that the service was asked for

    # -- edits --------------------------------------------------------------------------------------------------

    def request(self, prompt: str, subject: str, target_new: str, wordings: str = "", neighbours: str = "") -> EditRequest:
        """What the form's fields ask for.

        Args:
            wordings, neighbours: one a line: other prompts, with a slot or the subject spelled out; other subjects.

        Raises:
            RequestError: a field is empty, or the subject is not in the prompt.
        """
        for name, value in (("prompt", prompt), ("subject", subject), ("new answer", target_new)):
            if not value.strip():
                raise RequestError(f"there is no {name}; prompt, subject and new answer are needed")
        request = EditRequest(prompt=prompt, subject=subject, target_new=target_new, rephrase_prompts=lines(wordings))
        others = [(request.prompt.replace(SLOT, name, 1), None) for name in lines(neighbours) if name != request.subject]
        return EditRequest(request.prompt, request.subject, request.target_new, None, request.rephrase_prompts, tuple(others))

    def requests(self) -> list[EditRequest]:
        """The live edits', oldest first."""
        return [own.request for own in self.service.edits() if own.superseded is None]

    def edit(self, request: EditRequest) -> Iterator[Working | Edited]:
        """Edit one fact; the last thing yielded is what came of it.

        Raises:
            ComebaError: it cannot be edited; nothing was changed.
        """
        asked = [("prompt", request.text)]
        asked += [("rewording", prompt) for prompt in request.rephrase_prompts]
        asked += [("neighbour", prompt) for prompt, _ in request.locality_prompts]
        prompts = [prompt for _, prompt in asked]
        yield Working("Asking the model before the edit")
        before = self._answers(prompts)
        losses: tuple[float, ...] = ()
        for step in self._steps([request], "Looking for the value that makes the model say it"):
            if isinstance(step, EditReport):
                report = step
            else:
                losses = step.losses
                yield step
        yield Working("Asking the model after the edit", 1.0, losses)
        after, scopes = self._answers(prompts), [self.scope(prompt) for prompt in prompts]
        yield Edited(request, report, [Answer(*own, *rest) for own, *rest in zip(asked, before, after, scopes, strict=True)])

    def edit_all(self, requests: list[EditRequest], batch_size: int = 10) -> Iterator[Working | Batches]:
        """Edit in consecutive batches. Whoever stops iterating, or an error in a batch, leaves what the batches before have done."""
        batches, reports, losses = consecutive_batches(requests, batch_size), [], []
        done = 0
        for number, batch in enumerate(batches):
            for step in self._steps(batch, f"Batch {number + 1} of {len(batches)}"):
                if isinstance(step, EditReport):
                    reports.append(step)
                    losses += [sum(step.losses) / len(step.losses)] if step.losses else []
                else:
                    yield Working(step.what, (done + step.share * len(batch)) / len(requests), tuple(losses) + step.losses[-1:])
            done += len(batch)
            yield Batches(tuple(reports), len(requests))

    def _steps(self, batch: list[EditRequest], what: str) -> Iterator[Working | EditReport]:
        """A batch in a thread of its own, so that the page hears of it meanwhile."""
        losses: list[float] = []

        def work(tell: Callable[[Working], None]) -> EditReport:
            def progress(done: int, loss: float) -> None:
                losses.append(loss)
                tell(Working(what, done / len(batch), tuple(losses)))

            try:
                return self.service.add(batch, progress=progress)
            finally:
                self._waiting.discard(turn)

        if self._waiting:
            yield Working("Waiting for the edits before")
        elif self.service.edits():
            yield Working(what)
        else:  # the service collects a covariance, where it was given none
            yield Working("Reading texts to learn what is usual, once before the first edit")
        turn = object()
        self._waiting.add(turn)
        yield from in_background(work)

    def retract(self, ids: list[str]) -> None:
        """Raises :class:`RequestError` where none is chosen, or one is gone by now."""
        if not ids:
            raise ComebaError("no edit is chosen; tick those to take back")
        self.service.retract(ids)

    def undo(self) -> None:
        """Take back the last step, whatever it was."""
        self.service.undo()

    # -- looking ------------------------------------------------------------------------------------------------

    def try_text(self, text: str, new_tokens: int) -> Tried:
        """What the unedited and the edited model write behind a text."""
        if not text.strip():
            raise ComebaError("there is no text to go on with; write one first")
        text = text.rstrip()
        unedited, edited = (self.service.generate([text], max_new_tokens=new_tokens, edited=edited)[0].strip() for edited in (False, True))
        return Tried(text, unedited, edited, self.scope(text))

    def scope(self, text: str) -> TextScope | None:
        """Which tokens of a text the edits are used for; ``None`` where the method has no score to decide it."""
        with self.service.generating() as model:
            try:
                return text_scope(model, self.service.tokenizer, self.service.prompt(text))
            except ComebaError:
                return None

    def measure(self) -> Iterator[Working | Metrics]:
        """Retention: every live edit asked again; the last thing yielded are its metrics.

        Raises:
            ComebaError: there are no edits.
        """
        requests, rows = self.requests(), []
        if not requests:
            raise ComebaError("there are no edits to measure yet")
        with self.service.generating() as model:  # which stays as it is, whatever is edited meanwhile
            for start in range(0, len(requests), MEASURED_TOGETHER):
                yield Working(f"Asking {len(requests)} edits again", start / len(requests))
                some = requests[start : start + MEASURED_TOGETHER]
                rows += evaluate(model, self.service.tokenizer, some, generate=False, writing=Writing()).per_record
        yield summarise(rows)

    def _answers(self, prompts: list[str]) -> list[str]:
        return [answer_of(text) for text in self.service.generate(prompts, max_new_tokens=ANSWER_TOKENS)]

    # -- files --------------------------------------------------------------------------------------------------

    def read(self, path: str | Path, limit: int | None = None) -> tuple[ReadResult, list[EditRequest], list[dict]]:
        """A file of records: what it holds, the requests that can be edited, and the records that cannot, with reasons.

        Raises:
            StorageError: it is no such file.
            ComebaError: none of its records can be used.
        """
        try:
            found = read_requests(path, limit)
        except StorageError as error:  # the user knows the file by its name, not by where the browser has put it
            raise StorageError(str(error).replace(str(path), Path(path).name)) from None
        with self.service.generating() as model:
            used, skipped = found.usable(lambda _, request: check_record(model, self.service.tokenizer, request))
        if not used:
            raise ComebaError(f"{Path(path).name}: none of its {found.read} records can be used; the first: {skipped[0]['reason']}")
        return found, used, skipped

    def save(self, folder: str) -> Path:
        """Save the edits to a folder.

        Raises:
            ComebaError: no folder is named.
            StorageError: it holds other edits, or cannot be written.
        """
        if not folder.strip():
            raise ComebaError("no folder is named; write one, such as edits")
        path = Path(folder.strip()).expanduser().resolve()
        if path not in self._own and (path / MANIFEST).exists():
            raise StorageError(f"{path} holds other edits already; choose another folder")
        self.service.save(path)
        self._own.add(path)
        return path

    def pack(self, into: Path, complete: bool = False) -> Path:
        """The folder of edits as ``edits.zip`` in a folder of its own in ``into``, where several may ask at once; ``complete``: with what
        is needed to go on editing. Archives of ten minutes ago are gone."""
        for old in into.glob("zip-*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > OLD:
                    shutil.rmtree(old)
        archive = Path(tempfile.mkdtemp(prefix="zip-", dir=into)) / "edits.zip"
        with tempfile.TemporaryDirectory(dir=into) as made:
            folder = self.service.save(Path(made) / "edits", inference_only=not complete)
            with zipfile.ZipFile(archive, "w") as whole:  # as they are: weights hardly shrink
                for file in sorted(folder.iterdir()):
                    if file.name != LOCK:
                        whole.write(file, f"edits/{file.name}")
        return archive


def lines(text: str) -> tuple[str, ...]:
    """What stands in a field of several lines, once each, blank ones left out."""
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def in_background(work: Callable[[Callable], Result]) -> Iterator:
    """Run ``work(tell)`` in a thread; yields what it told last, some times a second, and in the end its result.

    An error of it is raised here. Where the iteration is stopped, the work still comes to its own end.
    """
    told: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()  # whether it is the end, and what is told

    def run() -> None:
        try:
            told.put((True, work(lambda step: told.put((False, step)))))
        except BaseException as error:
            told.put((True, error))

    threading.Thread(target=run, name="comeba edit").start()
    over = False
    while not over:
        over, step = told.get()
        while not over and not told.empty():  # a page need not show every step of a fast one
            over, step = told.get()
        if isinstance(step, BaseException):
            raise step
        yield step
