"""Protocols: what is evaluated when, and that a run stopped anywhere ends in the same table."""

import contextlib
import copy
import json
import mmap
import sys
from types import SimpleNamespace

import pytest
import torch
from test_editor import TEXTS, small_model, some_requests

from comeba_ext import EditConfig, Editor, EditRequest, evaluate, methods
from comeba_ext.editing.report import peak_memory, reset_peak_memory
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.evaluation import Protocol, Writing, predict_base, protocols, run_protocol
from comeba_ext.evaluation.protocols import complete_result, latest
from comeba_ext.evaluation.run_log import RunLog
from comeba_ext.methods import method_named
from comeba_ext.methods.mend import MendConfig
from comeba_ext.methods.trained import save_learner
from comeba_ext.text.request import consecutive_batches

CONFIG = EditConfig(layers=(1, 2), lam=20.0, prefixes=1, prefix_length=4, steps=4, lr=0.1, clamp=2.0)


def requests_with_prompts(count):
    return [
        EditRequest(
            r.prompt,
            r.subject,
            r.target_new,
            rephrase_prompts=(f"They say {r.subject} is",),
            locality_prompts=(("The Eiffel Tower stands in the city of", "Paris"),),
            request_id=f"r{n}",
        )
        for n, r in enumerate(some_requests(count))
    ]


@pytest.fixture
def setting(tiny_model, tokenizer):
    """``(model, tokenizer, covariance)`` of a tiny GPT-2."""
    model = small_model(tiny_model)
    editor = Editor(model, tokenizer, CONFIG)
    editor.collect_covariance(TEXTS, tokens=10**6, progress=False)
    covariance = editor.covariance
    editor.close()
    return model, tokenizer, covariance


def run(setting, folder, requests, protocol, method="COMEBA-HK", config=CONFIG, **options):
    model, tokenizer, covariance = setting
    return run_protocol(model, tokenizer, requests, protocol, folder, method=method, config=config, covariance=covariance, **options)


def table(result):
    return {n: {k: v for k, v in m.items()} for n, m in result.checkpoints.items()}


def test_consecutive_is_editing_and_evaluating_by_hand(setting, tmp_path):
    model, tokenizer, covariance = setting
    requests = requests_with_prompts(7)
    seen = []
    result = run(
        setting,
        tmp_path,
        requests,
        Protocol(batch_size=2, checkpoints=(3,), writing=Writing(5)),
        measure=lambda editor, asked: seen.append(len(asked)) or {"step": editor.step},
    )
    base = predict_base(model, tokenizer, requests, writing=Writing(5))
    editor = Editor(model, tokenizer, CONFIG)
    editor.set_covariance(covariance)
    expected = {}
    for end in (2, 4, 6, 7):
        editor.edit(requests[end - 2 if end < 7 else 6 : end])
        if end in (4, 7):
            expected[end] = evaluate(model, tokenizer, requests[:end], base, writing=Writing(5))
    editor.close()
    assert table(result) == expected  # the first batch that reaches 3 ends at 4
    assert seen == [4, 7] and {edits: own["step"] for edits, own in result.extra.items()} == {4: 2, 7: 4}
    assert all(own["saved_bytes"] > 1000 for own in result.extra.values())
    assert result.final.records == 7
    assert [s["edits"] for s in result.steps] == [2, 4, 6, 7]
    efficiency = result.efficiency()
    assert efficiency["seconds_per_edit"] > 0 and efficiency["peak_memory"] > 0
    assert not (tmp_path / "edits").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    answers = [a for line in lines if line["event"] == "record" for a in line["answers"]]
    assert len(answers) == (4 + 7) * 3
    assert {a["metric"] for a in answers} == {"reliability", "generality", "locality"}
    assert all(isinstance(a[text], str) for a in answers for text in ("predicted", "generated", "written"))


def test_a_bar_for_all_that_takes_long(setting, tmp_path, capfd):
    """Asking takes longer than editing with some methods: of the unedited model, and at every checkpoint."""
    for progress in (False, True):
        protocol = Protocol(batch_size=2, checkpoints=(2,), generate=False)
        run(setting, tmp_path / str(progress), requests_with_prompts(4), protocol, progress=progress)
        shown = {line.partition(":")[0] for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "100%" in line}
        assert shown == ({"base", "COMEBA-HK", "evaluate"} if progress else set())


