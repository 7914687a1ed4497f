"""Experiments as files: what they mean, what they write, and that a killed one ends in the same table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_cli import output, run

from comeba_ext import EditConfig, Editor, experiments, testbed
from comeba_ext.errors import ConfigError
from comeba_ext.experiments import definition
from comeba_ext.experiments.table import markdown

ISSUE = {"table1", "table2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig10", "fig11", "scope"}
SMALL = {
    "title": "A small one",
    "samples": 6,
    "batch_size": 2,
    "evaluations": 2,
    "generate": False,
    "methods": ["COMEBA-HK", {"method": "MEMIT", "steps": 8}],
    "plot": "edits",
}
TIMES = ("seconds_per_edit", "peak_memory")


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


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
    assert experiment.name == name and experiment.testbed_samples and experiment.samples in (1000, 10000)
    for case in experiment.cases:
        case.config(model)
    assert len({case.label for case in experiment.cases}) == len(experiment.cases)


def test_settings_that_depend_on_the_model(model):
    cases = {case.label: case for name in ("fig5", "fig6", "fig10") for case in experiments.load(name).cases}
    assert cases["1 layer"].config(model).layers == (3,) and cases["3 layers"].config(model).layers == (1, 2, 3)
    assert cases["all layers"].config(model).layers == (0, 1, 2, 3)
    assert cases["10λ"].config(model).lam == pytest.approx(10 * EditConfig.for_model(model).lam)
    assert EditConfig.for_model(model, scope="zscore").lam == pytest.approx(4 * EditConfig.for_model(model).lam)
    assert {case.config(model).lam for case in experiments.load("table1").cases if "nearest" not in case.label} == {1500.0}
    assert cases["α₀ = 2.5"].config(model).alpha == 2.5 and cases["fixed α = 3"].method == "COMEBA-HK fixed threshold"


def test_grid_of_methods_and_settings(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"title": "t", "methods": ["FT", {"method": "memit", "label": "M"}],
                                    "settings": [{"label": "a", "steps": 1}, {"label": "b", "batch_size": 3}]}))  # fmt: skip
    cases = experiments.load(path).cases
    assert [c.label for c in cases] == ["FT, a", "FT, b", "M, a", "M, b"]
    assert [c.method for c in cases] == ["FT", "FT", "MEMIT", "MEMIT"] and cases[3].settings == {"batch_size": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("title: [", "not valid YAML"),
        ("5", "keys and values"),
        ("title: t", "'methods' is missing"),
        ("title: t\nmethods: [MEND]", "unknown method 'MEND'"),
        ("title: t\nmethods: [FT]\nsample: 3", "unknown key sample"),
        ("title: t\nmethods: [FT]\nprotocol: nonsense", "protocol must be one of"),
        ("title: t\nmethods: [FT]\nplot: pie", "plot must be one of"),
        ("title: t\nmethods: [FT]\nmeasures: [taste]", "measures must be of"),
        ("title: t\nmethods: [FT, FT]", "same label"),
    ],
)
def test_malformed_files(tmp_path, content, words):
    path = tmp_path / "e.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        experiments.load(path)


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="table2"):
        experiments.load("table9")
    with pytest.raises(ConfigError, match="No such file"):
        experiments.load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="unknown key 'lamm'"):
        definition.Case("MEMIT", "x", {"lamm": 1}).config(testbed.load()[0])


# -- running --------------------------------------------------------------------------------------------------------


def test_a_killed_experiment_ends_in_the_same_table(small, covariance, tmp_path):
    given = (small, "--covariance", covariance)
    whole = output("experiment", *given, "--out", tmp_path / "whole")
    assert [(r["case"], r["edits"]) for r in whole["rows"]] == [(c, n) for c in ("COMEBA-HK", "MEMIT") for n in (4, 6)]
    for row in whole["rows"]:
        assert {"dataset", "method", "reliability", "reliability_interval", "generality", "generality_interval", "locality",
                "locality_interval"} <= set(row)  # fmt: skip
    assert whole["records"]["testbed"]["used"] == 6
    command = [sys.executable, "-m", "comeba_ext.cli", "experiment", *map(str, given), "--out",
               str(tmp_path / "killed"), "--json"]  # fmt: skip
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(root)})
    log, deadline = tmp_path / "killed/testbed/COMEBA-HK/log.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if log.exists() and '"edit"' in log.read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/small.json").exists()
    resumed = output("experiment", *given, "--out", tmp_path / "killed")
    assert metrics_of(resumed) == metrics_of(whole)
    cut = lambda text: [line.rsplit("|", 2)[0] for line in text.splitlines()]  # noqa: E731  (without seconds)
    assert cut((tmp_path / "killed/small.md").read_text()) == cut((tmp_path / "whole/small.md").read_text())
    assert metrics_of(json.loads((tmp_path / "whole/small.json").read_text())) == metrics_of(whole)
    assert (tmp_path / "whole/small-testbed.png").stat().st_size > 10_000
    again = output("experiment", *given, "--out", tmp_path / "whole")  # complete: only read
    assert again["rows"] == whole["rows"]
    other = run("experiment", *given, "--out", tmp_path / "whole", "--samples", 2, "--json")
    assert other.exit_code == 1 and "another run" in json.loads(other.stdout)["error"]


def test_every_measure_and_plot(covariance, tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"samples": 4, "evaluations": 1, "measures": list(definition.MEASURES), "plot": "scores",
                                            "methods": ["COMEBA-HK"]}))  # fmt: skip
    (row,) = output("experiment", path, "--covariance", covariance, "--out", tmp_path / "out")["rows"]
    assert row["efficacy_score"] > 0.7 and 0 <= row["text_changed"] < 0.2 and row["perplexity"] > 1 and row["fluency"] > 1
    assert 0.9 <= row["padding_agreement"] <= 1 and row["reliability_behind_text"] >= 0.5 and "reliability_short" in row
    assert len(row["peak_scores"]["edited"]["model.layers.0.mlp.down_proj"]) == 4
    assert row["in_scope_edited"] == 1
    for plot in ("bars", "settings"):
        path.write_text(yaml.safe_dump(SMALL | {"samples": 2, "evaluations": 1, "plot": plot, "title": plot,
                                                "protocol": "single_round"}))  # fmt: skip
        result = output("experiment", path, "--covariance", covariance, "--out", tmp_path / plot)
        assert [r["edits"] for r in result["rows"]] == [2, 2] and result["plots"] == ["all-testbed.png"]


def test_records_of_a_file(tmp_path):
    path = tmp_path / "facts.jsonl"
    rows = [r.to_record() for r in testbed.facts()[:2]] + [{"prompt": "nothing"}, {"prompt": "{} " + "very " * 200, "subject": "x",
                                                                                 "target_new": "y"}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL | {"methods": ["FT"], "evaluations": 1}))
    result = output("experiment", small, "--out", tmp_path / "out", "--records", f"mine={path}")
    assert result["records"]["mine"]["used"] == 2 and len(result["records"]["mine"]["skipped"]) == 2
    plain = run("experiment", small, "--out", tmp_path / "out", "--records", f"mine={path}")
    assert plain.exit_code == 0 and "FT" in plain.stdout and "skipped" in plain.stdout


def test_published_numbers_stand_beside_the_measured_ones():
    row = {"dataset": "zsre", "case": "MEMIT", "edits": 1, "reliability": 0.5, "reliability_interval": [0.4, 0.6],
           "seconds_per_edit": 0.1}  # fmt: skip
    result = {"title": "t", "paper": "", "note": "", "protocol": "consecutive", "samples": 1, "rows": [row],
              "records": {"zsre": {"used": 1, "skipped": []}},
              "expected": [{"dataset": "zsre", "case": "MEMIT", "reliability": 0.7, "source": "made up"}]}  # fmt: skip
    text = markdown(result)
    assert "| MEMIT | 0.500 [0.400, 0.600] | 0.100 |" in text and "| · made up | 0.700 |  |" in text


def test_one_clear_error(tmp_path):
    for args, words in (
        (("table9",), "table2"),
        (("table2", "--model", "no/such/model", "--records", str(tmp_path / "x.json")), "no such file"),
        (("table2", "--model", "no/such/model"), "--records"),
    ):
        result = run("experiment", *args, "--out", tmp_path, "--json")
        assert result.exit_code == 1 and words in json.loads(result.stdout)["error"]
