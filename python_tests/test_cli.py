"""The command line as a user meets it: one JSON object, true counts, exit codes, clear errors."""

import itertools
import json
import shutil

import pytest
from typer.testing import CliRunner

from comeba_ext import Editor, testbed
from comeba_ext.cli import app
from comeba_ext.cli.inputs import size_of_edits
from comeba_ext.cli.runs import Saves, unsuited
from comeba_ext.cli.terminal import Report
from comeba_ext.errors import ComebaError

pytestmark = pytest.mark.usefixtures("one_block")


def run(*args: str):
    return CliRunner().invoke(app, [str(a) for a in args])


def output(*args: str) -> dict:
    """The command's JSON object, which must be all that stdout holds."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six usable facts, one of them stated twice with different targets, and two unusable lines."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [r.to_record() for r in testbed.facts()[:5]]
    rows.append({**rows[0], "target_new": rows[0]["ground_truth"], "request_id": "again"})
    rows.append({"prompt": "no subject here", "subject": "Nobody", "target_new": "x"})
    rows.append({"prompt": "{} " + "very " * 200 + "long", "subject": "Nobody", "target_new": "x"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def edited(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("edits") / "out"
    return out, output("edit", "testbed", records, "--out", out, "--batch-size", 3)


def test_demo_reports_every_batch_and_ends_edited():
    result = output("demo", "--edits", 6, "--batch-size", 3)
    assert [row["edits"] for row in result["batches"]] == [3, 6]
    assert result["reliability"] >= 0.8 and result["locality"] >= 0.8
    for example in result["examples"]:
        assert example["before"] != example["after"]
    assert result["records"] == {"read": 6, "used": 6, "skipped": []} and result["reliability_written"] >= 0.8


def test_demo_prints_a_table():
    result = run("demo", "--edits", 2, "--batch-size", 2)
    assert result.exit_code == 0
    for word in ("reliability", "generality", "locality", "edited to say"):
        assert word in result.stdout
    assert result.stdout.index("written: what the model writes") < result.stdout.rindex("teacher-forced")  # what is believed comes first


def test_edit_counts_every_record(edited):
    _, result = edited
    assert result["records"]["read"] == 8 and result["records"]["used"] == 6
    reasons = {s["index"]: s["reason"] for s in result["records"]["skipped"]}
    assert set(reasons) == {6, 7}
    assert "not in the prompt" in reasons[6] and "context" in reasons[7]
    assert result["edits"] == 6
    first, again = testbed.facts()[0], {"overtaken": 1}
    assert result["contradicting"] == [{"prompt": first.text, "records": [0, 5], "targets": [first.target_new, first.ground_truth]}]
    assert result["duplicates"] == [] and result["repeated"] == 0 and result["records"].items() >= again.items()


def test_edit_refuses_to_overwrite_and_resumes(edited, records):
    out, _ = edited
    refused = run("edit", "testbed", records, "--out", out, "--json")
    assert refused.exit_code == 1 and "--resume" in json.loads(refused.stdout)["error"]
    again = output("edit", "testbed", records, "--out", out, "--resume")
    assert again["edits"] == 0 and again["earlier_edits"] == 6


def test_interrupted_edit_resumes_to_the_same_state(edited, records, tmp_path, monkeypatch):
    from comeba_ext import load_edits
    from comeba_ext.editor import Editor
    from comeba_ext.layers.attachment import attachments

    original, calls = Editor._edit, []

    def interrupted(self, *args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "_edit", interrupted)
        stopped = run("edit", "testbed", records, "--out", tmp_path / "o", "--batch-size", 3, "--json")
    assert stopped.exit_code == 130
    assert json.loads(stopped.stdout)["error"] == f"interrupted; 3 edits of this run are saved in {tmp_path / 'o'}; go on with --resume"
    rest = output("edit", "testbed", records, "--out", tmp_path / "o", "--batch-size", 3, "--resume")
    assert (rest["earlier_edits"], rest["edits"]) == (3, 3)
    whole, resumed = (attachments(load_edits(testbed.load()[0], f)) for f in (edited[0], tmp_path / "o"))
    for name in whole:
        scale = whole[name].delta.abs().max()
        assert (whole[name].delta - resumed[name].delta).abs().max() <= 1e-4 * scale


def test_edits_are_listed_without_a_model(edited, monkeypatch):
    out, result = edited
    monkeypatch.setattr(testbed, "load", None)
    listed = output("edits", "list", out)
    rows, facts = {row["id"]: row for row in listed["edits"]}, testbed.facts()[:5]
    ids = [name for step in result["steps"] for name in step["request_ids"]]
    answered = [own for step in result["steps"] for own in step["answered"]]
    assert list(rows) == ids and [row["answered"] for row in rows.values()] == answered
    overtaken, again = rows[ids[0]], rows["again"]
    assert (overtaken["state"], again["state"]) == ("superseded", "live") and overtaken["prompt"] == again["prompt"] == facts[0].text
    assert again["target_new"] == facts[0].ground_truth and overtaken["target_new"] == facts[0].target_new
    assert listed["live"] == 5 and [rows[name]["step"] for name in (ids[0], "again")] == [1, len(result["steps"])]
    said = run("edits", "list", out).stdout
    assert "again" in said and "superseded" in said and "5 live, 1 superseded" in said
    assert listed["records"] == {"read": 6, "used": 6, "skipped": []}
    assert "holds no edits" in run("edits", "list", out / "nowhere").stderr and not (out / "nowhere").exists()


def test_edits_are_taken_back_by_id_or_subject_and_can_be_made_again(edited, tmp_path):
    out, facts = tmp_path / "o", testbed.facts()
    shutil.copytree(edited[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for names, words in (
        (["again", "edit-99"], "no live edit"),
        (["again", facts[1].subject.upper()[:-1]], f"near are '{facts[1].subject}'"),
        ([edit_of(out, facts[0].target_new)], "superseded"),
    ):
        refused = run("edits", "retract", "testbed", out, *names, "--json")
        assert refused.exit_code == 1 and words in json.loads(refused.stdout)["error"]
        assert "nothing was taken back" in json.loads(refused.stdout)["error"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    done = output("edits", "retract", "testbed", out, facts[1].subject, "again")
    assert {row["subject"] for row in done["retracted"]} == {facts[0].subject, facts[1].subject} and done["live"] == 3
    assert done["step"] == edited[1]["steps"][-1]["step"] + 1
    says = output("generate", "testbed", "--edits", out, facts[1].text, facts[2].text)["generations"]
    assert says[0]["text"].startswith(facts[1].ground_truth) and says[1]["text"].startswith(facts[2].target_new)
    states = {row["id"]: row["state"] for row in output("edits", "list", out)["edits"]}
    assert list(states.values()).count("taken back") == 2 and states["again"] == "taken back"
    assert "is taken back" in run("edits", "retract", "testbed", out, "again").stderr


def edit_of(folder, target):
    return next(row["id"] for row in output("edits", "list", folder)["edits"] if row["target_new"] == target)


def test_what_cannot_be_taken_back_alone_says_so(tmp_path):
    fact, out = testbed.facts()[1], tmp_path / "o"
    one = ("--prompt", fact.prompt, "--subject", fact.subject, "--target", fact.target_new)
    run("edit", "testbed", "--out", out, *one, "--method", "FT-L")
    refused = run("edits", "retract", "testbed", out, fact.subject)
    assert refused.exit_code == 1 and "FT-L" in refused.stderr and "are as they were" in refused.stderr


def test_a_log_with_retractions_and_rollbacks_is_read_as_the_ledger_is(tmp_path):
    editor, facts = Editor(*testbed.load(), method="ICE"), testbed.facts()
    again = {"prompt": facts[0].prompt, "subject": facts[0].subject}
    steps = (
        lambda: editor.edit(facts[:2]),
        lambda: editor.edit([{**again, "target_new": "x"}]),
        lambda: editor.retract(editor.ledger.live()[0].request.request_id),
        lambda: editor.rollback(1),
        lambda: editor.edit([{**again, "target_new": "y"}]),
        lambda: editor.rollback(2),
        lambda: editor.rollback(1),
        lambda: editor.edit([{**again, "target_new": "z"}, facts[2]]),
        lambda: editor.rollback(0),
        lambda: editor.edit(facts[:1]),
    )
    for step in steps:
        step()
        editor.save_pretrained(tmp_path)
        listed = [row["id"] for row in output("edits", "list", tmp_path)["edits"] if row["state"] == "live"]
        assert listed == [entry.request.request_id for entry in editor.ledger.live()]
    editor.save_pretrained(tmp_path, inference_only=True)
    assert "for inference only" in run("edits", "list", tmp_path).stderr


def test_eval_with_and_without_edits(edited, records, tmp_path):
    out, _ = edited
    rows = tmp_path / "rows.jsonl"
    with_edits = output("eval", "testbed", records, "--edits", out, "--predictions", rows)
    without = output("eval", "testbed", records, "--no-generate")
    assert with_edits["records"]["used"] == 6 and len(with_edits["records"]["skipped"]) == 2
    assert with_edits["reliability"] > without["reliability"] + 0.4
    assert without["locality"] == 1.0
    assert len(rows.read_text().splitlines()) == 6
    assert with_edits["efficacy_score"] > without["efficacy_score"] + 0.4  # records that say what was true
    assert with_edits["reliability_unwritable"] == 0 and "text_changed" not in with_edits


def test_eval_of_unrelated_text_and_of_answers_that_cannot_be_written(edited, tmp_path):
    out, _ = edited
    facts = [fact.to_record() for fact in testbed.facts()[:3]]
    facts[0] |= {"target_new": "Yahoo! Incorporated"}
    path, texts = tmp_path / "facts.json", tmp_path / "texts.txt"
    path.write_text(json.dumps(facts))
    texts.write_text(
        "\n\n".join([f"{facts[1]['subject']} is named here, and said to be well known.", *itertools.islice(testbed.texts(9), 5)])
    )
    result = output("eval", "testbed", path, "--edits", out, "--texts", texts, "--no-generate")
    assert (
        result["texts"] == 5
        and 0 <= result["text_changed"] < 0.2
        and result["perplexity"] == pytest.approx(result["perplexity_before"], rel=0.2)
    )
    assert (result["reliability_unwritable"], result["reliability_prompts"]) == (1, 3)
    shown = run("eval", "testbed", path, "--edits", out, "--texts", texts, "--no-generate").stdout
    assert "1 of 3 (reliability)" in shown and "--long" in shown and "of the next tokens are others" in shown and "efficacy" in shown
    texts.write_text(f"{facts[1]['subject']} is named here, and said to be well known.")
    result = output("eval", "testbed", path, "--edits", out, "--texts", texts, "--no-generate")  # the rest is there
    assert "names an edited subject" in result["text_error"] and result["reliability_prompts"] == 3


@pytest.mark.parametrize("error, words", [(ComebaError("no such task"), "no such task"), (OSError("offline"), "OSError: offline")])
def test_a_task_that_fails_costs_no_perplexity(edited, tmp_path, monkeypatch, error, words):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr("comeba_ext.evaluation.harness", broken)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(itertools.islice(testbed.texts(9), 3)))
    result = output("ability", "testbed", "--edits", edited[0], "--texts", texts, "--tasks", "nothing")
    assert {own["tasks_error"] for own in (result["unedited"], result["edited"])} == {words}
    assert result["edited"]["perplexity"] > 1
    failed = run("ability", "testbed", "--tasks", "nothing", "--json")
    assert failed.exit_code == 1 and json.loads(failed.stdout)["error"] == words


def test_generate_shows_both(edited):
    out, _ = edited
    request = testbed.facts()[1]
    (row,) = output("generate", "testbed", "--edits", out, request.text)["generations"]
    assert row["unedited"].startswith(request.ground_truth) and row["text"].startswith(request.target_new)


def test_generate_in_a_chat(tmp_path):
    """As the tokenizer's own template has it, token by token; an answer of nothing is said to be one."""
    model, tokenizer = testbed.load()
    tokenizer.chat_template = (
        "{% for m in messages %}Question: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turn = [{"role": "user", "content": "Werner Heisenberg became known as a"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    text = tokenizer.decode(model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :], skip_special_tokens=True)
    found = output("generate", tmp_path / "model", turn[0]["content"], "--chat", "--max-new-tokens", 6)
    assert found["generations"][0]["text"] == text.strip().split("\n")[0] and found["records"]["read"] == 1
    plain = output("generate", "testbed", turn[0]["content"], "--max-new-tokens", 6)
    assert plain["generations"][0]["text"].startswith("physicist") and plain["generations"] != found["generations"]
    refused = run("generate", "testbed", "Who?", "--chat")
    assert refused.exit_code == 1 and "no chat template" in refused.output


def test_generate_says_where_nothing_is_written(monkeypatch):
    monkeypatch.setattr("comeba_ext.cli.editing.continued", lambda model, tokenizer, prompts, *_: [""] * len(prompts))
    assert "(ends at once)" in run("generate", "testbed", "Who?").stdout
    assert output("generate", "testbed", "Who?", "Why?")["generations"][1]["text"] == ""


def test_covariance_then_edit(tmp_path, records):
    texts = tmp_path / "texts.txt"
    stream = testbed.texts()
    texts.write_text("\n\n".join(next(stream) for _ in range(900)))
    made = output("covariance", "testbed", texts, "--out", tmp_path / "c.safetensors", "--tokens", 3000)
    assert made["tokens"] == 3000
    result = output("edit", "testbed", records, "--out", tmp_path / "o", "--covariance", tmp_path / "c.safetensors", "--limit", 2)
    assert result["edits"] == 2
    config = tmp_path / "config.yaml"
    config.write_text("layers: [1, 3]\nscope: nearest\nlam: 375\nlr: 0.4\nlr_unit: hidden_rms\n")
    covered = ("--covariance", tmp_path / "two.safetensors", "--config", config, "--limit", 2)
    output("covariance", "testbed", texts, "--out", tmp_path / "two.safetensors", "--tokens", 3000, "--config", config)
    result = output("edit", "testbed", records, "--out", tmp_path / "nearest", *covered)
    assert result["edits"] == 2 and result["config"]["scope"] == "nearest" and result["config"]["layers"] == [1, 3]
    with_edits = output("eval", "testbed", records, "--edits", tmp_path / "nearest", "--limit", 2, "--no-generate")
    assert with_edits["reliability"] > 0.5


def test_one_edit_from_the_command_line(tmp_path):
    request = testbed.facts()[1]
    one = ("--prompt", request.prompt, "--subject", request.subject, "--target", request.target_new)
    result = output("edit", "testbed", "--out", tmp_path / "o", *one)
    assert result["edits"] == 1 == result["answered"] and result["records"] == {"read": 1, "used": 1, "skipped": []}
    (row,) = output("generate", "testbed", "--edits", tmp_path / "o", request.text)["generations"]
    assert row["text"].startswith(request.target_new)
    for args, words in ((one[:4], "--target is missing"), ((), "give a file of records"), (("x.json", *one), "give a file of records")):
        refused = run("edit", "testbed", *args, "--out", tmp_path / "p")
        assert refused.exit_code == 1 and words in refused.stderr and not (tmp_path / "p").exists()


def test_a_table_of_facts_is_edited_and_measured(tmp_path):
    (tmp_path / "facts.csv").write_text(
        "prompt,subject,target_new,rephrase_prompts\n{} became known as a,Werner Heisenberg,chemist,{} worked as a\n{} is,Nobody\n"
    )
    done = output("edit", "testbed", tmp_path / "facts.csv", "--out", tmp_path / "out")
    assert done["edits"] == 1 == done["answered"] and done["records"]["skipped"][0]["line"] == 3
    found = output("eval", "testbed", tmp_path / "facts.csv", "--edits", tmp_path / "out", "--answer-tokens", 4)
    assert found["reliability"] == 1 and found["records"] == done["records"]


def test_scope_and_method_and_a_part_of_a_config(tmp_path, records):
    (tmp_path / "c.yaml").write_text("steps: 7\nscope: nearest\n")
    result = output("edit", "testbed", records, "--limit", 2, "--out", tmp_path / "a", "--scope", "zscore", "--config", tmp_path / "c.yaml")
    assert result["config"]["scope"] == "zscore" and result["config"]["steps"] == 7 and result["config"]["layers"] == [3]
    result = output("edit", "testbed", records, "--limit", 2, "--out", tmp_path / "b", "--method", "memit")
    assert json.loads((tmp_path / "b" / "comeba_edits.json").read_text())["method"] == "MEMIT" and result["edits"] == 2
    result = output("edit", "testbed", records, "--limit", 4, "--out", tmp_path / "b", "--resume")
    assert result["earlier_edits"] == 2 and result["edits"] == 2
    (tmp_path / "c.yaml").write_text("stps: 7\n")
    refused = run("edit", "testbed", records, "--out", tmp_path / "x", "--config", tmp_path / "c.yaml")
    assert refused.exit_code == 1 and "c.yaml" in refused.stderr and "'steps'" in refused.stderr
    refused = run("edit", "testbed", records, "--out", tmp_path / "x", "--method", "magic")
    assert refused.exit_code == 1 and "MEMIT" in refused.stderr


def test_edits_that_did_not_take_do_not_look_done(tmp_path, records):
    (tmp_path / "weak.yaml").write_text("lam: 1.0e+9\nsteps: 3\n")
    result = run("edit", "testbed", records, "--limit", 3, "--out", tmp_path / "o", "--config", tmp_path / "weak.yaml")
    assert result.exit_code == 1 and "None of the edits took" in result.stdout and "comeba tune" in result.stdout
    as_json = run("edit", "testbed", records, "--limit", 3, "--out", tmp_path / "p", "--config", tmp_path / "weak.yaml", "--json")
    found, facts = json.loads(as_json.stdout), testbed.facts()
    assert as_json.exit_code == 1 and found["answered"] == 0
    assert [(row["prompt"], row["wanted"]) for row in found["unanswered"]] == [(fact.text, fact.target_new) for fact in facts[:3]]
    assert all(row["says"].startswith(fact.ground_truth) for row, fact in zip(found["unanswered"], facts, strict=False))
    said = result.stdout.split("Not answered:")[1]
    assert all(word in said for fact in facts[:3] for word in (fact.target_new, fact.ground_truth))
    one = ("--prompt", facts[3].prompt, "--subject", facts[3].subject, "--target", facts[3].target_new)
    single = run("edit", "testbed", *one, "--out", tmp_path / "q", "--config", tmp_path / "weak.yaml")
    assert single.exit_code == 1 and "Not answered:" in single.stdout and "do not suit" not in single.stdout


def test_a_run_shows_that_settings_do_not_suit_where_most_of_the_folder_failed():
    class Edited:
        log = [{"event": "edit", "answered": took, "declined": [{}] * declined} for took, declined in (([True] * 5, 0), ([False], 2))]

    assert not unsuited(Edited, 3)
    Edited.log = Edited.log[1:]
    assert unsuited(Edited, 3) and not unsuited(Edited, 1)


def test_saves_come_every_so_many_batches_and_every_minute_but_cost_little(monkeypatch, tmp_path):
    class Slow:
        saved, cost = 0, 1.0

        def save_pretrained(self, folder, inference_only):
            self.saved += 1
            clock[0] += self.cost

    clock, editor, report = [0.0], Slow(), Report(True)
    monkeypatch.setattr("comeba_ext.cli.runs.time.monotonic", lambda: clock[0])
    saves, steps, when = Saves(editor, tmp_path, 10, report, False), [], []
    assert report.kept == "nothing was saved"
    for _ in range(25):
        clock[0] += 25.0
        steps.append({"request_ids": ["a", "b"]})
        before = editor.saved
        saves.after_batch(steps)
        when += [len(steps)] * (editor.saved > before)
    assert when == [3, 6, 9, 10, 13, 16, 19, 20, 23]
    assert report.kept == f"46 edits of this run are saved in {tmp_path}; go on with --resume"
    editor.cost, saves.every = 10.0, 10**6
    saves.save(steps)
    start, count = clock[0], editor.saved
    for _ in range(100):
        clock[0] += 25.0
        saves.after_batch(steps)
    assert (editor.saved - count) * editor.cost <= 0.04 * (clock[0] - start) and editor.saved - count >= 7


def test_a_folder_to_use_the_edits_only(edited, records, tmp_path):
    out, whole = tmp_path / "o", size_of_edits(edited[0])
    shutil.copytree(edited[0], out)
    fact = testbed.facts()[1]
    result = output("edit", "testbed", records, "--out", out, "--resume", "--inference-only")
    assert result["edits"] == 0 and result["bytes"] == size_of_edits(out) < whole / 10 and result["inference_only"]
    (row,) = output("generate", "testbed", "--edits", out, fact.text)["generations"]
    assert row["text"].startswith(fact.target_new)
    refused = run("edit", "testbed", records, "--out", out, "--resume")
    assert refused.exit_code == 1 and "inference only" in refused.stderr


def test_an_interrupted_run_can_be_gone_on_with_though_its_folder_was_to_be_small(records, tmp_path, monkeypatch):
    original, calls = Editor._edit, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Editor, "_edit", interrupted)
    given = ("edit", "testbed", records, "--limit", 3, "--batch-size", 2, "--method", "GRACE", "--out", tmp_path, "--inference-only")
    stopped = run(*given)
    assert stopped.exit_code == 130 and "2 edits of this run are saved" in stopped.stderr.replace("\n", " ")
    said = run(*given, "--resume").stdout
    assert "1 edit in 1 batch" in said and "for inference only" in said
    assert f"{size_of_edits(tmp_path) / 1e3:.0f} kB" in said


