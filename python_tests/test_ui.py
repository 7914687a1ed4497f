"""The page to try edits: what it proposes, does and says, and how it is used in a browser."""

import copy
import json
import logging.config  # noqa: F401  (is patched)
import os
import shutil
import socket
import threading
import time
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import output, run

from comeba_ext import Editor, EditRequest, load_edits, testbed
from comeba_ext.errors import ComebaError, RequestError, StorageError
from comeba_ext.evaluation import Writing, evaluate
from comeba_ext.evaluation.scopes import text_scope, token_scores
from comeba_ext.layers.attachment import disabled
from comeba_ext.serving.service import EditingService
from comeba_ext.text.encoding import pad
from comeba_ext.ui import running, views
from comeba_ext.ui.desk import Answer, Batches, Desk, Edited, Tried, Working, in_background
from comeba_ext.ui.suggestions import beside, examples, relations_of, subject_of

TEXT = "The mother tongue of Sophie Calle is"


@pytest.fixture(autouse=True)
def logging_as_it_is(monkeypatch):
    """Gradio's server configures logging, which closes every handler there is; absl's (others' tests import it) then closes the stream
    it holds, pytest's own, when sys.stderr is another one just then."""
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its tokenizer, and a covariance."""
    model, tokenizer = testbed.load()
    editor = Editor(copy.deepcopy(model), tokenizer)
    editor.collect_covariance(testbed.texts(), tokens=2500, progress=False)
    return model, tokenizer, editor.covariance


@pytest.fixture
def desk(embedded):
    model, tokenizer, covariance = embedded
    with EditingService(copy.deepcopy(model), tokenizer, covariance=covariance) as service:
        yield Desk(service)


@pytest.fixture(scope="module")
def idle(embedded):
    """A desk for tests that change nothing."""
    model, tokenizer, covariance = embedded
    with EditingService(copy.deepcopy(model), tokenizer, covariance=covariance) as service:
        yield Desk(service)


def last(steps):
    return list(steps)[-1]


def request(subject="Sophie Calle", target="Tamil"):
    return EditRequest("The mother tongue of {} is", subject, target)


# -- proposals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, subject",
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("Paris is the capital of", "Paris"),
        ("Where is the Eiffel Tower", "Eiffel Tower"),
        ("Danielle Darrieux's mother tongue is", "Danielle Darrieux"),
        ("The president of the United States of America is", "United States of America"),
        ('The author of "the old man and the sea" is', "the old man and the sea"),
        ("Who wrote J. R. R. Tolkien's letters?", "J. R. R. Tolkien"),
        ("Windows 95 is made by", "Windows 95"),
        ("Élodie Bouchez speaks", "Élodie Bouchez"),
        ("what is love", None),
        ("", None),
    ],
)
def test_the_subject_of_a_sentence(text, subject):
    assert subject_of(text) == subject


def test_a_known_subject_comes_before_others():
    assert subject_of("The maker of iDisk and Logic Pro is", ["iDisk", "Disk"]) == "iDisk"
    facts = testbed.facts()[::40]
    known = [fact.subject for fact in facts]
    assert all(subject_of(fact.text, known) == fact.subject for fact in facts)


@pytest.mark.parametrize("model", ["testbed", "some-model"])
def test_examples_can_be_edited(model):
    relations = relations_of(model)
    found = examples(relations)
    assert len(found) == 6 == len({own.subject for own in found})
    objects = {name: answer for relation in relations for name, answer in relation.objects.items()}
    for own in found:
        made = Desk.request(None, own.prompt, own.subject, own.target_new, "\n".join(own.wordings), "\n".join(own.neighbours))
        assert made.rephrase_prompts and all(own.subject in text for text in made.rephrase_prompts)
        others = [objects[name] for name in own.neighbours]
        assert len(made.locality_prompts) == len(set(others)) == 3 and own.target_new not in others != objects[own.subject]
    assert beside("Nobody has ever asked of {} whether", "Paris", "", relations) == ([], [])


# -- what it does -------------------------------------------------------------------------------------------------


def test_an_edit_before_and_after(desk):
    """Answers are the model's own; steps tell of a loss that falls; retracting and undoing bring the unedited model back."""
    given = desk.request(TEXT, "Sophie Calle", "Tamil", "{} speaks\n\n{} speaks", "Eduardo Duhalde\nSophie Calle")
    assert given.prompt == "The mother tongue of {} is" and given.rephrase_prompts == ("Sophie Calle speaks",)
    assert given.locality_prompts == (("The mother tongue of Eduardo Duhalde is", None),)
    *steps, done = desk.edit(given)
    losses = steps[-2].losses  # the last of all are the report's
    assert all(isinstance(step, Working) for step in steps) and losses[-1] < losses[0] and isinstance(done, Edited)
    assert [own[:4] for own in map(_row, done.answers)] == [
        ("prompt", TEXT, "French.", "Tamil."),
        ("rewording", "Sophie Calle speaks", "French.", "Tamil."),
        ("neighbour", "The mother tongue of Eduardo Duhalde is", "Spanish.", "Spanish."),
    ]
    assert done.report.answered == [True]
    assert [any(own.in_scope.any() for own in answer.scope.layers.values()) for answer in done.answers] == [True, True, False]
    tried = desk.try_text(f"{TEXT} ", 5)
    assert tried.unedited.startswith("French") and tried.edited.startswith("Tamil") and tried.text == TEXT
    desk.retract([own.request_id for own in desk.requests()])
    assert desk.requests() == [] and desk.try_text(TEXT, 5).edited == tried.unedited
    desk.undo()
    assert [own.target_new for own in desk.requests()] == ["Tamil"] and desk.try_text(TEXT, 5).edited == tried.edited


