"""Experiments as files: what they mean, what they write, and that a killed one ends in the same table."""

import contextlib
import itertools
import json
import math
import multiprocessing
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import output, run

from comeba_ext import EditConfig, Editor, EditRequest, experiments, methods, testbed
from comeba_ext.errors import ConfigError
from comeba_ext.evaluation import Writing, bootstrap_interval, predict_base
from comeba_ext.evaluation.metrics import summarise
from comeba_ext.evaluation.protocols import Result, run_protocol
from comeba_ext.evaluation.written import is_contained, normalised
from comeba_ext.experiments import definition, measures, plots
from comeba_ext.experiments.kept_base import kept_base
from comeba_ext.experiments.measures import told_apart
from comeba_ext.experiments.rows import mean_of, rows_of
from comeba_ext.experiments.table import markdown
from comeba_ext.methods import default_config
from comeba_ext.report import build, read
from comeba_ext.storage import MANIFEST

pytestmark = pytest.mark.usefixtures("undrawn")
ISSUE = {"defaults", "table1", "table2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig10", "fig11", "scope"}
SMALL = {
    "title": "A small one",
    "samples": 6,
    "batch_size": 2,
    "evaluations": 2,
    "generate": False,
    "answer_tokens": 6,
    "methods": ["COMEBA-HK", {"method": "MEMIT", "steps": 8}],
    "plot": "edits",
}
FORKS = multiprocessing.get_context("fork")  # which begin at once, with everything imported
TIMES = ("seconds_per_edit", "peak_memory", "saved_bytes")  # the last: the log that is saved holds times


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture
def few_texts(monkeypatch):
    """To read as text that names nobody, where how much of it is of no matter."""
    monkeypatch.setattr("comeba_ext.cli.measuring.PLAIN_TEXTS", 12)


def in_one_thread(*arguments):
    """A command in a process that was forked, where there is none of the other threads of what it was forked from."""
    torch.set_num_threads(1)
    run(*arguments)


def metrics_of(result):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in result["rows"]]


@pytest.fixture(scope="module")
def model():
    return testbed.load()[0]


@pytest.fixture(scope="module")
def covariance(tmp_path_factory):
    path = tmp_path_factory.mktemp("covariance") / "testbed.safetensors"
    editor = Editor(*testbed.load())
    editor.collect_covariance(testbed.texts(), tokens=3000, path=path, progress=False)
    return path


# -- definitions ----------------------------------------------------------------------------------------------------


def test_all_experiments_of_the_paper_ship():
    assert set(experiments.names()) == ISSUE


@pytest.mark.parametrize("name", sorted(ISSUE))
def test_shipped_experiments_fit_the_embedded_model(model, name):
    experiment = experiments.load(name)
    assert experiment.name == name and experiment.testbed_samples and experiment.samples in (100, 1000, 10000)
    for case in experiment.cases:
        case.config(model)
    assert len({case.label for case in experiment.cases}) == len(experiment.cases)


def test_settings_that_depend_on_the_model(model):
    cases = {case.label: case for name in ("fig5", "fig6", "fig10") for case in experiments.load(name).cases}
    assert cases["1 layer"].config(model).layers == (3,) and cases["3 layers"].config(model).layers == (1, 2, 3)
    assert cases["all layers"].config(model).layers == (0, 1, 2, 3)
    assert cases["10λ"].config(model).lam == pytest.approx(10 * EditConfig.for_model(model).lam)
    # The model's own λ is for its own score; with the others, and where no score decides, it follows from the ratio.
    assert {case.config(model).lam_of(1408) for case in experiments.load("table1").cases if "nearest" not in case.label} == {1408.0}
    (nearest,) = [case for case in experiments.load("table1").cases if "nearest" in case.label]
    assert nearest.config(model).lam == EditConfig.for_model(model).lam == 375
    ten = experiments.Case("COMEBA-HK", "x", {"scope": "zscore", "lam_factor": 10.0}).config(model)
    assert ten.lam_of(1408) == pytest.approx(14080)
    assert cases["α₀ = 2.5"].config(model).alpha == 2.5 and cases["fixed α = 3"].method == "COMEBA-HK fixed threshold"