def test_single_round_edits_every_batch_into_the_unedited_model(setting, tmp_path):
    model, tokenizer, covariance = setting
    requests = requests_with_prompts(5)
    result = run(setting, tmp_path, requests, Protocol("single_round", batch_size=2, generate=False))
    assert list(result.checkpoints) == [5]
    for start in (0, 2, 4):
        editor = Editor(model, tokenizer, CONFIG)
        editor.set_covariance(covariance)
        editor.edit(requests[start : start + 2])
        alone = evaluate(model, tokenizer, requests[start : start + 2], generate=False)
        editor.close()
        for row, own in zip(result.final.per_record[start : start + 2], alone.per_record, strict=True):
            assert row == own


@pytest.mark.parametrize("name", ["COMEBA-HK", "MEMIT", "FT"])
@pytest.mark.parametrize(
    "protocol",
    [Protocol(batch_size=2, checkpoints=(4,), save_every=2, generate=False), Protocol("single_round", batch_size=2, generate=False)],
)
def test_stopped_anywhere_it_ends_in_the_same_table(setting, tmp_path, monkeypatch, name, protocol):
    method, config = methods.method_named(name), CONFIG
    if name == "FT":
        config = method.config_class(layers=(1,), lr=0.01, steps=3, weight_decay=0.0)
    requests = requests_with_prompts(7)
    whole = table(run(setting, tmp_path / "whole", requests, protocol, method, config))
    real, stops = RunLog.append, 0
    for stop in range(1, 30):
        calls = []

        def dying(self, records, stop=stop, calls=calls):
            calls.append(1)
            if len(calls) == stop:  # a torn write, then nothing
                with self.path.open("a") as file:
                    file.write("".join(json.dumps(r) + "\n" for r in records)[: 3 + 40 * stop])
                raise KeyboardInterrupt
            real(self, records)

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "append", dying)
            try:
                run(setting, tmp_path / f"{stop}", requests, protocol, method, config)
                break
            except KeyboardInterrupt:
                stops += 1
        resumed = run(setting, tmp_path / f"{stop}", requests, protocol, method, config)
        assert table(resumed) == whole
        assert [s["edits"] for s in resumed.steps] == [2, 4, 6, 7]
    assert stops == (4 if protocol.name == "single_round" else 6)
    again = run(setting, tmp_path / "whole", requests, protocol, method, config)  # complete: nothing is run
    assert table(again) == whole