def _row(own: Answer) -> tuple:
    return own.kind, own.prompt, own.before, own.after


def test_scores_say_where_the_output_is_another(desk, embedded):
    """Against the layers' own outputs: a token is in scope where a layer does not give what its base layer gives."""
    last(desk.edit(request()))
    texts = ["Yesterday Sophie Calle spoke of Victor Hugo.", TEXT]
    with desk.service.generating() as model:
        rows = [desk.service.tokenizer(text)["input_ids"] for text in texts]
        ids, mask = pad(rows, 0)
        another, handles = {}, []
        for name, layer in model.named_modules():
            if hasattr(layer, "score") and hasattr(layer, "base_layer"):
                note = lambda layer, args, out, name=name: another.update({name: (out != layer.base_layer(args[0])).any(-1)})  # noqa: E731
                handles.append(layer.register_forward_hook(note))
        found = token_scores(model, ids, mask)
        for handle in handles:
            handle.remove()
        alone = text_scope(model, desk.service.tokenizer, texts[0])
        with pytest.raises(RequestError, match="empty"):
            text_scope(model, desk.service.tokenizer, " ")
        with pytest.raises(RequestError, match="context is"):
            text_scope(model, desk.service.tokenizer, "very " * 2000)
    assert list(found) == list(another) and len(found) == 4
    for name, own in found.items():
        assert own.in_scope.any(1).all() and torch.equal(own.in_scope, another[name] & mask.bool())
        assert torch.equal(own.in_scope, (own.scores >= own.alpha - 1e-4) & mask.bool()) and own.score == "nearest"
        assert (own.scores[~mask.bool()] == -torch.inf).all()
        short = len(rows[0])
        torch.testing.assert_close(alone.layers[name].scores[0], own.scores[0][mask[0].bool()][:short], atol=1e-5, rtol=1e-4)
    assert "".join(alone.tokens).strip() == texts[0]
    everywhere = Editor(copy.deepcopy(embedded[0]), embedded[1], method="FT")
    with pytest.raises(ComebaError, match="every token gets"):
        text_scope(everywhere.model, embedded[1], TEXT)
    with pytest.raises(ComebaError, match="no layer"):
        token_scores(embedded[0], ids, mask)


