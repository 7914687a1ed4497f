"""What is read, left out, counted, kept and refused at the edges of commands, files, caches and processes."""

import csv
import dataclasses
import json
import time
import types

import pytest
import torch
from test_cli_records import FACTS, Kept
from test_training import trainer
from torch import nn

from comeba_ext import testbed
from comeba_ext.cli.inputs import continued
from comeba_ext.cli.keeping import rows_of
from comeba_ext.cli.records import clashes, to_make
from comeba_ext.cli.runs import unsuited
from comeba_ext.data import ReadResult, read_requests, read_texts
from comeba_ext.errors import ComebaError, RequestError, StorageError
from comeba_ext.evaluation import predict_base
from comeba_ext.experiments import processes
from comeba_ext.experiments.kept_base import kept_base
from comeba_ext.experiments.processes import _without
from comeba_ext.forward.architectures import context_length
from comeba_ext.kernels import build, loader
from comeba_ext.storage import alone, check_identity, digest_of, identity
from comeba_ext.text.request import EditRequest, consecutive_batches
from comeba_ext.training import Trainer


def test_an_empty_folder_that_was_there_stays(tmp_path):
    with alone(tmp_path / "made"):
        pass
    assert not (tmp_path / "made").exists()
    (tmp_path / "own").mkdir()
    with alone(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()
    with pytest.raises(RuntimeError), alone(tmp_path / "own"):
        raise RuntimeError
    assert (tmp_path / "own").is_dir()


class OneMatrix(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.config = types.SimpleNamespace(model_type="x", hidden_size=8, num_hidden_layers=1, vocab_size=5)
        self.layer = nn.Linear(8, 8, bias=False)
        self.layer.weight.data = scale * torch.linspace(-1, 1, 64).reshape(8, 8)


def test_small_weights_are_told_apart_as_large_ones_are():
    """By their relative difference: half-precision rounding is let through, a few percent are not, whatever the scale."""
    for scale in (1.0, 1e-2, 1e-3, 1e-4):
        known = identity(OneMatrix(scale), ["layer"])
        check_identity(known, OneMatrix(scale).bfloat16(), "it")
        with pytest.raises(StorageError, match="layer"):
            check_identity(known, OneMatrix(1.03 * scale), "it")


def test_a_digest_is_of_the_whole_file(tmp_path):
    """Files larger than what is read at once that differ in their last byte."""
    for name, last in (("a", b"0"), ("b", b"1"), ("c", b"0")):
        (tmp_path / name).write_bytes(bytes(3 << 20) + last)
    a, b, c = (digest_of(tmp_path / name) for name in "abc")
    assert a == c != b


def test_what_is_left_out_is_counted_by_its_reason():
    a, b, c = (EditRequest(*FACTS[0], target) for target in "ABC")
    kept = Kept()
    kept.edit([a])
    plan = to_make([a], kept)  # live
    assert (plan.requests, plan.live, plan.declined, plan.repeated) == ([], 1, 0, 0)
    plan = to_make([b, a, b, b], kept)  # up to the live one, a new one, and the same again
    assert (plan.requests, plan.live, plan.declined, plan.repeated) == ([b], 2, 0, 1)
    kept.edit([c], refused="C")
    plan = to_make([c, c], kept)
    assert (plan.requests, plan.live, plan.declined, plan.repeated) == ([], 0, 2, 0)


def test_back_to_what_was_repeats_nothing():
    a, b = (EditRequest(*FACTS[0], target) for target in "AB")
    assert clashes([(0, a), (1, b), (2, a)]).counts == {"overtaken": 1}
    assert clashes([(0, a), (1, a), (2, b), (3, b), (4, b)]).counts == {"overtaken": 2, "repeated": 3}


def test_what_is_skipped_stands_in_the_files_order(tmp_path):
    """Whether it was found out by reading or by what is asked of the model."""
    good, bad = {"prompt": "{} is", "subject": "Oslo", "target_new": "x"}, {"prompt": "no", "subject": "Oslo", "target_new": "x"}
    rows = [{**good, "subject": "long"}, bad, good, bad, {**good, "subject": "long"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))

    def check(_, request):
        if request.subject == "long":
            raise RequestError("too long")

    used, skipped = read_requests(tmp_path / "a.json").usable(check)
    assert [skip["index"] for skip in skipped] == [0, 1, 3, 4] and len(used) == 1


def test_a_rows_line_is_its_first(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,subject,target_new\n{} is,Oslo,x\n"{} is\nof",Nobody\n{} is,Rome\n')
    assert [skip["line"] for skip in read_requests(tmp_path / "a.csv").skipped] == [3, 5]


def test_the_limit_of_the_csv_module_is_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\nsome words\n")
    assert list(read_texts(tmp_path / "a.csv")) == ["some words"] and csv.field_size_limit() == before


def test_what_was_true_is_the_first_of_zsres_answers():
    record = {"subject": "Ann", "src": "What does Ann speak?", "alt": "Latin"}
    of = lambda **more: EditRequest.from_record({**record, **more}).ground_truth  # noqa: E731
    assert of(answers=["French", "français"]) == "French" and of(answers=[]) is None and of() is None


def test_a_record_without_a_case_is_one_of_versions_that_knew_none():
    """Digests of records tell runs apart: a field that is new must not make an earlier run another one."""
    record = EditRequest("{} is", "Oslo", "x").to_record()
    assert not {"aliases", "portability_aliases", "questions", "case"} & set(record)
    assert EditRequest("{} is", "Oslo", "x", case="7").to_record()["case"] == "7"


def test_an_id_of_two_facts_is_the_first_ones(tmp_path):
    one = EditRequest("{} is", "Oslo", "x", request_id="a")
    two, again = dataclasses.replace(one, subject="Rome"), dataclasses.replace(one, target_new="y")
    used, skipped = ReadResult([one, two, again], 3, []).usable(lambda *_: None)
    assert used == [one, again] and [skip["index"] for skip in skipped] == [1] and "'a'" in skipped[0]["reason"]


def test_kernels_built_for_another_cuda_are_left_alone(tmp_path, monkeypatch):
    """The same version of torch, built for another CUDA: its library has other names."""
    here = {"version": "2.9.0", "cuda": "13.0"}
    monkeypatch.setattr(build, "torch_facts", lambda: here)
    monkeypatch.setattr(loader, "_local_archs", lambda: ("90a",))
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "kernels" / "loader.py"))
    described = tmp_path / "_kernels.json"
    for other, taken in (({}, True), ({"cuda": "12.8"}, False), ({"version": "2.8.0"}, False)):
        described.write_text(json.dumps({"torch": here | other, "archs": ["90a"], "emulated": False}))
        assert (loader._ahead_of_time(False) is not None) == taken


def test_a_case_is_run_by_the_same_command_without_jobs_and_cases():
    """However they are written: a process that was given --jobs again would start processes of its own, without end."""
    typed = [*"experiment e.yaml --jobs=2 --case".split(), "a b", *"--case=c --seed 1 --jobs 3 --out=o --records case=f".split()]
    assert _without(typed, "--jobs", "--case") == ["experiment", "e.yaml", "--seed", "1", "--out=o", "--records", "case=f"]


def test_processes_share_cores_and_take_gpus_in_turn(tmp_path, monkeypatch):
    seen = []

    class Process:
        def __init__(self, command, stdout, stderr, env):
            seen.append((command, env))

        def wait(self):
            return 0

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 9)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    run = lambda *argv: [  # noqa: E731
        monkeypatch.setattr(processes.sys, "argv", ["comeba", "experiment", "e", *argv]),
        [processes._run(number, f"case {number}", 4, tmp_path / "log.txt", []) for number in range(3)],
    ]
    run()
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in seen] == ["0", "1", "0"] and {env["OMP_NUM_THREADS"] for _, env in seen} == {"2"}
    assert [command[-2:] for command, _ in seen] == [["--case", f"case {number}"] for number in range(3)]
    seen.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run("--device", "cuda:1")
    assert not any("CUDA_VISIBLE_DEVICES" in env for _, env in seen) and {env["OMP_NUM_THREADS"] for _, env in seen} == {"7"}