def test_grid_of_methods_and_settings(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "methods": ["FT", {"method": "memit", "label": "M"}],
                "settings": [{"label": "a", "steps": 1}, {"label": "b", "batch_size": 3}],
            }
        )
    )
    cases = experiments.load(path).cases
    assert [c.label for c in cases] == ["FT, a", "FT, b", "M, a", "M, b"]
    assert [c.method for c in cases] == ["FT", "FT", "MEMIT", "MEMIT"] and cases[3].settings == {"batch_size": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title: [", "not valid YAML"),
        ("5", "keys and values"),
        ("title: t", "'methods' is missing"),
        ("title: t\nmethods: [HORSE]", "unknown method 'HORSE'"),
        ("title: t\nmethods: [FT]\nsample: 3", "unknown key sample"),
        ("title: t\nmethods: [FT]\nprotocol: nonsense", "protocol must be one of"),
        ("title: t\nmethods: [FT]\nplot: pie", "plot must be one of"),
        ("title: t\nmethods: [FT]\nmeasures: [taste]", "measures must be a list of"),
        ("title: t\nmethods: [FT]\nmeasures: text", "measures must be a list of.*got 'text'"),
        ("title: t\nmethods: FT", "methods must be a list"),
        ("title: t\nmethods: [5]", "methods must be a list"),
        ("title: t\nmethods: [FT]\nsettings: []", "one or more"),
        ("title: t\nmethods: [FT]\nsettings: {lam: 5}", "settings must be a list"),
        ("title: t\nmethods: [FT]\nsamples: '100'", "samples must be a whole number"),
        ("title: t\nmethods: [FT]\nbatch_size: ten", "batch_size must be a whole number"),
        ("title: t\nmethods: [FT]\ngenerate: 1", "generate must be true or false"),
        ("title: t\nmethods: [FT]\nanswer_tokens: -1", "answer_tokens must be a whole number of 0 or more"),
        ("title: t\nmethods: [FT]\nchat: 'yes'", "chat must be true or false"),
        ("title: t\nmethods: [{method: FT, last_layers: 0}]", "last_layers must be a whole number"),
        ("title: t\nmethods: [{method: FT, lam_factor: many}]", "lam_factor must be a number > 0"),
        ("title: t\nmethods: [FT]\nmeasures: [abilities]", "need each other"),
        ("title: t\nmethods: [FT]\ntasks: [hellaswag]", "need each other"),
        ("title: t\nmethods: [FT]\nplot: scores", "needs the measure 'scores'"),
        ("title: t\nmethods: [FT]\nexpected: [{case: FT, reliability: 94.6%}]", "reliability must be a number"),
        ("title: t\nmethods: [FT]\nprotocol: single_round\nmeasures: [text]", "single_round"),
        ("title: t\nmethods: [FT, FT]", "same label"),
    ],
)
def test_malformed_files(tmp_path, content, words):
    path = tmp_path / "e.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        experiments.load(path)


def test_values_as_people_write_them(tmp_path, model):
    path = tmp_path / "e.yaml"
    path.write_text("title: t\nmethods: [{method: FT, lr: 5e-4}, {method: COMEBA-HK, alpha: inf, lam_factor: 1e-1}]")
    ft, comeba = experiments.load(path).cases
    assert ft.config(model).lr == 5e-4
    assert comeba.config(model).alpha == float("inf")
    assert comeba.config(model).lam == pytest.approx(EditConfig.for_model(model).lam / 10)
    path.write_bytes(b"title: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        experiments.load(path)
    with pytest.raises(ConfigError, match="case 'x'.*alpha"):
        definition.Case("COMEBA-HK", "x", {"alpha": "high"}).config(model)


def test_a_scope_is_nothing_to_methods_without_hooks(model):
    assert methods.default_config("MEMIT", model, scope="nearest").lam == methods.default_config("MEMIT", model).lam


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="table2"):
        experiments.load("table9")
    with pytest.raises(ConfigError, match="No such file"):
        experiments.load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="unknown key 'lamm'"):
        definition.Case("MEMIT", "x", {"lamm": 1}).config(testbed.load()[0])


# -- running --------------------------------------------------------------------------------------------------------


@pytest.mark.drawn
def test_a_killed_experiment_ends_in_the_same_table(small, barely_trained, tmp_path):
    given = (small, *barely_trained, "--samples", 4)
    whole = output("experiment", *given, "--out", tmp_path / "whole")
    assert [(r["case"], r["edits"]) for r in whole["rows"]] == [(c, n) for c in ("COMEBA-HK", "MEMIT") for n in (2, 4)]
    for row in whole["rows"]:
        assert {
            "dataset",
            "method",
            "reliability",
            "reliability_interval",
            "generality",
            "generality_interval",
            "locality",
            "locality_interval",
        } <= set(row)
    assert whole["records"]["testbed"]["used"] == 4
    case = tmp_path / "killed/small/testbed/COMEBA-HK"
    logged = lambda text: (case / "log.jsonl").exists() and text in (case / "log.jsonl").read_text()  # noqa: E731
    for moment in (lambda: logged('"edit"'), (case / "edits" / MANIFEST).exists, lambda: logged('"checkpoint"')):
        process = FORKS.Process(target=in_one_thread, args=("experiment", *given, "--out", tmp_path / "killed"))
        process.start()
        deadline = time.time() + 120
        while process.is_alive() and time.time() < deadline and not moment():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "killed/small.json").exists()
    resumed = output("experiment", *given, "--out", tmp_path / "killed")
    assert metrics_of(resumed) == metrics_of(whole)
    cut = lambda text: [line.rsplit("|", 4)[0] for line in text.splitlines()]  # noqa: E731  (without seconds, memory and size)
    assert cut((tmp_path / "killed/small.md").read_text()) == cut((tmp_path / "whole/small.md").read_text())
    assert metrics_of(json.loads((tmp_path / "whole/small.json").read_text())) == metrics_of(whole)
    assert (tmp_path / "whole/small-testbed.png").stat().st_size > 10_000
    again = output("experiment", *given, "--out", tmp_path / "whole")  # complete: only read
    assert again["rows"] == whole["rows"]
    other = run("experiment", *given[:-1], 2, "--out", tmp_path / "whole", "--json")
    assert other.exit_code == 1 and "another run" in json.loads(other.stdout)["error"]