def test_records_in_batches_and_retention(desk, tmp_path):
    facts = testbed.facts()[:4]
    file = tmp_path / "my <facts>.json"
    file.write_text(json.dumps([*(fact.to_record() for fact in facts), {"prompt": "x", "subject": "y", "target_new": "z"}]))
    counts, used, skipped = desk.read(file)
    assert counts.read == 5 and len(used) == 4 and [own["index"] for own in skipped] == [4]
    assert "my &lt;facts&gt;.json" in views.file_read(file.name, counts.read, used, skipped)
    for step in desk.edit_all(used, 1):  # stopped after the second batch
        if isinstance(step, Batches) and len(step.reports) == 2:
            break
    assert len(desk.requests()) == 2 and "2 of 4 edited" in views.batches(step)
    steps = list(desk.edit_all(used[2:], 2))
    assert isinstance(steps[-1], Batches) and sorted(step.share for step in steps if isinstance(step, Working))[-1] <= 1
    assert [own.asked for own in desk.requests()] == [own.asked for own in facts]
    metrics = last(desk.measure())
    with desk.service.generating() as model:
        whole = evaluate(model, desk.service.tokenizer, facts, generate=False, writing=Writing())
    for name in ("reliability", "generality", "locality", "reliability_written", "locality_written"):
        assert metrics[name] == pytest.approx(whole[name]) and metrics[f"{name}_interval"] == pytest.approx(whole[f"{name}_interval"])
    assert "Edits that hold: 4 of 4." in views.retention(metrics)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        (b"nonsense", "not valid JSON"),
        (b"", "holds no records"),
        (b'[{"a": 1}]', "none of its 1 records"),
    ],
)
def test_nonsense_is_refused(idle, tmp_path, content, says):
    file = tmp_path / "upload.json"
    file.write_bytes(content)
    with pytest.raises(ComebaError, match=says) as refused:
        idle.read(file)
    assert str(tmp_path) not in str(refused.value) and "upload.json" in str(refused.value)
    assert idle.requests() == [] and idle.service.step == 0


def test_what_cannot_be_done_changes_nothing(idle):
    for given in ((" ", "a", "b"), ("{} is", "", "b"), ("{} is", "a", " ")):
        with pytest.raises(RequestError, match="prompt, subject and new answer are needed"):
            idle.request(*given)
    with pytest.raises(RequestError, match="is not in the prompt"):
        idle.request("The capital is", "Peru", "Oslo")
    for act, says in (
        (lambda: idle.retract([]), "no edit is chosen"),
        (lambda: idle.retract(["gone"]), "no live edit"),
        (idle.undo, "nothing to undo"),
        (lambda: last(idle.measure()), "no edits to measure"),
        (lambda: idle.try_text("  ", 5), "no text"),
        (lambda: last(idle.edit(request("very " * 2000))), "context"),
        (lambda: idle.save(" "), "no folder"),
    ):
        with pytest.raises(ComebaError, match=says):
            act()
    assert idle.service.step == 0 and idle.requests() == []


def test_who_waits_is_told(desk, monkeypatch):
    """A batch behind another one says so, and both are made in their order; meanwhile the model answers from before."""
    add, go_on = desk.service.add, threading.Event()
    monkeypatch.setattr(desk.service, "add", lambda batch, progress: go_on.wait(60) and add(batch, progress=progress))
    first = threading.Thread(target=lambda: list(desk.edit_all([request(target="Latin")])))
    first.start()
    said = []
    while "Waiting" not in (said[-1:] or [""])[0]:
        said.append(next(desk.edit_all([request()])).what)
    second = desk.edit_all([request()])
    assert "Waiting" in next(second).what
    assert desk.try_text(TEXT, 4).edited.startswith("French")
    go_on.set()
    first.join()
    assert isinstance(last(second), Batches)
    assert [own.request.target_new for own in desk.service.edits()] == ["Latin", "Tamil"]
    assert [own.target_new for own in desk.requests()] == ["Tamil"]
    assert "Waiting" not in next(desk.edit_all([request()])).what


def test_work_in_the_background():
    steps = in_background(lambda tell: [tell(n) for n in range(50)] and "done")
    found = list(steps)
    assert found[-1] == "done" and found[:-1] == sorted(found[:-1])
    with pytest.raises(RequestError, match="as it was"):
        list(in_background(lambda tell: (_ for _ in ()).throw(RequestError("as it was"))))


