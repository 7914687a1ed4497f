"""One model that many may ask while it is edited.

Every change of the edits is made on an editor apart (:meth:`Editor.apart`: the modules are its own, the weights are shared), and put in
the place of the one before when it is complete, and saved where that is wanted. Whoever generates holds on to the state that was the last
complete one when he began.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from comeba_ext.covariance import Covariance
from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.report import EditReport
from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError, CovarianceError, RequestError, StorageError
from comeba_ext.hub import is_hub_name, local_folder
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import asked_tokens, prompt_rewriter
from comeba_ext.methods import Method, method_named
from comeba_ext.saved_edits import load_edits
from comeba_ext.serving.completion import Completion, Sampling, Stream, check_tokens, complete
from comeba_ext.storage import MANIFEST, alone, read_manifest
from comeba_ext.text.request import EditRequest

Prompt = str | list[int] | list[dict]  # a text, its tokens, or the messages of a chat
Provided = Covariance | str | Path | Callable[[Editor], object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class MadeEdit:
    """An edit of the service's model.

    Attributes:
        request: what was asked; ``request.request_id`` is what :meth:`EditingService.retract` takes.
        step: that made it, from 1.
        superseded: the step that took it out, by another edit of the same fact or a retraction; ``None``: it is live.
    """

    request: EditRequest
    step: int
    superseded: int | None

    @property
    def id(self) -> str:
        return str(self.request.request_id)

    def to_dict(self) -> dict:
        own = self.request
        return {
            "id": self.id,
            "prompt": own.prompt,
            "subject": own.subject,
            "target_new": own.target_new,
            "step": self.step,
            "superseded": self.superseded,
        }


@dataclass(frozen=True)
class _State:
    """A complete one: it is never changed, another one takes its place."""

    model: nn.Module
    edits: tuple[MadeEdit, ...] = ()
    step: int = 0
    live: int = 0
    rewrite: Callable[[str], str] | None = None


class EditingService:
    """One model, its edits, one queue of edits; whoever generates sees the last complete state. Safe among threads.

    Args:
        model: in eval mode; it is put into the service's hands.
        tokenizer: its tokenizer; the editor gets a copy.
        edits: folder of saved edits to begin with, and the one to :meth:`save` to; it may be missing yet. No other process writes there
            until :meth:`close`. Or their name on the hub (``"user/name"``), of edits that are only used.
        covariance: where the method needs one: it, its file, or what is called with the editor to collect one (``lambda editor:
            editor.collect_covariance(texts)``) once there is something to edit. Of no effect where ``edits`` brings its own.
        config, method: as of :class:`Editor`; where there are edits already they must be what those were made with, or ``None``.
        editable: ``False``: ``edits`` are only used, of which a folder that was saved for inference is enough, and
            :meth:`add`, :meth:`retract` and :meth:`undo` are refused.
        autosave: every change is saved before it is seen.

    Raises:
        StorageError: the edits are damaged or of another base model, were saved for inference only, or another process writes there; or
            ``edits`` may be a name on the hub, where no change could be kept.
        ComebaError: as :class:`Editor` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        edits: str | Path | None = None,
        covariance: Provided | None = None,
        config: EditConfig | None = None,
        method: str | type[Method] | None = None,
        editable: bool = True,
        autosave: bool = False,
    ):
        if edits is not None and editable and is_hub_name(edits) and not Path(edits).parent.is_dir():
            raise StorageError(
                f"there is no folder {edits} to keep edits in: make it; or if that is a name on the hub, those edits can only be used"
            )
        if edits is not None and not editable:
            edits = local_folder(edits, "adapter")
        self.tokenizer, self.folder, self.autosave = tokenizer, Path(edits) if edits is not None else None, autosave
        self._covariance = covariance
        self._one_text = threading.Lock()
        self._editor: Editor | None = None
        # One thread makes all changes, in the order they were asked for, and holds the folder.
        self._queue, self._held = ThreadPoolExecutor(1, "edits"), ExitStack()
        if not editable:
            manifest = {"step": 0, "edits": 0} if self.folder is None else read_manifest(self.folder)
            if self.folder is not None:
                load_edits(model, self.folder, tokenizer=tokenizer)
            self._state = _State(model, step=manifest["step"], live=manifest["edits"], rewrite=prompt_rewriter(model))
            return
        try:
            if self.folder is not None:
                self._queued(lambda: self._held.enter_context(alone(self.folder)))
            self._queued(lambda: self._open(model, config, method))
        except BaseException:
            self.close()
            raise

    def _open(self, model: nn.Module, config: EditConfig | None, method: str | type[Method] | None) -> None:
        tokenizer = copy.deepcopy(self.tokenizer)  # fast tokenizers keep padding as state
        if self.folder is not None and (self.folder / MANIFEST).exists():
            editor = Editor.from_pretrained(model, tokenizer, self.folder)
            if config not in (None, editor.config) or (method is not None and method_named(method) is not type(editor.method)):
                raise ComebaError(f"the edits in {self.folder} were made with another method or other settings, which cannot change")
        else:
            editor = Editor(model, tokenizer, config, method=method or "COMEBA-HK")
            editor.method.ready()
        if isinstance(self._covariance, (Covariance, str, Path)):  # to be refused now, and not by the first edit
            self._provide(editor)
        self._take(editor)

    def close(self) -> None:
        """Let the queue run empty, and others write to the folder. (Asking goes on.)"""
        with suppress(RuntimeError):  # closed before
            self._queue.submit(self._held.close).result()
        self._queue.shutdown()

    def __enter__(self) -> EditingService:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # -- asking -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps that led to the last complete state."""
        return self._state.step

    @property
    def live(self) -> int:
        """Edits in the last complete state."""
        return self._state.live

    @property
    def editable(self) -> bool:
        return self._editor is not None

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """The model of the last complete state; whatever is edited meanwhile, it stays as it is."""
        yield self._state.model

    def prompt(self, text: str) -> str:
        """What is asked instead of ``text``: with methods that edit in the prompt another text, else the same."""
        rewrite = self._state.rewrite
        return text if rewrite is None else rewrite(text)

    def generate(
        self, prompts: Iterable[Prompt], *, max_new_tokens: int, stream: Stream | None = None, edited: bool = True, **sampling
    ) -> list[str]:
        """Texts behind prompts, as the model's own ``generate`` gives them; ``n`` of every prompt.

        Args:
            prompts: texts; token ids, taken as they are; or chats, lists of ``{"role": …, "content": …}``.
            stream: called with the number of a text and what is new of it, as soon as there is more.
            edited: ``False``: from the unedited model.
            sampling: further fields of :class:`~comeba_ext.serving.completion.Sampling`; by default what ``generate`` does.

        Raises:
            RequestError: a prompt is empty or too long, or a chat without a template.
        """
        return [own.text for own in self.complete(prompts, Sampling(max_new_tokens, **sampling), stream, edited=edited)]

    def complete(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling,
        stream: Stream | None = None,
        *,
        edited: bool = True,
        cancel: threading.Event | None = None,
    ) -> list[Completion]:
        """The same with tokens, log probabilities and reasons; ``cancel`` as of :func:`~comeba_ext.serving.completion.complete`."""
        state = self._state
        rows = [self._encode(prompt, state.rewrite if edited else None, sampling.echo) for prompt in prompts]
        with nullcontext() if edited else disabled(state.model):
            return complete(state.model, self.tokenizer, rows, sampling, stream, cancel)

    def _encode(self, prompt: Prompt, rewrite: Callable[[str], str] | None, echo: bool) -> list[int]:
        if rewrite is not None and echo:
            raise RequestError("these edits stand in the prompt, so it cannot be echoed; ask the unedited model, or leave out echo")
        if isinstance(prompt, str):
            return self.tokens(rewrite(prompt) if rewrite else prompt)
        if not prompt or not isinstance(prompt[0], Mapping):
            tokens = list(prompt)
            if rewrite is None:
                return tokens
            check_tokens(self._state.model, tokens)
            with self._one_text:
                return asked_tokens(self.tokenizer, tokens, rewrite)
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise RequestError("this model's tokenizer has no chat template, so it takes no chats; ask for a completion of a text")
        messages = [dict(message) for message in prompt]
        asked = next((own for own in reversed(messages) if own.get("role") == "user"), None)
        if asked is not None and rewrite is not None:
            asked["content"] = rewrite(asked["content"])
        try:
            with self._one_text:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            raise RequestError(f"the model's chat template does not take these messages: {error}") from None
        return self.tokens(text, add_special_tokens=False)

    def tokens(self, text: str, **options) -> list[int]:
        """Token ids of a text; ``options`` are the tokenizer's."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError("a prompt holds half a character (an unpaired surrogate)")
        with self._one_text:
            return self.tokenizer(text, **options)["input_ids"]

    # -- editing ------------------------------------------------------------------------------------------------

    def edits(self) -> list[MadeEdit]:
        """All that were made and not undone, in their order; empty where they are only used."""
        return list(self._state.edits)

    def add(
        self,
        requests: Iterable[EditRequest | Mapping],
        *,
        progress: bool | Callable[[int, float], None] | None = None,
    ) -> EditReport:
        """One batch of edits: all of it or nothing. Waits for those before.

        Args:
            requests: as of :meth:`Editor.edit`.
            progress: called, from the thread that edits, with the number of requests that are done and the mean loss; ``True``: a bar.

        Raises:
            RequestError: an unusable request or batch.
            CovarianceError: the method needs a covariance, and there is none.
            StorageError: ``autosave``, and it cannot be saved.
        """
        return self._queued(lambda: self._add(list(requests), progress or False))

    def prepare(self) -> None:
        """Collect the covariance now instead of with the first edit. Raises :class:`CovarianceError` where there is none to have."""
        self._queued(self._need_covariance)

    def retract(self, ids: str | Iterable[str]) -> None:
        """Take edits back; see :meth:`Editor.retract`. Raises :class:`RequestError` for an id that is not live."""
        self._queued(lambda: self._change(lambda work: work.retract(ids)))

    def undo(self) -> None:
        """Forget the last step; see :meth:`Editor.rollback`. Raises :class:`RequestError` where there is none."""

        def back(work: Editor) -> None:
            if not work.step:
                raise RequestError("there is nothing to undo: no edit was made")
            work.rollback(work.step - 1)

        self._queued(lambda: self._change(back))

    def save(self, folder: str | Path | None = None, *, inference_only: bool = False) -> Path:
        """Save the edits of the last complete state, atomically, to go on from unless ``inference_only``; to the folder they were opened
        from by default.

        Raises:
            StorageError: nothing can be written there; the folder holds what it held.
        """
        folder = Path(folder) if folder is not None else self.folder
        if folder is None:
            raise RequestError("name a folder to save to: the service was opened without one")
        self._queued(lambda: self._editing().save_pretrained(folder, inference_only=inference_only))
        return folder

    def _queued(self, work: Callable[[], Result]) -> Result:
        try:
            future = self._queue.submit(work)
        except RuntimeError:
            raise ComebaError("the service was closed; its edits cannot change any more") from None
        return future.result()

    def _editing(self) -> Editor:
        if self._editor is None:
            raise ComebaError("these edits are only used here, and cannot be changed")
        return self._editor

    def _add(self, requests: list, progress: bool | Callable[[int, float], None]) -> EditReport:
        self._editing().check(requests)  # before a covariance is collected for them
        self._need_covariance()
        return self._change(lambda work: work.edit(requests, progress=progress))

    def _need_covariance(self) -> None:
        editor = self._editing()
        if editor.method.needs_covariance and editor.covariance is None and not editor.key_memory:
            if self._covariance is None:
                raise CovarianceError(f"{editor.method.name} needs a covariance: give the service one, or edits that bring theirs")
            work = editor.apart()
            self._provide(work)
            self._take(work)  # kept, whatever becomes of the edit

    def _change(self, act: Callable[[Editor], Result]) -> Result:
        """Do something to the edits on an editor apart, which takes the place of the one before when all is done and saved."""
        work = self._editing().apart()
        result = act(work)
        if self.autosave and self.folder is not None:
            work.save_pretrained(self.folder)
        self._take(work)
        return result

    def _provide(self, editor: Editor) -> None:
        if not editor.method.needs_covariance or editor.covariance is not None:
            return
        if isinstance(self._covariance, Covariance):
            editor.set_covariance(self._covariance)
        elif isinstance(self._covariance, (str, Path)):
            editor.load_covariance(self._covariance)
        else:
            self._covariance(editor)

    def _take(self, editor: Editor) -> None:
        """This is the last complete state."""
        made = tuple(MadeEdit(entry.request, entry.step, entry.removed) for entry in editor.ledger.entries)
        state = _State(editor.model, made, editor.step, len(editor.ledger), prompt_rewriter(editor.model))
        self._editor, self._state = editor, state