def test_what_needs_no_model_is_said_before_it_is_loaded(tmp_path, records, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("comeba_ext.loading.load_model", loaded)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "no subject here", "subject": "Nobody", "target_new": "x"}\n' * 2)
    (tmp_path / "typo.yaml").write_text("stps: 7\n")
    (tmp_path / "broken.safetensors").write_bytes(b"no covariance")
    kept = tmp_path / "kept"
    editor = Editor(*testbed.load(), method="GRACE")
    editor.save_pretrained(kept, inference_only=True)
    for options, words in (
        ((bad,), "none of 2 records can be used"),
        ((records, "--config", tmp_path / "typo.yaml"), "'steps'"),
        ((records, "--scope", "nonsense"), "zscore"),
        ((records, "--covariance", tmp_path / "broken.safetensors"), "broken.safetensors"),
        ((records, "--texts", tmp_path / "none.txt"), "no such file"),
        ((records, "--method", "GRACE", "--chat"), "does not"),
        ((records, "--method", "MEND", "--editor", tmp_path / "none"), "none"),
    ):
        refused = run("edit", "testbed", *options, "--out", tmp_path / "o")
        assert refused.exit_code == 1 and words in refused.stderr and "was loaded" not in refused.stderr, (options, refused.stderr)
        assert not (tmp_path / "o").exists()
    assert "no covariance" in run("edit", tmp_path, records, "--out", tmp_path / "o").stderr
    assert "holds edits already" in run("edit", "testbed", records, "--out", kept).stderr
    assert "inference only" in run("edit", "testbed", records, "--out", kept, "--resume").stderr
    editor.save_pretrained(kept)
    for options, words in (
        (("--method", "MEMIT"), "choose a new --out"),
        (("--texts", tmp_path / "none.txt"), "no such file"),
        (("--chat",), "does not"),
    ):
        assert words in run("edit", "testbed", records, "--out", kept, "--resume", *options).stderr