def test_what_was_asked_of_other_records_is_no_answer(tmp_path):
    """As many of them."""
    (model, tokenizer), facts = testbed.load(), testbed.facts()
    how = {"generate": False, "writing": None}
    for own in (facts[:2], facts[2:4], facts[:2]):
        assert kept_base(tmp_path / "base.json", model, tokenizer, own, **how) == predict_base(model, tokenizer, own, **how)


@pytest.mark.parametrize("mode, refused", [(0o755, False), (0o700, False), (0o775, True), (0o757, True), (0o720, True), (0o702, True)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_cache_that_group_or_others_may_write_is_not_loaded(tmp_path, monkeypatch, mode, refused, which):
    places = [tmp_path / "cache", tmp_path / "cache/key", tmp_path / "cache/key/_kernels.so"]
    places[1].mkdir(parents=True)
    places[2].write_bytes(b"")
    for place in places:
        place.chmod(0o755)
    places[which].chmod(mode)
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(places[0]))
    if refused:
        with pytest.raises(loader.BuildFailure, match="others may write"):
            loader._require_own(places[2])
    else:
        loader._require_own(places[2])


def test_what_a_request_may_ask_for_is_taken_up_to_the_limit():
    pytest.importorskip("pydantic")
    from comeba_ext.serving.requests import ChatRequest, CompletionRequest, Limits

    limits = Limits(new_tokens=10, texts=8, logprobs=5)
    text = lambda **more: CompletionRequest(**{"model": "m", "prompt": "a"} | more).checked(limits)  # noqa: E731
    chat = lambda **more: ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], **more).checked(limits)  # noqa: E731
    assert text(n=8).n == 8 and text(prompt=["a"] * 4, n=2).n == 2 and text(prompt=["a"] * 8).n == 1
    assert text(max_tokens=10).max_new_tokens == 10 and text(logprobs=5).logprobs == 5 and len(text(stop=["s"] * 16).stop) == 16
    for more in ({"n": 9}, {"prompt": ["a"] * 3, "n": 3}, {"prompt": ["a"] * 9}, {"max_tokens": 11}, {"logprobs": 6}, {"stop": ["s"] * 17}):
        with pytest.raises(RequestError, match="at most|0 to 5"):
            text(**more)
    assert text().fit and not text(max_tokens=10).fit and chat().fit and chat().max_new_tokens == 10 and not chat(max_tokens=3).fit
    assert (chat(logprobs=True).logprobs, chat(logprobs=True, top_logprobs=2).logprobs, chat(logprobs=False).logprobs) == (0, 2, None)
    assert chat(max_tokens=3, max_completion_tokens=4).max_new_tokens == 4


