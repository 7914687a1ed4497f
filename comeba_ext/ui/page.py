"""The page: a form to edit one fact, a text to try, the list of edits, a file of records. What it does is :mod:`comeba_ext.ui.desk`'s."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from comeba_ext.errors import ComebaError
from comeba_ext.text.request import SLOT, EditRequest
from comeba_ext.ui import views
from comeba_ext.ui.desk import Desk, Working
from comeba_ext.ui.suggestions import Relation, beside, examples, subject_of

log = logging.getLogger(__name__)
ASKING = {"concurrency_limit": 8, "show_progress": "minimal", "api_visibility": "private"}  # the service has a queue of edits
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # what needs no model
LISTED = 100  # edits that the list shows at once


@dataclass(frozen=True)
class About:
    """What the page says of itself and may do.

    Attributes:
        model: as on the command line; ``title``: its name; ``size``: in words.
        host: it listens on; ``local``: whether only this machine reaches it, whose user may name a folder to save to.
        folder: the edits' own, to which every change is saved at once.
    """

    model: str
    size: str
    host: str = "127.0.0.1"
    local: bool = True
    folder: Path | None = None

    @property
    def title(self) -> str:
        return "the embedded model" if self.model == "testbed" else Path(self.model).name


def theme() -> gr.themes.Base:
    """Plain, with the fonts that are there."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="sm",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def build(desk: Desk, relations: list[Relation], about: About, scratch: Path) -> gr.Blocks:
    """The page around a desk.

    Args:
        relations: what is proposed.
        scratch: folder for what is downloaded.
    """
    with gr.Blocks(title=f"Edit facts in {about.title}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        where = "Bound to this machine only" if about.local else f"Open to whoever reaches {about.host}"
        gr.Markdown(
            f"# Edit facts in {about.title}\n\n{about.size}. {where}; nothing is sent anywhere. The weights are never written: "
            "edits stand beside them and can be taken back.",
            elem_id="about",
        )
        with gr.Tabs():
            with gr.Tab("Edit"):
                edited = _edit_tab(desk, relations)
            with gr.Tab("Try"):
                _try_tab(desk)
            with gr.Tab("All edits") as tab:
                refresh = _edits_tab(desk, about, scratch)
            with gr.Tab("File"):
                _file_tab(desk)
        for event in (tab.select, page.load, edited.success):
            refresh(event)
    return page


def _field(label: str, value: str = "", **more) -> gr.Textbox:
    """A field that holds text from the beginning: what has never been shown would hold ``None``."""
    return gr.Textbox(value, label=label, **more)


# -- one edit -----------------------------------------------------------------------------------------------------


def _edit_tab(desk: Desk, relations: list[Relation]):
    shown = examples(relations)
    known = [name for relation in relations for name in relation.objects]
    with gr.Row():
        with gr.Column(min_width=320):
            choice = gr.Dataset(
                label="Examples",
                components=[gr.Textbox(visible=False)],
                samples=[[own.label] for own in shown],
                sample_labels=[own.label for own in shown],
                type="index",
                elem_id="examples",
            )
            hint = f"a text that the new answer shall follow; write {SLOT} for the subject, or the whole text"
            prompt = _field("Prompt", info=hint, placeholder="The mother tongue of {} is", elem_id="prompt")
            with gr.Row():
                subject = _field("Subject", placeholder="Danielle Darrieux", elem_id="subject", min_width=140)
                target = _field("New answer", placeholder="English", elem_id="target", min_width=140)
            with gr.Accordion("Also compare on", open=False):
                wordings = _field("Rewordings", info=f"one a line, with {SLOT} for the subject", lines=2, elem_id="wordings")
                neighbours = _field(
                    "Neighbours", info="other subjects, one a line, asked with the same prompt", lines=3, elem_id="neighbours"
                )
            fields = [prompt, subject, target, wordings, neighbours]
            button = gr.Button("Edit", variant="primary", elem_id="edit")
        with gr.Column(min_width=320):
            result = gr.HTML("Click an example, or write a prompt, its subject and a new answer; then <b>Edit</b>.", elem_id="result")
    scope = gr.HTML("", elem_id="scope")

    def fill(number: int):
        own = shown[number]
        compared = "\n".join(own.wordings), "\n".join(own.neighbours)
        return own.prompt, own.subject, own.target_new, *compared, compared

    def propose(prompt: str, subject: str, target: str, wordings: str, neighbours: str, before: tuple[str, str]):
        """A subject for a whole sentence, and what to compare on where the user has written nothing of that."""
        if prompt.strip() and SLOT not in prompt and not (subject.strip() and subject.strip() in prompt):
            subject = subject_of(prompt, known) or subject
        slotted = prompt if SLOT in prompt else prompt.replace(subject, SLOT) if subject else prompt
        if (wordings, neighbours) in (before, ("", "")):
            wordings, neighbours = before = tuple("\n".join(own) for own in beside(slotted, subject, target, relations))
        return subject, wordings, neighbours, before

    def edit(*given: str) -> Iterator[tuple]:
        try:
            for step in desk.edit(desk.request(*given)):
                if isinstance(step, Working):
                    yield views.working(step), gr.skip()
                else:
                    yield views.edited(step), views.scopes((own.prompt, own.scope) for own in step.answers)
        except Exception:
            yield views.unchanged(), gr.skip()
            raise

    before = gr.State(("", ""))  # what was proposed to compare on
    choice.click(fill, choice, [*fields, before], **AT_ONCE)
    proposed = [subject, wordings, neighbours, before]
    prompt.blur(propose, [*fields, before], proposed, trigger_mode="always_last", **AT_ONCE)
    return gr.on([button.click, target.submit], _sentences(edit), fields, [result, scope], **ASKING)


# -- a text -------------------------------------------------------------------------------------------------------


def _try_tab(desk: Desk) -> None:
    text = _field("Text", info="both models go on with it", lines=2, elem_id="text")
    with gr.Row(elem_classes="low"):
        tokens = gr.Slider(1, 200, 30, step=1, label="New tokens", min_width=200)
        button = gr.Button("Write", variant="primary", min_width=120, elem_id="write")
    result, scope = gr.HTML("", elem_id="tried"), gr.HTML("", elem_id="tried-scope")

    def write(text: str, tokens: int):
        found = desk.try_text(text, tokens)
        return views.tried(found), views.scopes([(found.text, found.scope)])

    gr.on([button.click, text.submit], _sentences(write), [text, tokens], [result, scope], **ASKING)


# -- all edits ----------------------------------------------------------------------------------------------------


def _edits_tab(desk: Desk, about: About, scratch: Path) -> Callable:
    """Returns what makes an event list the edits anew."""
    counted = gr.Markdown("", elem_id="counted")
    search = _field("Find", placeholder="a word of the prompt, the subject or the answer", elem_id="find")
    chosen = gr.CheckboxGroup(label="Edits, the last one first", show_select_all=True, elem_id="edits")
    with gr.Row():
        retract = gr.Button("Retract the ticked", min_width=130, elem_id="retract")
        undo = gr.Button("Undo the last step", min_width=130, elem_id="undo")
        measure = gr.Button("Measure retention", min_width=130, elem_id="measure")
    result = gr.HTML("", elem_id="measured")
    gr.Markdown("### Keep them")
    gr.HTML(views.kept(about.folder))
    with gr.Row(elem_classes="low"):
        folder = _field("Folder", "" if about.folder else "edits", visible=about.local, min_width=200, elem_id="folder")
        save = gr.Button("Save", min_width=100, elem_id="save", visible=about.local)
    with gr.Row(elem_classes="low"):
        complete = gr.Checkbox(label="with what is needed to go on editing (larger)", min_width=200, elem_id="complete")
        pack = gr.Button("Download as zip", min_width=100, elem_id="pack")
    saved, packed = gr.HTML("", elem_id="saved"), gr.File(label="Download", visible=False, interactive=False, elem_id="packed")

    def listed(search: str = ""):
        requests = desk.requests()
        found = [own for own in reversed(requests) if search.strip().lower() in views.edit_label(own).lower()]
        head = f"**Edits: {len(requests)}**" + (f", found: {len(found)}" if search.strip() else "")
        head += f" (the last {LISTED} are shown)" if len(found) > LISTED else ""
        return head, gr.CheckboxGroup(choices=[(views.edit_label(own), own.request_id) for own in found[:LISTED]], value=[])

    def take_back(ids: list[str], search: str):
        desk.retract(ids)
        return *listed(search), f"<p>Taken back: {len(ids)}.</p>"

    def step_back(search: str):
        desk.undo()
        return *listed(search), "<p>The last step is undone.</p>"

    def measured() -> Iterator[str]:
        try:
            for step in desk.measure():
                yield views.working(step) if isinstance(step, Working) else views.retention(step)
        except Exception:
            yield ""
            raise

    def write(folder: str):
        return views.saved(desk.save(folder), about.model)

    def zipped(complete: bool):
        return gr.File(str(desk.pack(scratch, complete)), visible=True)

    table = [counted, chosen]
    search.change(listed, search, table, trigger_mode="always_last", **AT_ONCE)
    retract.click(_sentences(take_back), [chosen, search], [*table, result], **ASKING)
    undo.click(_sentences(step_back), search, [*table, result], **ASKING)
    measure.click(_sentences(measured), None, result, **ASKING)
    if about.local:  # what is not shown could be called all the same
        save.click(_sentences(write), folder, saved, **ASKING)
    pack.click(_sentences(zipped), complete, packed, **ASKING)
    return lambda event: event(listed, search, table, **AT_ONCE)


# -- many edits ---------------------------------------------------------------------------------------------------


def _file_tab(desk: Desk) -> None:
    gr.Markdown("JSON or JSONL: CounterFact, ZsRE, EasyEdit's form, or your own with `prompt`, `subject` and `target_new`.")
    file = gr.File(label="Records", elem_id="records", height=130)
    with gr.Row():
        limit = gr.Number(0, label="At most (0: all)", minimum=0, precision=0, min_width=120)
        size = gr.Number(10, label="Batch size", minimum=1, maximum=1000, precision=0, min_width=120)
    found = gr.HTML("", elem_id="found")
    with gr.Row():
        start = gr.Button("Edit all of them", variant="primary", interactive=False, elem_id="edit-all")
        stop = gr.Button("Stop after this batch", interactive=False, elem_id="stop")
    result = gr.HTML("", elem_id="batches")
    requests = gr.State([])
    stopped: set[str | None] = set()  # sessions whose user has had enough

    def read(path: str | None, limit: int) -> Iterator[tuple]:
        yield "", [], gr.Button(interactive=False)  # nothing of the file before is left, whatever this one is
        if path is not None:
            counts, used, skipped = desk.read(path, int(limit) or None)
            yield views.file_read(Path(path).name, counts.read, used, skipped), used, gr.Button(interactive=True)

    def edit(requests: list[EditRequest], size: int, session: gr.Request) -> Iterator[tuple]:
        done, stopping = "", gr.Button(interactive=True)
        stopped.discard(session.session_hash)
        try:
            for step in desk.edit_all(requests, int(size)):
                if isinstance(step, Working):
                    yield views.working(step) + done, stopping
                    continue
                done = views.batches(step)
                if session.session_hash in stopped:
                    break
        finally:
            yield done, gr.Button(interactive=False)

    def stop_after(session: gr.Request):
        stopped.add(session.session_hash)
        return gr.Button(interactive=False)

    reading = _sentences(read)
    gr.on([file.change, limit.change], reading, [file, limit], [found, requests, start], **ASKING)
    start.click(_sentences(edit), [requests, size], [result, stop], **ASKING)
    stop.click(stop_after, None, stop, **AT_ONCE)


# -- errors -------------------------------------------------------------------------------------------------------


def _sentences(work: Callable) -> Callable:
    """A handler whose errors are shown as one sentence."""
    if inspect.isgeneratorfunction(work):

        @functools.wraps(work)
        def steps(*args):
            try:
                yield from work(*args)
            except Exception as error:
                raise _said(error) from None

        return steps

    @functools.wraps(work)
    def handler(*args):
        try:
            return work(*args)
        except Exception as error:
            raise _said(error) from None

    return handler


def _said(error: Exception) -> gr.Error:
    if isinstance(error, ComebaError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename or 'file system'}: {error.strerror or error}"
    else:
        log.error("the page met an error", exc_info=error)
        text = f"unexpected {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return gr.Error(views.sentence(text), duration=15, print_exception=False)