def test_a_method_that_cannot_go_on_is_a_row(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"methods": [{"method": "FT", "lr": 1e37, "label": "wild"}, "FT"], "plot": "bars"}))
    for _ in range(2):  # complete as it is
        result = output("experiment", path, "--out", tmp_path / "out")
        wild, *others = result["rows"]
        assert "diverged" in wild["error"] and wild["edits"] == 0 and wild["reliability"] is None
        assert [(r["case"], r["edits"]) for r in others] == [("FT", 4), ("FT", 6)]
    assert "wild (failed after 0 edits)" in (tmp_path / "out/mixed.md").read_text()
    shown = run("experiment", path, "--out", tmp_path / "out").stdout
    assert "wild failed after 0 edits" in " ".join(shown.split())
    path.write_text(yaml.safe_dump(SMALL | {"methods": [{"method": "FT", "lr": 1e37}]}))
    assert output("experiment", path, "--out", tmp_path / "other")["plots"] == []  # there is nothing to draw


def test_a_case_that_cannot_take_the_records_costs_only_itself(barely_trained, tmp_path):
    """WISE learns from prompts about other things, which these records lack; the others have their rows, and the exit code says it."""
    facts, path = tmp_path / "facts.json", tmp_path / "mixed.yaml"
    fields = ("prompt", "subject", "target_new")
    facts.write_text(json.dumps([{name: getattr(fact, name) for name in fields} for fact in testbed.facts()[:2]]))
    path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT", "WISE", "ICE"], "evaluations": 1, "plot": "bars"}))
    arguments = ("experiment", path, *barely_trained, "--out", tmp_path / "out", "--records", f"mine={facts}")
    for _ in range(2):
        shown = run(*arguments)
        assert shown.exit_code == 1 and "WISE" in shown.stderr and "1 case did not end" in shown.stderr
        result = json.loads((tmp_path / "out/mixed.json").read_text())
        assert [(row["case"], row["edits"], "error" in row) for row in result["rows"]] == [
            ("FT", 2, False),
            ("WISE", 0, True),
            ("ICE", 2, False),
        ]
        assert len(result["not_run"]) == 1 and result["not_run"][0].startswith("mine, WISE: ")
    table = (tmp_path / "out/mixed.md").read_text()
    assert "WISE (failed after 0 edits)" in table and "Prompts asked: 2 (reliability)" in table


def test_settings_that_do_not_fit_the_model_are_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("comeba_ext.experiments.runner.run_protocol", lambda *_, **__: pytest.fail("nothing was to run"))
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT", {"method": "MEMIT", "layers": [99]}]}))
    failed = run("experiment", path, "--out", tmp_path / "out", "--json")
    error = json.loads(failed.stdout)["error"]
    assert failed.exit_code == 1 and "case 'MEMIT'" in error and "layers [99]: the model has blocks 0 to " in error


def test_a_case_that_was_to_be_left_alone_stops_no_other(barely_trained, tmp_path):
    """Its log is of other settings: it is left out. Of one that is to be run, that is said before the others are run."""
    path, out = tmp_path / "two.yaml", tmp_path / "out"
    one = SMALL | {"samples": 2, "evaluations": 1}
    path.write_text(yaml.safe_dump(one | {"methods": ["ICE", {"method": "FT", "steps": 2}]}))
    output("experiment", path, *barely_trained, "--out", out, "--case", "FT")
    path.write_text(yaml.safe_dump(one | {"methods": ["ICE", {"method": "FT", "steps": 3}]}))
    refused = run("experiment", path, *barely_trained, "--out", out, "--json")
    assert refused.exit_code == 1 and "another run (config differ)" in json.loads(refused.stdout)["error"]
    assert not (out / "two/testbed/ICE").exists() and len(json.loads((out / "two.json").read_text())["rows"]) == 1
    rows = output("experiment", path, *barely_trained, "--out", out, "--case", "ICE")["rows"]
    assert [row["case"] for row in rows] == ["ICE"] and (out / "two/testbed/FT/log.jsonl").exists()


@pytest.mark.drawn
@pytest.mark.parametrize("plot", ["bars", "edits", "settings"])
def test_records_with_nothing_else_to_ask(barely_trained, tmp_path, plot):
    facts = tmp_path / "facts.json"
    fields = ("prompt", "subject", "target_new")
    facts.write_text(json.dumps([{name: getattr(fact, name) for name in fields} for fact in testbed.facts()[:4]]))
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "plot": plot}))
    result = output("experiment", path, *barely_trained, "--out", tmp_path / "out", "--records", f"a/b={facts}")
    assert [row["generality"] for row in result["rows"]] == [None, None] and result["rows"][0]["reliability"] is not None
    assert result["plots"] == ["bare-a-b-c14cdd.png", "bare-a-b-c14cdd-forced.png"]
    assert all((tmp_path / "out" / plotted).stat().st_size > 5_000 for plotted in result["plots"])