def test_saved_and_packed(desk, embedded, tmp_path):
    """What is saved, and what is downloaded, gives the live model's logits on a fresh one; other edits are not written over."""
    last(desk.edit(request()))
    folder = desk.save(str(tmp_path / "kept"))
    assert desk.save(str(folder)) == folder  # again
    (tmp_path / "downloads").mkdir()
    (first, second) = (desk.pack(tmp_path / "downloads", complete) for complete in (True, False))  # each to who asked for it
    assert second.stat().st_size < first.stat().st_size / 5 and {first.name, second.name} == {"edits.zip"}
    zipfile.ZipFile(second).extractall(tmp_path / "unpacked")
    os.utime(first.parent, (0, 0))
    third = desk.pack(tmp_path / "downloads")
    assert {path for path in (tmp_path / "downloads").iterdir()} == {second.parent, third.parent}
    ids = torch.tensor([desk.service.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad(), desk.service.generating() as model:
        live = model(ids).logits
        with disabled(model):
            assert not torch.allclose(model(ids).logits, live)
        for place in (folder, tmp_path / "unpacked" / "edits"):
            torch.testing.assert_close(load_edits(copy.deepcopy(embedded[0]), place)(ids).logits, live)
    with pytest.raises(StorageError, match="other edits already"):
        Desk(desk.service).save(str(folder))


# -- what it shows ------------------------------------------------------------------------------------------------


def test_nothing_that_was_written_is_markup(desk):
    nasty = "<script>alert(1)</script>"
    made = desk.request("{} is", nasty, nasty, nasty + " {}", nasty)
    done = last(desk.edit(made))
    shown = [views.edited(done), views.scopes((own.prompt, own.scope) for own in done.answers), views.answers(done.answers, nasty)]
    shown += [views.working(Working(nasty, 0.5, (1.0, 0.5))), views.retention(last(desk.measure())), views.sentence(nasty)]
    shown += [views.tried(desk.try_text(nasty, 3)), views.file_read(nasty, 1, [made], [{"index": 0, "reason": nasty}])]
    shown += [views.answers([Answer("prompt", nasty, nasty, nasty, None)], nasty), views.tried(Tried(nasty, nasty, nasty, None))]
    shown += [views.edited(replace(done, report=replace(done.report, declined=[{"prompt": nasty, "reason": nasty}])))]
    assert all(nasty not in own and "alert" in own for own in shown)
    assert views.sentence("nothing is there") == "Nothing is there."


# -- the command and the page -------------------------------------------------------------------------------------


def test_a_port_that_is_taken():
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        result = run("ui", "--port", taken, "--json")
    assert result.exit_code == 1
    assert (
        json.loads(result.stdout)["error"]
        == f"port {taken} of 127.0.0.1 is taken by another program; choose another --port, or 0 for any that is free"
    )
    result = run("ui", "--port", 0, "--texts", "nowhere.csv")
    assert result.exit_code == 1 and "nowhere.csv: no such file" in result.stderr
    result = run("ui", "--host", "203.0.113.1")
    assert result.exit_code == 1 and "no address of this machine" in result.stderr and "Traceback" not in result.output


def test_the_command(embedded, tmp_path, monkeypatch):
    """Open to other machines, it says so, and lets nobody name a folder; what it has put elsewhere goes with it."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    embedded[2].save(tmp_path / "covariance")
    seen = {}

    def stopped() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
            seen.update(json.load(answer), scratch=Path(os.environ["GRADIO_TEMP_DIR"]))
        assert seen["scratch"].is_dir()

    monkeypatch.setattr("comeba_ext.serving.listen.until_asked_to_stop", stopped)
    port = free_port()
    found = output("ui", "--covariance", tmp_path / "covariance", "--edits", tmp_path / "edits", "--host", "0.0.0.0", "--port", port)
    assert not found["local"] and found["url"].endswith(f":{port}") and found["edits"] == 0
    parts = {own["props"].get("elem_id"): own["props"] for own in seen["components"]}
    numbers = {own["props"].get("elem_id"): own["id"] for own in seen["components"]}
    asked = {target[0] for own in seen["dependencies"] for target in own["targets"]}
    assert numbers["pack"] in asked and numbers["save"] not in asked  # nor can it be called without being seen
    assert not parts["folder"]["visible"] and not parts["save"]["visible"] and parts["pack"]["visible"]
    assert "Open to whoever reaches 0.0.0.0" in parts["about"]["value"] and str(tmp_path / "edits") in str(seen)
    assert seen["analytics_enabled"] is False and not seen["scratch"].exists() and "GRADIO_TEMP_DIR" not in os.environ
    assert all(own["api_visibility"] == "private" for own in seen["dependencies"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def browser(tmp_path):
    """Chromium, as wide as a phone."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=500,1000"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'user'}")
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True})
    yield page
    page.quit()