def test_a_collected_covariance_is_kept_whatever_comes(tmp_path, records, monkeypatch):
    def broken(*args, **kwargs):
        raise ComebaError("the first batch failed")

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit_all", broken)
        failed = run("edit", "testbed", records, "--out", tmp_path / "o", "--resume")
    assert failed.exit_code == 1 and "failed" in failed.stderr and "beginning anew" in failed.stdout
    editor = Editor.from_pretrained(*testbed.load(), tmp_path / "o")
    assert editor.step == 0 and editor.covariance is not None
    monkeypatch.setattr(testbed, "covariance", None)
    assert output("edit", "testbed", records, "--out", tmp_path / "o", "--resume", "--limit", 1)["edits"] == 1


def test_a_chat_template_is_spoken_of_before_anything_is_edited(tmp_path, records, monkeypatch):
    from comeba_ext import loading

    def with_template(*args, **kwargs):
        model, tokenizer = testbed.load()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        return model, tokenizer

    def stopped(*args, **kwargs):
        raise ComebaError("stopped")

    monkeypatch.setattr(loading, "load_model", with_template)
    monkeypatch.setattr(testbed, "covariance", stopped)
    for options, said in (((), True), (("--chat",), False)):
        result = run("edit", "testbed", records, "--out", tmp_path / "o", *options)
        assert "stopped" in result.stderr and ("with --chat" in result.stdout) == said


def test_doctor():
    result = output("doctor")
    assert result["problems"] == [] and result["found"]["torch"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("edit", "testbed", "missing.json", "--out", "x"), "missing.json"),
        (("generate", "no/such/model", "hello"), "no/such/model"),
        (("generate", "testbed", "--edits", "nowhere", "hello"), "holds no edits"),
        (("demo", "--edits", "100000"), "knows"),
        (("demo", "--edits", "2", "--scope", "nonsense"), "zscore"),
    ],
)
def test_one_clear_error(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_json = run(*args, "--json")
    assert as_json.exit_code == 1 and words in json.loads(as_json.stdout)["error"]
    plain = run(*args)
    assert plain.exit_code == 1 and words in plain.stderr and "Traceback" not in plain.output


def test_version():
    from comeba_ext import __version__

    said = run("--version")
    assert said.exit_code == 0 and said.stdout == f"comeba_ext {__version__}\n"


def test_wrong_usage_is_code_2():
    assert run("edit").exit_code == 2
    assert run("nonsense").exit_code == 2