def test_slow_batches_are_saved_before_their_number_is_full(setting, tmp_path, monkeypatch):
    requests, real, edited = requests_with_prompts(6), Editor.edit, []
    protocol = Protocol(batch_size=1, generate=False)
    clock = [0.0]
    monkeypatch.setattr(protocols, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(self, batch):
        if len(edited) == 5:
            raise KeyboardInterrupt
        clock[0] += protocols.SAVE_SECONDS / 2
        edited.append(self.step)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", slow)
        with pytest.raises(KeyboardInterrupt):
            run(setting, tmp_path / "killed", requests, protocol)
    edited.clear()
    monkeypatch.setattr(Editor, "edit", lambda self, batch: edited.append(self.step) or real(self, batch))
    resumed = run(setting, tmp_path / "killed", requests, protocol)
    assert edited == [4, 5]  # two batches are as long as a save may be away
    assert table(resumed) == table(run(setting, tmp_path / "whole", requests, protocol))


def test_a_log_that_knew_less_is_gone_on_with(tmp_path):
    RunLog(tmp_path / "log.jsonl", {"method": "FT"}).keep([{"event": "edit", "edits": 1}])
    assert RunLog(tmp_path / "log.jsonl", {"method": "FT", "writing": None}).records == [{"event": "edit", "edits": 1}]
    with pytest.raises(StorageError, match="another run .writing differ"):
        RunLog(tmp_path / "log.jsonl", {"method": "FT", "writing": {"answer_tokens": 8}})


def test_a_folder_of_another_run_is_refused(setting, tmp_path):
    requests = requests_with_prompts(2)
    run(setting, tmp_path, requests, Protocol(batch_size=2, generate=False))
    for other in (
        {"protocol": Protocol(batch_size=1, generate=False)},
        {"requests": requests[:1]},
        {"config": CONFIG.replace(lam=3.0)},
        {"identity": {"measures": ["text"]}},
    ):
        arguments = {"requests": requests, "protocol": Protocol(batch_size=2, generate=False), **other}
        with pytest.raises(StorageError, match="another run"):
            run(setting, tmp_path, **arguments)
    model, tokenizer, covariance = setting
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_proj.weight.mul_(1.1)
    other = copy.deepcopy(covariance)
    other.moments = {name: 2 * moments for name, moments in other.moments.items()}
    for changed in ((tuned, tokenizer, covariance), (copy.deepcopy(model).double(), tokenizer, covariance), (model, tokenizer, other)):
        with pytest.raises(StorageError, match="another run"):
            run(changed, tmp_path, requests, Protocol(batch_size=2, generate=False))
    (tmp_path / "log.jsonl").write_text("nonsense\n")
    with pytest.raises(StorageError, match="not a log"):
        run(setting, tmp_path, requests, Protocol(batch_size=2, generate=False))


@pytest.mark.parametrize("name", ["MEND", "IKE"])
def test_a_run_knows_what_was_in_the_files_that_its_settings_name(setting, tmp_path, monkeypatch, name):
    """Killed or complete, it is not gone on with, or given for, another one of the same name."""
    model, tokenizer, covariance = setting
    kind, file = method_named(name), tmp_path / ("editor.safetensors" if name == "MEND" else "shown.json")
    shown = [{"prompt": "The capital of {} is", "subject": subject, "target_new": "Rome"} for subject in ("Peru", "Chad")]

    def write(other):
        if name == "IKE":
            file.write_text(json.dumps(shown[:1] if other else shown))
        else:
            editor = Editor(model, tokenizer, kind.config_class(layers=(1, 2), rank=6, seed=other), method=name)
            save_learner(editor.method.new_learner(), file, {"kind": "editor", "method": name})
            editor.close()

    own = {"editor": str(tmp_path), "rank": 6} if name == "MEND" else {"demonstrations": str(file), "shown": 1}
    config = kind.config_class(layers=(1, 2), **own)
    given = {"requests": requests_with_prompts(3), "method": name, "config": config}
    given["protocol"] = Protocol(batch_size=1, save_every=1, generate=False)
    write(0)
    whole = run(setting, tmp_path / "whole", **given)
    real = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda self, batch: real(self, batch) if self.step < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(setting, tmp_path / "killed", **given)
    monkeypatch.undo()
    asked = {**given, "method": kind, "covariance": covariance}
    write(1)
    for folder in ("whole", "killed"):
        with pytest.raises(StorageError, match="another run .files differ"):
            run(setting, tmp_path / folder, **given)
        with pytest.raises(StorageError, match="another run .files differ"):
            complete_result(model, folder=tmp_path / folder, **asked)
    file.unlink()
    with pytest.raises(StorageError, match="no such file"):
        run(setting, tmp_path / "killed", **given)
    assert complete_result(model, folder=tmp_path / "whole", **asked) is None  # nobody knows
    write(0)
    assert table(run(setting, tmp_path / "killed", **given)) == table(whole)
    assert table(complete_result(model, folder=tmp_path / "whole", **asked)) == table(whole)


def test_a_method_that_is_not_ready_has_no_result(setting, tmp_path):
    """A run without a trained editor, or with a broken one, does not end as one that failed."""
    (tmp_path / "editor.safetensors").write_bytes(b"nothing")
    for folder, words in ((None, "comeba train MEND"), (str(tmp_path), "truncated")):
        config = MendConfig(layers=(1, 2), editor=folder)
        for _ in range(2):
            with pytest.raises(ComebaError, match=words):
                run(setting, tmp_path / f"run {words}", requests_with_prompts(2), Protocol(generate=False), "MEND", config)


def test_edits_whose_log_is_gone_are_not_gone_on_from(setting, tmp_path, monkeypatch):
    requests = requests_with_prompts(4)
    real = Editor.edit

    def dying(self, batch):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Editor, "edit", dying)
        run(setting, tmp_path / "other", requests, Protocol(batch_size=1, save_every=1, generate=False), config=CONFIG.replace(lam=900.0))
    assert (tmp_path / "other/edits").exists()
    (tmp_path / "other/log.jsonl").unlink()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "other/edits").iterdir()}
    with pytest.raises(StorageError, match="choose another folder"):  # nor are they thrown away: they may be somebody's
        run(setting, tmp_path / "other", requests, Protocol(batch_size=1, save_every=1, generate=False))
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "other/edits").iterdir()}


