"""The command line as a user meets it: one JSON object, true counts, exit codes, clear errors."""

import json

import pytest
from typer.testing import CliRunner

from comeba_ext import testbed
from comeba_ext.cli import app


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
    assert result["records"] == {"read": 6, "used": 6, "skipped": []}


def test_demo_prints_a_table():
    result = run("demo", "--edits", 2, "--batch-size", 2)
    assert result.exit_code == 0
    for word in ("reliability", "generality", "locality", "edited to say"):
        assert word in result.stdout


def test_edit_counts_every_record(edited):
    _, result = edited
    assert result["records"]["read"] == 8 and result["records"]["used"] == 6
    reasons = {s["index"]: s["reason"] for s in result["records"]["skipped"]}
    assert set(reasons) == {6, 7}
    assert "not in the prompt" in reasons[6] and "context" in reasons[7]
    assert result["edits"] == 6


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
    assert stopped.exit_code == 130 and "interrupted" in json.loads(stopped.stdout)["error"]
    rest = output("edit", "testbed", records, "--out", tmp_path / "o", "--batch-size", 3, "--resume")
    assert (rest["earlier_edits"], rest["edits"]) == (3, 3)
    whole, resumed = (attachments(load_edits(testbed.load()[0], f)) for f in (edited[0], tmp_path / "o"))
    for name in whole:
        scale = whole[name].delta.abs().max()
        assert (whole[name].delta - resumed[name].delta).abs().max() <= 1e-4 * scale


def test_eval_with_and_without_edits(edited, records, tmp_path):
    out, _ = edited
    rows = tmp_path / "rows.jsonl"
    with_edits = output("eval", "testbed", records, "--edits", out, "--predictions", rows)
    without = output("eval", "testbed", records, "--no-generate")
    assert with_edits["records"]["used"] == 6 and len(with_edits["records"]["skipped"]) == 2
    assert with_edits["reliability"] > without["reliability"] + 0.4
    assert without["locality"] == 1.0
    assert len(rows.read_text().splitlines()) == 6


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
    assert found["generations"][0]["text"] == text.strip().split("\n")[0] and found["prompts"] == 1 and "records" not in found
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
    assert result["config"]["scope"] == "zscore" and result["config"]["steps"] == 7 and result["config"]["layers"] == [0, 1, 2, 3]
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
    (tmp_path / "weak.yaml").write_text("lam: 1.0e+9\n")
    result = run("edit", "testbed", records, "--limit", 3, "--out", tmp_path / "o", "--config", tmp_path / "weak.yaml")
    assert result.exit_code == 1 and "None of the edits took" in result.stdout and "comeba tune" in result.stdout
    as_json = run("edit", "testbed", records, "--limit", 3, "--out", tmp_path / "p", "--config", tmp_path / "weak.yaml", "--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["answered"] == 0


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


def test_wrong_usage_is_code_2():
    assert run("edit").exit_code == 2
    assert run("nonsense").exit_code == 2