class Page:
    def __init__(self, browser):
        self.browser = browser

    def one(self, css: str):
        return self.until(lambda: self.browser.find_element("css selector", css))

    def text(self, name: str) -> str:
        return self.browser.find_element("id", name).text

    def click(self, css: str) -> None:
        element = self.one(css)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def tab(self, name: str) -> None:
        self.until(lambda: [own for own in self.browser.find_elements("css selector", "button[role=tab]") if own.text == name])[0].click()

    def put(self, name: str, text: str) -> None:
        field = self.one(f"#{name} textarea, #{name} input")
        field.send_keys("\ue009a\ue000", "\ue017", text)  # all of it (Ctrl-A), Delete

    def value(self, name: str) -> str:
        return self.one(f"#{name} textarea, #{name} input").get_attribute("value")

    def until(self, found, seconds: float = 60):
        from selenium.common.exceptions import WebDriverException

        end, error = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if result := found():
                    return result
            except WebDriverException as failed:
                error = failed
            time.sleep(0.1)
        raise AssertionError(
            f"nothing came in {seconds} s; the page says {self.browser.find_element('tag name', 'body').text!r}"
        ) from error

    def toast(self) -> str:
        return self.until(lambda: self.browser.find_element("css selector", ".toast-body").text)


def test_in_a_browser(desk, embedded, browser, tmp_path):
    """Edit, see, retract, undo, save, as on a phone; nonsense is one sentence; nothing is asked of another machine."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    page = Page(browser)
    port = free_port()
    with running(desk.service, "testbed", "small", port=port):
        browser.get(f"http://127.0.0.1:{port}")
        page.put("prompt", TEXT)
        page.put("target", "Tamil")
        page.until(lambda: page.value("subject") == "Sophie Calle")
        page.click("#edit")
        page.until(lambda: "Edited: Sophie Calle → Tamil" in page.text("result"))
        assert "French.\n✓ Tamil." in page.text("result").replace(" ✓", "\n✓")
        page.until(lambda: "in scope: Calle" in page.text("scope"))
        marked = browser.find_elements("css selector", "#scope details[open] .token.in")
        assert [own.text.split()[0] for own in marked] == ["le"] * 4 and all(float(own.text.split()[1]) > 0.4 for own in marked)
        narrow = "return document.documentElement.scrollWidth <= 390"
        assert browser.execute_script(narrow)

        page.tab("File")
        file = tmp_path / "nonsense.json"
        file.write_bytes(b"\x00\xff")
        browser.find_element("css selector", "#records input[type=file]").send_keys(str(file))
        assert "nonsense.json: not UTF-8 text" in page.toast().lower().replace("utf", "UTF")
        assert page.text("found") == "" and not page.one("#edit-all").is_enabled() and len(desk.requests()) == 1

        page.tab("All edits")
        page.until(lambda: "Edits: 1" in page.text("counted"))
        assert browser.execute_script(narrow)
        page.click("#edits label:last-of-type input[type=checkbox]")
        page.click("#retract")
        page.until(lambda: "Edits: 0" in page.text("counted"))
        assert desk.requests() == [] and desk.try_text(TEXT, 4).edited.startswith("French")
        page.click("#undo")
        page.until(lambda: "Edits: 1" in page.text("counted"))
        page.put("folder", str(tmp_path / "kept"))
        page.click("#save")
        page.until(lambda: "Saved to" in page.text("saved"))
        foreign = "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin))"
        assert browser.execute_script(foreign) == []
        assert [own["message"] for own in browser.get_log("browser") if "Error" in own["message"]] == []
    ids = torch.tensor([desk.service.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad(), desk.service.generating() as model:
        torch.testing.assert_close(load_edits(copy.deepcopy(embedded[0]), tmp_path / "kept")(ids).logits, model(ids).logits)