@pytest.mark.parametrize("name", ["consecutive", "single_round"])
def test_a_method_that_cannot_go_on_ends_the_run(setting, tmp_path, monkeypatch, name):
    requests = requests_with_prompts(6)
    protocol = Protocol(name, batch_size=2, checkpoints=(2,), generate=False)
    real, calls = Editor.edit, []

    def diverging(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RequestError("the update is not finite")
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", diverging)
        result = run(setting, tmp_path, requests, protocol)
    assert result.failed == 4 and "not finite" in result.error
    # A single-round run has measured four records one batch at a time; a consecutive one was to look again at the end.
    assert {n: m.records for n, m in result.checkpoints.items()} == ({4: 4} if name == "single_round" else {2: 2})
    assert [step["edits"] for step in result.steps] == [2, 4] and result.efficiency(2)["seconds_per_edit"] > 0
    again = run(setting, tmp_path, requests, protocol)  # complete as it is
    assert (again.failed, again.error, table(again)) == (result.failed, result.error, table(result))


def test_what_cannot_be_edited_is_said_before_anything_runs(setting, tmp_path):
    with pytest.raises(RequestError, match="no request"):
        run(setting, tmp_path / "none", [], Protocol())
    long = EditRequest("very " * 200 + "{}", "x", "y")
    with pytest.raises(RequestError, match="tokens"):
        run(setting, tmp_path / "long", [*requests_with_prompts(3), long], Protocol(batch_size=1, generate=False))
    log = tmp_path / "long/log.jsonl"
    assert not log.exists() or '"edit"' not in log.read_text()


@contextlib.contextmanager
def ballast():
    """Half a GB of pages that are there inside and nowhere afterwards (what the heap takes may be free pages that it kept)."""
    with mmap.mmap(-1, 2**29) as pages:
        for page in range(0, len(pages), mmap.PAGESIZE):
            pages[page] = 1
        yield


def test_peak_memory_is_that_of_a_step(setting, tmp_path):
    """Of this process only while it runs: what other tests held before must not show, so all is seen from a reset."""
    cpu, half = torch.device("cpu"), 2**28
    reset_peak_memory(cpu)
    with ballast():
        with_ballast = peak_memory(cpu)
    result = run(setting, tmp_path, requests_with_prompts(2), Protocol(batch_size=2, generate=False))
    if sys.platform != "linux":  # nothing to reset elsewhere: the peak is that of the process
        return
    assert result.efficiency()["peak_memory"] <= with_ballast - half
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    with ballast():
        assert peak_memory(cpu) > before + half
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before + half


def test_retention_is_against_the_latest_target(setting, tmp_path):
    first, second, third = requests_with_prompts(3)
    changed = EditRequest(first.prompt, first.subject, "Warsaw", request_id="r0")
    requests = [first, second, changed, third]
    assert [len(b) for b in consecutive_batches([first, changed, second], 3)] == [1, 2]
    assert latest(requests) == [second, changed, third]  # in the order in which they were made
    result = run(setting, tmp_path, requests, Protocol("sequential", batch_size=7, generate=False))
    assert [s["requests"] for s in result.steps] == [1, 1, 1, 1]
    assert [row["target_new"] for row in result.final.per_record] == [second.target_new, "Warsaw", third.target_new]


def test_the_model_comes_back_unhooked(setting, tmp_path):
    model, tokenizer, _ = setting
    ids = tokenizer("The capital of Peru is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises(RequestError, match="'r0'"):
        run(setting, tmp_path / "a", [*requests_with_prompts(2), EditRequest("{} is", "Lima", "x", request_id="r0")], Protocol())
    run(setting, tmp_path / "b", requests_with_prompts(2), Protocol(generate=False))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    Editor(model, tokenizer, CONFIG).close()


def test_bad_protocols():
    for bad in ({"name": "nonsense"}, {"batch_size": 0}, {"checkpoints": (0,)}, {"save_every": 1.5}):
        with pytest.raises(ConfigError):
            Protocol(**bad)


def test_every_batch_of_a_single_round_finds_the_unedited_model(setting, tmp_path, monkeypatch):
    real, steps = Editor.edit, []
    monkeypatch.setattr(Editor, "edit", lambda self, batch: steps.append(self.step) or real(self, batch))
    run(setting, tmp_path, requests_with_prompts(5), Protocol("single_round", batch_size=2, generate=False))
    assert steps == [0, 0, 0]