def test_a_log_is_read_in_its_order():
    def edit(step, names, superseded=(), declined=()):
        requests = [EditRequest("{} is", name, "x", request_id=name).to_record() for name in names]
        lost = [{"request_id": name, "prompt": f"{name} is", "subject": name, "target_new": "x"} for name in declined]
        return {
            "event": "edit",
            "step": step,
            "requests": requests,
            "answered": [True] * len(names),
            "superseded": list(superseded),
            "declined": lost,
        }

    def states(*events, live):
        return {row["id"]: row["state"] for row in rows_of(list(events), set(live))}

    first = edit(1, ["a", "b"], declined=["c"])
    gone = {"event": "retract", "request_ids": ["a"], "step": 2}
    assert states(first, gone, live="b") == {"a": "taken back", "b": "live", "c": "declined"}
    back = lambda step: {"event": "rollback", "step": step}  # noqa: E731
    assert states(first, gone, back(2), live="b")["a"] == "taken back"  # as after step 2
    assert states(first, gone, back(1), live="ab") == {"a": "live", "b": "live", "c": "declined"}
    assert states(first, gone, back(0), live="") == {"a": "taken back", "b": "taken back", "c": "declined"}
    again = edit(3, ["d"], superseded=["b"])
    assert states(first, gone, again, live="d") == {"a": "taken back", "b": "superseded", "c": "declined", "d": "live"}
    assert states(first, gone, again, back(2), live="b")["b"] == "live"
    # One id, which a fact keeps when it is edited again: what was superseded stays that.
    twice = [edit(1, ["a"]), edit(2, ["a"], superseded=["a"]), {"event": "retract", "request_ids": ["a"], "step": 3}]
    assert [row["state"] for row in rows_of(twice, set())] == ["superseded", "taken back"]
    assert [row["state"] for row in rows_of([*twice, back(2)], {"a"})] == ["superseded", "live"]


def test_settings_suit_a_model_where_half_of_the_edits_took():
    of = lambda answered, declined=0: types.SimpleNamespace(  # noqa: E731
        log=[{"event": "edit", "answered": answered, "declined": [{}] * declined}, {"event": "rollback", "step": 0}]
    )
    assert not unsuited(of([True, False]), 2) and unsuited(of([True, False, False]), 3)
    assert unsuited(of([True, False], 1), 3) and not unsuited(of([False]), 1)


def test_a_prompt_may_fill_the_context_and_no_more():
    model, tokenizer = testbed.load()
    limit = context_length(model)
    text = " a" * (limit - 2)
    size = len(tokenizer(text)["input_ids"])
    continued(model, tokenizer, [text], limit - size)
    with pytest.raises(ComebaError, match="context"):
        continued(model, tokenizer, [text], limit - size + 1)


def test_a_trainings_minutes_are_minutes():
    late = lambda minutes, seconds: Trainer._late(types.SimpleNamespace(config=types.SimpleNamespace(minutes=minutes)), seconds)  # noqa: E731
    assert not late(2.0, 119.0) and late(2.0, 121.0) and not late(None, 1e9)


def test_a_case_that_edits_a_fact_of_the_batch_again_is_put_whole_into_the_next():
    of = lambda n, case=None: EditRequest("{} is", f"s{n}", "x", case=case)  # noqa: E731
    found = consecutive_batches([of(0), of(1, "a"), of(0, "a")], 5)
    assert [[request.subject for request in batch] for batch in found] == [["s0"], ["s1", "s0"]]


def test_the_seconds_of_a_training_are_those_that_passed(tiny_model, tokenizer, tmp_path):
    """Over its interruptions, those in between left out."""
    spent, results = 0.0, []
    for steps in (3, 6):
        start = time.monotonic()
        results.append(trainer(tiny_model, tokenizer, tmp_path, steps=steps).run(progress=False)["seconds"])
        spent += time.monotonic() - start
        time.sleep(0.5)
        assert 0 < results[-1] <= spent
    assert results[0] < results[1]