def test_experiments_share_a_folder(small, barely_trained, tmp_path):
    for name in ("one", "two"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(SMALL | {"methods": [{"method": "FT", "steps": 2 if name == "one" else 3}], "evaluations": 1}))
        assert output("experiment", path, *barely_trained, "--out", tmp_path / "out")["rows"]
    assert {"one.json", "two.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    labels = [{"method": "FT", "steps": n + 1, "label": label} for n, label in enumerate(("λ/3", "λ-3", "..", "FT"))]
    path.write_text(yaml.safe_dump(SMALL | {"samples": 2, "methods": labels, "evaluations": 1}))
    again = output("experiment", path, *barely_trained, "--out", tmp_path / "labels")
    assert [row["case"] for row in again["rows"]] == ["λ/3", "λ-3", "..", "FT"]
    assert sum(1 for _ in (tmp_path / "labels").glob("two/testbed/*/log.jsonl")) == 4


def test_cases_run_apart_and_make_one_table(barely_trained, tmp_path, monkeypatch):
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL | {"methods": ["GRACE", {"method": "FT", "steps": 2}], "samples": 2, "evaluations": 1}))
    given = (small, *barely_trained, "--out")
    whole = output("experiment", *given, tmp_path / "whole")
    out = tmp_path / "apart"
    first = output("experiment", *given, out, "--case", "FT")
    assert metrics_of(first) == [row for row in metrics_of(whole) if row["case"] == "FT"]
    second = output("experiment", *given, out, "--case", "GRACE")  # and what is complete of the others
    assert metrics_of(second) == metrics_of(whole)
    asked = lambda *_, **__: pytest.fail("every log is complete")  # noqa: E731
    monkeypatch.setattr("comeba_ext.experiments.runner.kept_base", asked)
    assert metrics_of(output("experiment", *given, out)) == metrics_of(whole)
    assert (out / "small.md").exists() and (out / "small-testbed.png").exists()
    before, aside = out / "small/testbed/GRACE", tmp_path / "aside"
    before.rename(aside)
    monkeypatch.setattr("comeba_ext.experiments.runner.run_protocol", lambda *a, **k: (run_protocol(*a, **k), aside.rename(before))[0])
    meanwhile = output("experiment", *given, out, "--case", "FT")  # another process ends while this one runs
    assert metrics_of(meanwhile) == metrics_of(whole)
    log = out / "small/testbed/FT/log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # as if it were still running
    monkeypatch.undo()
    third = output("experiment", *given, out, "--case", "GRACE")
    assert {row["case"] for row in third["rows"]} == {"GRACE"}
    wrong = run("experiment", *given, out, "--case", "ROME", "--json")
    assert wrong.exit_code == 1 and "GRACE, FT" in json.loads(wrong.stdout)["error"]


@pytest.mark.parametrize("writing", [None, {"answer_tokens": 3}])
def test_the_unedited_model_is_asked_once_an_experiment(tmp_path, monkeypatch, writing):
    """Written answers as well; a file of other records, or a damaged one, is no answer."""
    (model, tokenizer), facts = testbed.load(), testbed.facts()
    how = {"generate": True, "writing": writing and Writing(**writing)}
    path, calls = tmp_path / "run/base.json", []

    def asked(*args, **options):
        calls.append(args[2])
        return predict_base(*args, **options)

    monkeypatch.setattr("comeba_ext.experiments.kept_base.predict_base", asked)
    expected = predict_base(model, tokenizer, facts[:3], **how)
    for _ in range(2):
        assert kept_base(path, model, tokenizer, facts[:3], **how) == expected
    assert len(calls) == 1
    assert kept_base(path, model, tokenizer, facts[:4], **how) == predict_base(model, tokenizer, facts[:4], **how)
    assert kept_base(path, model, tokenizer, facts[:4], **how | {"generate": False}).generate is False
    for damaged in ("{", "[]", '{"asked": 1}', path.read_text()[:-20], path.read_text().replace('"predictions": [', '"predictions": [1, ')):
        path.write_text(damaged)
        count = len(calls)
        assert kept_base(path, model, tokenizer, facts[:4], **how) == predict_base(model, tokenizer, facts[:4], **how)
        assert len(calls) == count + 1
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    kept_base(path, model, tokenizer, facts[:4], **how)
    assert len(calls) == count + 2


def test_cases_in_processes(barely_trained, tmp_path, monkeypatch):
    """The covariance is collected by one of them; a case that fails costs only itself."""
    path, out = tmp_path / "several.yaml", tmp_path / "out"
    cases = ["COMEBA-HK", {"method": "MEMIT", "steps": 8}, {"method": "IKE", "demonstrations": str(tmp_path / "nothing.json")}]
    path.write_text(yaml.safe_dump(SMALL | {"methods": cases, "samples": 2, "evaluations": 1}))
    (tmp_path / "texts.txt").write_text("\n".join(itertools.islice(testbed.texts(), 200)))
    arguments = ["experiment", path, "--out", out, "--jobs", 2, "--json", "--model", barely_trained[1], "--texts", tmp_path / "texts.txt"]
    monkeypatch.setattr(sys, "argv", ["comeba", *map(str, arguments)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    done = run(*arguments)
    assert done.exit_code == 1 and "1 case did not end" in json.loads(done.stdout)["error"], done.output
    assert "IKE" in json.loads(done.stdout)["error"] and "nothing.json" in (out / "several/IKE.txt").read_text()
    rows = json.loads((out / "several.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["COMEBA-HK", "MEMIT"]


def test_a_seed_is_another_choice_of_records(barely_trained, tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "evaluations": 1, "samples": 2}))
    asked = {}
    for seed in (0, 1, 1):
        output("experiment", path, *barely_trained, "--out", tmp_path / f"{seed}", "--seed", seed)
        rows = map(json.loads, (tmp_path / f"{seed}/e/testbed/FT/log.jsonl").read_text().splitlines())
        asked[seed] = [row["subject"] for row in rows if row["event"] == "record"]
    assert asked[0] == [fact.subject for fact in testbed.facts(barely_trained[1])[:2]] and not set(asked[0]) & set(asked[1])


def hasty(settings):
    """A case's settings, with three steps at most and two of its layers."""

    def config(case, model):
        found = settings(case, model)
        return found.replace(steps=min(found.steps, 3), layers=sorted({found.layers[0], found.layers[-1]}))

    return config


@pytest.mark.drawn
@pytest.mark.parametrize("name", sorted(ISSUE))
def test_every_shipped_experiment_runs(name, barely_trained, tmp_path, monkeypatch, few_texts):
    short = property(lambda own: None if own.answer_tokens == 0 else Writing(6, own.chat, own.long))
    monkeypatch.setattr("comeba_ext.experiments.definition.Experiment.writing", short)  # what is written is looked at elsewhere
    monkeypatch.setattr(definition.Case, "config", hasty(definition.Case.config))  # and so is what is learned
    result = output("experiment", name, "--samples", 2, *barely_trained, "--out", tmp_path)
    cases = [case.label for case in experiments.load(name).cases]
    assert list(dict.fromkeys(row["case"] for row in result["rows"])) == cases
    assert all(0 <= row["reliability"] <= 1 for row in result["rows"]) and not any("error" in row for row in result["rows"])
    assert (tmp_path / f"{name}.md").exists() and (tmp_path / result["plots"][0]).exists()


def test_the_chance_that_edited_prompts_score_higher():
    """By hand, and by a loop over pairs; ties count half."""
    peaks = {"edited": {"a": [2.0, 1.0], "b": [0.0, 0.0]}, "other": {"a": [1.0, 0.5, 3.0], "b": [0.0, 0.0, 0.0]}, "rephrased": {}}
    assert told_apart(peaks) == 3.5 / 6
    draw = random.Random(0)
    own, other = ([float(draw.randrange(5)) for _ in range(n)] for n in (30, 17))
    pairs = [(a > b) + 0.5 * (a == b) for a in own for b in other]
    assert told_apart({"edited": {"x": own}, "other": {"x": other}}) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert told_apart({"edited": {"x": own}, "other": {"x": []}}) is None


@pytest.mark.drawn
def test_scores_of_cases_with_different_layers(tmp_path):
    """A column a layer; a case's panels stand in its own."""
    layers = {"one": [10], "two": [2, 4, 10], "three": [4]}

    def row(case, blocks):
        scores = {f"model.layers.{n}.mlp.down_proj": [0.1, 0.5, 1.0] for n in blocks}
        return {"case": case, "edits": 2, "peak_scores": dict.fromkeys(plots.KINDS, scores), "alpha": dict.fromkeys(scores, 0.4)}

    figure = plots._scores([row(case, blocks) for case, blocks in layers.items()])
    assert plots.figures({"rows": [{"dataset": "d", "case": "MEMIT", "edits": 2, "reliability": 1.0}]}, "scores", "d") == {}
    titles = [[axis.get_visible() and axis.get_title() for axis in figure.axes[3 * n : 3 * n + 3]] for n in range(3)]
    assert titles == [
        [False, False, "one, block 10"],
        ["two, block 2", "two, block 4", "two, block 10"],
        [False, "three, block 4", False],
    ]
    assert [axis.get_ylabel() != "" for axis in figure.axes] == [False, False, True, True, False, False, False, True, False]
    assert len(figure.legends[0].get_texts()) == 3
    figure.savefig(tmp_path / "scores.png")


def test_bars_of_what_was_asked():
    """Questions behind several edits beside the metrics; nothing where no case was asked."""

    def row(case, way, locality=None, **questions):
        own = {"reliability": 0.9, "generality": 0.25, "locality": locality}
        scores = {**own, **{f"{name}{way}": value for name, value in own.items()}}
        ends = {f"{name}_interval": value and [value / 2, value] for name, value in scores.items()}
        asked = {
            name: {"questions": 4, "counted": 4, "written": value, "written_interval": [0.0, 1.0]} for name, value in questions.items()
        }
        return {"dataset": "d", "case": case, "edits": 2, **scores, **ends, **({"questions": asked} if asked else {})}

    def drawn(*rows):
        found = plots.figures({"rows": rows}, "bars", "d")
        (axis,) = found[""].axes
        heights = [[float(bar.get_height()) for bar in own] for own in axis.containers if hasattr(own, "patches")]
        (forced,) = found["-forced"].axes
        return [label.get_text() for label in axis.get_xticklabels()], heights, [label.get_text() for label in forced.get_xticklabels()]

    names, heights, forced = drawn(row("A", "_written", hops=0.5, aliases=0.75), row("B", "_written", hops=1.0))
    assert names == ["reliability", "generality", "hops", "aliases"] and forced == names[:2]
    assert heights[0] == [0.9, 0.25, 0.5, 0.75] and heights[1][:3] == [0.9, 0.25, 1.0] and math.isnan(heights[1][3])
    names, heights, forced = drawn(row("A", "_written", locality=0.5))
    assert names == forced == ["reliability", "generality", "locality"] and heights == [[0.9, 0.25, 0.5]]


@pytest.mark.drawn
def test_every_measure_and_plot(covariance, barely_trained, tmp_path, few_texts):
    path = tmp_path / "all.yaml"
    path.write_text(
        yaml.safe_dump(
            SMALL
            | {"samples": 4, "evaluations": 1, "measures": sorted({*definition.MEASURES} - {"abilities"}), "plot": "scores"}
            | {"methods": ["COMEBA-HK"]}
        )
    )
    (row,) = output("experiment", path, "--covariance", covariance, "--out", tmp_path / "out")["rows"]
    assert row["efficacy_score"] > 0.7 and 0 <= row["text_changed"] < 0.2 and row["perplexity"] > 1 and row["fluency"] > 1
    assert 0.9 <= row["padding_agreement"] <= 1 and row["reliability_behind_text"] >= 0.5 and "reliability_short" in row
    assert len(row["peak_scores"]["edited"]["model.layers.0.mlp.down_proj"]) == 4
    assert row["in_scope_edited"] == 1 and row["told_apart"] > 0.9
    for name in ("prompt", "token"):
        assert row[f"{name}_slowdown"] == row[f"{name}_seconds"] / row[f"{name}_seconds_before"] and 0.2 < row[f"{name}_slowdown"] < 20
    assert 0 < row["edits_bytes"] < row["saved_bytes"]
    assert 0 <= row["other_facts"] <= 1 and len(row["other_facts_interval"]) == 2 and row["other_facts_records"] == 4
    for plot in ("bars", "settings"):
        path.write_text(yaml.safe_dump(SMALL | {"samples": 2, "evaluations": 1, "plot": plot, "title": plot, "protocol": "single_round"}))
        result = output("experiment", path, *barely_trained, "--out", tmp_path / plot)
        assert [r["edits"] for r in result["rows"]] == [2, 2] and result["plots"] == ["all-testbed.png", "all-testbed-forced.png"]


@pytest.mark.drawn
def test_abilities_over_the_edits(barely_trained, tmp_path, monkeypatch, few_texts):
    """Tasks with the edits and without, at every checkpoint; a measure that fails costs only itself."""
    seen = []

    def harness(model, tokenizer, tasks, folder, limit):
        seen.append((tuple(tasks), folder, limit))
        return {task: {"alias": task, "acc_stderr,none": 0.1, "acc,none": 0.25 + len(seen) / 100} for task in tasks}

    monkeypatch.setattr("comeba_ext.experiments.measures.harness", harness)
    path = tmp_path / "e.yaml"
    able = {"measures": ["abilities", "text"], "tasks": ["a", "b"], "task_folder": "here", "task_limit": 7}
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.yaml").write_text("task: a")
    monkeypatch.chdir(tmp_path)
    path.write_text(yaml.safe_dump(SMALL | able | {"methods": ["GRACE", "FT"], "samples": 4}))
    rows = output("experiment", path, *barely_trained, "--out", tmp_path / "out")["rows"]
    assert seen == [(("a", "b"), "here", 7)] * 5  # two checkpoints of two cases, and, after the first, once unedited
    assert [row["abilities"]["a"]["edited"] for row in rows] == pytest.approx([0.26, 0.28, 0.29, 0.30])
    assert all(row["abilities"]["b"] == row["abilities"]["a"] and row["abilities"]["a"]["unedited"] == pytest.approx(0.27) for row in rows)
    assert all(row["abilities"]["a"]["metric"] == "acc" and row["saved_bytes"] > 0 for row in rows)
    table = (tmp_path / "out/e.md").read_text()
    assert "| a (acc) | a (acc), unedited | b (acc) |" in table and "| saved MB, to go on |" in table
    assert "What the model can do beside its edits" in build(read(tmp_path / "out"))

    for changed, words in (({"task_limit": 8}, "task_limit differ"), ({}, "task_folder differ")):  # other examples are another run
        path.write_text(yaml.safe_dump(SMALL | able | changed | {"methods": ["GRACE", "FT"], "samples": 4}))
        refused = run("experiment", path, *barely_trained, "--out", tmp_path / "out", "--json")
        assert refused.exit_code == 1 and words in json.loads(refused.stdout)["error"]
        (tmp_path / "here/a.yaml").write_text("task: a, otherwise")

    def broken(*args, **options):
        raise OSError("no data")

    monkeypatch.setattr("comeba_ext.experiments.measures.harness", broken)
    row, *_ = output("experiment", path, *barely_trained, "--out", tmp_path / "broken", "--samples", 2)["rows"]
    assert row["abilities_error"] == "OSError: no data" and "abilities" not in row and 0 <= row["text_changed"] <= 1


def test_other_facts_are_asked_one_by_one(tmp_path):
    """What is written to other questions about each subject, with the edits and without, by a loop over the prompts."""
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, method="FT", config=default_config("FT", model, steps=5))
    facts = testbed.facts()[:3]
    editor.edit(facts)
    found = measures.make(("other_facts",), [])(editor, facts)
    same, new = [], []
    for fact in facts:
        own = []
        for question, _ in measures.questions_beside(fact):
            texts = []
            for edited in (True, False):
                with contextlib.nullcontext() if edited else editor.disabled():
                    ids = tuple(tokenizer(question)["input_ids"])
                    texts.append(Writing().answers(model, tokenizer, [ids], max_tokens=4096)[ids])
            own.append(
                (
                    normalised(texts[0]) == normalised(texts[1]),
                    is_contained(texts[0], [fact.target_new]) and not is_contained(texts[1], [fact.target_new]),
                )
            )
        same.append(statistics.mean(one for one, _ in own))
        new.append(statistics.mean(two for _, two in own))
    assert found["other_facts"] == pytest.approx(statistics.mean(same)) and found["other_facts"] < 1  # FT changes every answer's layer
    assert found["other_facts_hallucination"] == pytest.approx(statistics.mean(new)) and found["other_facts_records"] == 3
    editor.close()
    asked = EditRequest("{} is famous for a religion named", "Oslo", "x")
    prompts = [prompt for prompt, _ in measures.questions_beside(asked)]
    assert prompts == ["The headquarters of Oslo are in", "The twin city of Oslo is", "The year in which Oslo began is"]


def test_all_records_in_one_batch(barely_trained, tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        yaml.safe_dump(SMALL | {"methods": ["GRACE", {"method": "FT", "batch_size": 2, "steps": 2}], "batch_size": "all", "evaluations": 1})
    )
    result = output("experiment", path, *barely_trained, "--out", tmp_path / "out")
    assert [(row["case"], row["batch_size"]) for row in result["rows"]] == [("GRACE", 6), ("FT", 2)]
    assert result["differences"] == {"testbed": {}}  # of six records nothing is said
    path.write_text(yaml.safe_dump(SMALL | {"batch_size": "every"}))
    assert (
        "batch_size must be a whole number of 1 or more, or 'all'"
        in json.loads(run("experiment", path, *barely_trained, "--out", tmp_path / "o", "--json").stdout)["error"]
    )


def test_who_is_ahead_stands_in_the_result(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text(
        yaml.safe_dump(
            SMALL | {"methods": ["GRACE", {"method": "FT", "lr": 1e-9, "steps": 1}], "samples": 20, "batch_size": 10, "evaluations": 1}
        )
    )
    result = output("experiment", path, "--out", tmp_path / "out")
    logs = [tmp_path / "out/e/testbed" / case / "log.jsonl" for case in ("GRACE", "FT")]
    values = [[e["reliability_written"] for e in map(json.loads, log.read_text().splitlines()) if e["event"] == "record"] for log in logs]
    (pair,) = result["differences"]["testbed"]["reliability_written"]
    assert (pair["ahead"], pair["behind"], pair["apart"]) == ("GRACE", "FT", True)
    assert pair["mean"] == pytest.approx(statistics.mean(a - b for a, b in zip(*values, strict=True)), abs=1e-4)
    assert result["rows"][0]["retention"] == [
        own | {"value": statistics.mean(part), "interval": bootstrap_interval(part)}
        for own, part in (({"first": 1, "last": 10}, values[0][:10]), ({"first": 11, "last": 20}, values[0][10:]))
    ]
    table = (tmp_path / "out/e.md").read_text()
    assert "Ahead in reliability, written (paired over records, 95 %): GRACE of FT." in table and "Prompts asked: 20 (reliability)" in table


def test_a_method_that_fails_behind_a_checkpoint_has_no_retention():
    row = {"request_id": None, "prompt": "p", "subject": "s", "target_new": "t", "reliability": 1.0, "answers": []}
    result = Result({2: summarise([row, row | {"prompt": "q"}])}, {2: {"saved_bytes": 1}}, [], 2, "infinities")
    kept, failed = rows_of([result], 0)
    assert (kept["edits"], kept["reliability"]) == (2, 1.0) and "retention" not in kept and failed["error"] == "infinities"


def test_records_of_a_file(tmp_path):
    path = tmp_path / "facts.jsonl"
    good = [r.to_record() for r in testbed.facts()[:2]]
    long = {"prompt": "{} " + "very " * 200, "subject": "x", "target_new": "y"}
    rows = [good[0], {"prompt": "nothing"}, good[1], long]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "evaluations": 1}))
    result = output("experiment", small, "--out", tmp_path / "out", "--records", f"mine={path}")
    assert result["records"]["mine"]["used"] == 2
    assert [skip["index"] for skip in result["records"]["mine"]["skipped"]] == [1, 3]
    assert [skip["line"] for skip in result["records"]["mine"]["skipped"]] == [2, 4]
    plain = run("experiment", small, "--out", tmp_path / "out", "--records", f"mine={path}")
    assert plain.exit_code == 0 and "FT" in plain.stdout and "  record 4 (line 4): " in plain.stdout


def test_means_over_orders():
    """Each of a mean's own order has an interval, which the mean can lie outside of; a number that one order lacks is the others'."""
    orders = [
        {
            "efficacy_score": 0.9,
            "efficacy_score_interval": [0.85, 0.95],
            "abilities": {"a": {"metric": "acc", "edited": 0.5}},
            "score": None,
        },
        {
            "efficacy_score": 0.1,
            "efficacy_score_interval": [0.05, 0.15],
            "abilities": {"a": {"metric": "acc", "edited": 0.7}},
            "score": 0.4,
        },
    ]
    found = mean_of(orders)
    assert found.pop("efficacy_score_spread") == pytest.approx(statistics.stdev([0.9, 0.1]))
    assert found == {"efficacy_score": 0.5, "abilities": {"a": {"metric": "acc", "edited": pytest.approx(0.6)}}, "score": 0.4}
    assert mean_of([{"text_changed": 0.25}, {"text_error": "none"}]) == {"text_changed": 0.25, "text_error": "none"}


def test_a_table_of_cases_that_failed():
    row = {"dataset": "d", "case": "A", "edits": 0, "reliability": None, "error": "infinities"}
    good = [{"dataset": "d", "case": "B", "edits": n, "reliability": 0.5, "reliability_prompts": n} for n in (2, 4)]
    result = {"title": "t", "paper": "", "note": "", "protocol": "consecutive", "samples": 4, "rows": [row, *good], "expected": []}
    text = markdown(result | {"records": {"d": {"used": 4, "skipped": []}}})
    assert "| B | 2 | 0.500 |" in text and "| B | 4 | 0.500 |" in text and "Prompts asked: 4 (reliability)." in text
    text = markdown(result | {"rows": [*good, row], "records": {"d": {"used": 4, "skipped": []}}})
    assert "Prompts asked: 4 (reliability)." in text
    assert "## e (1 records" in markdown(result | {"records": {"e": {"used": 1, "skipped": []}}})  # nothing is complete of it yet


def test_published_numbers_stand_beside_the_measured_ones():
    row = {"dataset": "zsre", "case": "MEMIT", "edits": 1, "reliability": 0.5, "reliability_interval": [0.4, 0.6], "seconds_per_edit": 0.1}
    result = {
        "title": "t",
        "paper": "",
        "note": "",
        "protocol": "consecutive",
        "samples": 1,
        "rows": [row],
        "records": {"zsre": {"used": 1, "skipped": []}},
        "expected": [{"dataset": "zsre", "case": "MEMIT", "reliability": 0.7, "source": "made up"}],
    }
    text = markdown(result)
    assert "| MEMIT | 0.500 [0.400, 0.600] | 0.100 |" in text and "| · made up | 0.700 |  |" in text


def test_several_orders_are_averaged_record_by_record(tmp_path, few_texts):
    path = tmp_path / "e.yaml"
    one = SMALL | {"methods": [{"method": "FT", "steps": 5}], "evaluations": 1, "samples": 8, "answer_tokens": 6, "measures": ["text"]}
    path.write_text(yaml.safe_dump(one | {"orders": 3}))
    (row,) = output("experiment", path, "--out", tmp_path / "out")["rows"]
    logs = [tmp_path / "out/e/testbed/FT" / name / "log.jsonl" for name in ("", "order-1", "order-2")]
    events = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    asked = [{event["subject"]: event for event in own if event["event"] == "record"} for own in events]
    orders = [list(own) for own in asked]
    assert orders[0] == [fact.subject for fact in testbed.facts()[:8]] and len({tuple(order) for order in orders}) == 3
    assert all(set(order) == set(orders[0]) for order in orders)
    for key in ("reliability", "generality_written", "locality"):
        values = [[own[subject][key] for subject in orders[0]] for own in asked]
        means = [sum(own) / 8 for own in values]
        assert row[key] == pytest.approx(sum(means) / 3)
        assert row[f"{key}_spread"] == pytest.approx(statistics.stdev(means))
        each = [statistics.mean(own) for own in zip(*values, strict=True)]
        assert row[f"{key}_interval"] == pytest.approx(bootstrap_interval(each, 0))
    changed = [event["extra"]["text_changed"] for own in events for event in own if event["event"] == "checkpoint"]
    assert row["text_changed"] == pytest.approx(sum(changed) / 3) and row["orders"] == 3
    lines = (tmp_path / "out/e.md").read_text()
    assert f"± {row['reliability_spread']:.3f}" in lines and "standard deviation over the orders" in lines
    path.write_text(yaml.safe_dump(one))
    (first,) = output("experiment", path, "--out", tmp_path / "out")["rows"]  # the file's order was run already
    assert first["reliability"] == pytest.approx(sum(own["reliability"] for own in asked[0].values()) / 8) and "orders" not in first


def test_tables_begin_with_what_was_written(barely_trained, tmp_path):
    path = tmp_path / "e.yaml"
    for tokens in (12, 0):
        path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "evaluations": 1, "samples": 2, "answer_tokens": tokens}))
        out = tmp_path / str(tokens)
        (row,) = output("experiment", path, *barely_trained, "--out", out)["rows"]
        lines = (out / "e.md").read_text().splitlines()
        (head,) = [line for line in lines if line.startswith("| case")]
        assert head.startswith(
            "| case | reliability, written | generality, written | locality, written |" if tokens else "| case | reliability |"
        )
        assert any(line.startswith("* written: what the model writes") for line in lines) == bool(tokens)
        assert any("(teacher-forced): share" in line for line in lines)
        written = [a.get("written") for a in json.loads((out / "e/testbed/FT/log.jsonl").read_text().splitlines()[-2])["answers"]]
        assert all(isinstance(text, str) for text in written) if tokens else set(written) == {None}
        assert (row["reliability_written"] is not None) == bool(tokens)
        shown = run("experiment", path, *barely_trained, "--out", out).stdout
        assert ("written: what the model writes" in shown) == bool(tokens) and ("teacher-forced: share" in shown) != bool(tokens)
    path.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "evaluations": 1, "samples": 2, "chat": True}))
    refused = run("experiment", path, *barely_trained, "--out", tmp_path / "chat", "--json")  # the embedded model is not one to chat with
    assert refused.exit_code == 1 and "no chat template" in json.loads(refused.stdout)["error"]


def test_one_clear_error(tmp_path):
    for args, words in (
        (("table9",), "table2"),
        (("table2", "--model", "no/such/model", "--records", str(tmp_path / "x.json")), "no such file"),
        (("table2", "--model", "no/such/model"), "--records"),
        (("table2", "--device", "nonsense"), "--device"),
    ):
        result = run("experiment", *args, "--out", tmp_path, "--json")
        assert result.exit_code == 1 and words in json.loads(result.stdout)["error"]


def test_a_case_whose_files_are_missing_stops_no_other(tmp_path):
    path = tmp_path / "some.yaml"
    cases = ["GRACE", {"method": "MEND", "editor": str(tmp_path / "nowhere")}]
    path.write_text(yaml.safe_dump(SMALL | {"samples": 2, "evaluations": 1, "methods": cases}))
    rows = output("experiment", path, "--case", "GRACE", "--out", tmp_path / "out")["rows"]
    assert [row["case"] for row in rows] == ["GRACE"]
    failed = run("experiment", path, "--out", tmp_path / "out")
    assert failed.exit_code == 1 and "nowhere does not exist" in failed.output
