"""The page of results: what it computes against loops, what it shows in a browser."""

import json
import shutil

import numpy as np
import pytest
import yaml
from test_cli import output, run

from comeba_ext import report, testbed
from comeba_ext.errors import StorageError
from comeba_ext.evaluation.comparing import best, differences, pairs, retention
from comeba_ext.report.results import examples

pytestmark = pytest.mark.usefixtures("one_block")

SMALL = {
    "title": "Two <small> ones",
    "samples": 20,
    "batch_size": 5,
    "evaluations": 2,
    "generate": False,
    "answer_tokens": 8,
    "methods": [{"method": "FT", "steps": 25}, {"method": "FT", "steps": 1, "label": "FT & little"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An experiment with a method that works and one that does not."""
    home = tmp_path_factory.mktemp("report")
    (home / "small.yaml").write_text(yaml.safe_dump(SMALL))
    output("experiment", home / "small.yaml", "--out", home / "out")
    return home / "out"


def rows(values, key="reliability"):
    return [{"request_id": None, "prompt": f"{n}", "subject": "s", "target_new": "t", key: value} for n, value in enumerate(values)]


def test_retention_is_the_mean_of_a_group_of_edits():
    values = [1.0] * 10 + [0.0, 1.0] * 5 + [0.0] * 5
    found = retention(rows(values), ages=3)
    assert [(own["first"], own["last"], own["value"]) for own in found] == [(1, 10, 1.0), (11, 20, 0.5), (21, 25, 0.0)]
    assert found[0]["interval"] == [1, 1] and found[1]["interval"][0] < 0.5 < found[1]["interval"][1]
    # Never fewer than ten edits in a group but the last; records that were not asked are left out.
    assert [(own["first"], own["last"]) for own in retention(rows([1.0, None] * 6))] == [(1, 10), (11, 12)]
    assert retention(rows([None] * 12)) == []


def test_differences_are_paired():
    """By a loop over resamples of the records; what varies from record to record alike in both cases does not count."""
    generator = np.random.default_rng(0)
    hard = generator.random(60)
    one = np.clip(hard + 0.05, 0, 1)
    records = {"a": rows(one), "b": rows(hard), "c": rows([None, *generator.random(59)])}
    found = differences(records, "reliability")
    mean, (low, high) = found["a"]["b"]
    assert mean == pytest.approx((one - hard).mean()) and 0 < low < mean < high
    draws = np.random.default_rng(1).integers(0, 60, (4000, 60))
    assert (low, high) == pytest.approx(tuple(np.quantile((one - hard)[draws].mean(1), (0.025, 0.975))), abs=2e-3)
    assert found["b"]["a"] == (-mean, [-high, -low])
    others = [row["reliability"] for row in records["c"][1:]]
    assert found["a"]["c"][0] == pytest.approx(np.mean(one[1:] - others))
    assert best({"a": records["a"], "b": records["b"]}, "reliability") == {"a"}
    assert best({"a": records["b"], "b": records["b"]}, "reliability") == {"a", "b"}
    more = {case: [{**row, "hallucination": row["reliability"]} for row in own] for case, own in records.items() if case != "c"}
    assert best(more, "hallucination") == {"b"}  # the fewer the better
    assert np.copysign(1, differences({"a": records["b"], "b": records["b"]}, "reliability")["b"]["a"][0]) == 1  # no "−0.000"


def test_nobody_is_ahead_by_a_handful_of_records():
    few = {"a": rows([1.0] * 9), "b": rows([0.0] * 9)}
    assert differences(few, "reliability") == {"a": {}, "b": {}} and best(few, "reliability") == set() and pairs(few, ["reliability"]) == {}
    more = {"a": rows([1.0] * 10), "b": rows([0.0] * 10), "c": rows([1.0] * 9 + [0.9])}
    found = {(own["ahead"], own["behind"]): own["apart"] for own in pairs(more, ["reliability"])["reliability"]}
    assert found == {("a", "b"): True, ("a", "c"): False, ("c", "b"): True}
    less = {case: [{**row, "hallucination": row["reliability"]} for row in own] for case, own in more.items()}
    assert {own["ahead"] for own in pairs(less, ["hallucination"])["hallucination"] if own["apart"]} == {"b"}


def test_retention_over_orders():
    """Two orders of 20 records, by turns: a group of ten ages has both orders' values."""
    one, two = rows([1.0] * 10 + [0.0] * 10), rows([0.5] * 20)
    found = retention([row for pair in zip(one, two, strict=True) for row in pair], orders=2)
    assert [(own["first"], own["last"], own["value"]) for own in found] == [(1, 10, 0.75), (11, 20, 0.25)]


def answer(metric, wanted, written, **more):
    return {"metric": metric, "prompt": "p", "wanted": wanted, "predicted": "x", "generated": None, "score": 0, "written": written, **more}


def test_wrong_examples_come_first():
    good = [answer("reliability", "Rome", "Rome, Italy."), answer("locality", "x", "Oslo", unedited_written="oslo.")]
    bad = [answer("reliability", "Rome", "Paris"), answer("locality", "x", "Oslo", unedited_written="Bergen")]
    base = {"subject": "s", "target_new": "Rome"}
    found = examples([{**base, "answers": good}, {**base, "answers": bad}], "_written")
    assert [(own["edit"], own["wrong"]) for own in found] == [(2, 2), (1, 0)]
    assert [own["right"] for own in found[1]["answers"]] == [True, True] and found[0]["answers"][1]["wanted"] == "Bergen"
    by_alias = {
        **base,
        "answers": [answer("reliability", "Rome", "Roma")],
        "reliability_written": 1.0,
    }  # the record's own score knows aliases
    assert examples([by_alias], "_written")[0]["wrong"] == 0
    forced = {**base, "answers": [answer("reliability", "Rome", None, score=1, predicted="Rome")]}
    assert examples([forced], "")[0]["answers"][0] == {
        "metric": "reliability",
        "prompt": "p",
        "wanted": "Rome",
        "answer": "Rome",
        "before": None,
        "right": True,
    }
    assert len(examples([forced] * 5, "", 3)) == 3
    # What the log says of every answer; one that could not be right is neither; a question's answers stand behind the prompts'.
    told = [answer("generality", "Rome", "Roma", right=True, unedited_written="Oslo"), answer("generality", "x", "y", right=None)]
    asked = {"criterion": "multi-hop", "counted": True, "written": False, "answers": [{"prompt": "q", "wanted": "Po", "written": "Arno"}]}
    (own,) = examples([{**base, "answers": told, "generality_written": 0.0, "questions": [asked, asked | {"counted": False}]}], "_written")
    assert [(one["right"], one["before"]) for one in own["answers"]] == [(True, "Oslo"), (None, None), (False, None)] and own["wrong"] == 1
    assert own["answers"][2]["metric"] == "multi-hop" and own["answers"][2]["answer"] == "Arno"


def test_results_of_a_folder(folder):
    (results,) = report.read(folder)
    assert report.read(folder / "small.json")[0].result == results.result
    assert list(results.records) == ["testbed"] and set(results.records["testbed"]) == {"FT", "FT & little"}
    ft, little = (results.records["testbed"][case] for case in ("FT", "FT & little"))
    assert len(ft) == len(little) == 20 and [row["subject"] for row in ft] == [row["subject"] for row in little]
    (row,) = [row for row in results.cases("testbed") if row["case"] == "FT"]
    assert row["edits"] == 20 and row["reliability_written"] == pytest.approx(np.mean([own["reliability_written"] for own in ft]))
    assert results.way("testbed") == "_written"
    assert {"cpu", "cores", "threads"} <= results.result["machine"].keys() and results.result["command"].startswith("comeba")


def test_other_files_are_not_results(folder, tmp_path):
    (tmp_path / "notes.json").write_text('{"a": 1}')
    with pytest.raises(StorageError, match="holds no result"):
        report.read(tmp_path)
    with pytest.raises(StorageError, match="no rows and records"):
        report.read(tmp_path / "notes.json")
    with pytest.raises(StorageError, match="no such file"):
        report.read(tmp_path / "nowhere")
    shutil.copy(folder / "small.json", tmp_path)  # without its logs: scores, and no examples
    (alone,) = report.read(tmp_path)
    assert alone.records == {"testbed": {}} and "Examples" not in report.build([alone])
    (tmp_path / "small.json").write_text((folder / "small.json").read_text()[:100])
    refused = run("report", tmp_path, "--out", tmp_path / "r.html", "--json")
    assert refused.exit_code == 1 and "small.json" in json.loads(refused.stdout)["error"] and not (tmp_path / "r.html").exists()


def test_an_evaluation_of_ones_own(tmp_path, monkeypatch):
    """What ``comeba eval --json`` printed: its scores, and the answers that it wrote beside, wrong ones first."""
    facts = [fact.to_record() for fact in testbed.facts()[:22]]
    facts[3] |= {"target_new": facts[3]["ground_truth"]}  # the one that the unedited model answers
    (tmp_path / "mine.json").write_text(json.dumps(facts))
    monkeypatch.chdir(tmp_path)
    found = output("eval", "testbed", "mine.json", "--answer-tokens", 4, "--no-generate", "--predictions", "answers.jsonl")
    (tmp_path / "eval.json").write_text(json.dumps(found))
    (results,) = report.read("eval.json")
    (row,) = results.cases("mine")
    assert (row["case"], row["edits"], row["reliability_written"]) == ("without edits", 22, found["reliability_written"])
    assert [own["subject"] for own in results.records["mine"]["without edits"]] == [fact["subject"] for fact in facts]
    page = report.build([results])
    assert "Evaluation of testbed" in page and "Examples, wrong ones first" in page and "Retention" not in page
    assert f"{found['reliability_written_interval'][1]:.3f}</small>" in page
    shown = examples(results.records["mine"]["without edits"], "_written")
    assert shown[-1]["subject"] == facts[3]["subject"] and shown[0]["wrong"] > shown[-1]["wrong"]
    made = output("report", "eval.json", "--out", "r.html")
    assert made["experiments"] == ["eval"] and (tmp_path / "r.html").exists()
    (tmp_path / "answers.jsonl").unlink()
    (alone,) = report.read(tmp_path / "eval.json")
    assert "Examples, wrong" not in report.build([alone])
    (tmp_path / "old.json").write_text(json.dumps({k: v for k, v in found.items() if k not in ("data", "model", "predictions", "command")}))
    assert "--predictions FILE" in report.build(report.read(tmp_path / "old.json"))


def test_what_a_report_is_not_made_from(tmp_path):
    (tmp_path / "comeba_edits.json").write_text('{"format": 1, "files": {}}')
    for path in (tmp_path, tmp_path / "comeba_edits.json"):
        with pytest.raises(StorageError, match="a report is made from .*comeba experiment.*comeba eval .*--json > eval.json"):
            report.read(path)


def test_a_page_that_needs_nothing_else(folder, tmp_path):
    found = output("report", folder, "--out", tmp_path / "r.html", "--title", "My <edits>")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert found["experiments"] == ["small"] and found["bytes"] == len(page.encode()) < 1_000_000
    assert "http" not in page.replace("http-equiv", "") and 'src="data:image/png' in page
    assert "<title>My &lt;edits&gt;</title>" in page and "Two &lt;small&gt; ones" in page and "FT &amp; little" in page
    refused = run("report", folder, "--out", tmp_path / "no" / "r.html", "--json")
    assert refused.exit_code == 1 and "no folder" in json.loads(refused.stdout)["error"]


def test_in_a_browser(folder, tmp_path):
    """Chromium, as wide as a phone: the table sorts, the page itself does not scroll sideways, examples unfold."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver here")
    output("report", folder, "--out", tmp_path / "r.html")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'user'}",
    ):
        options.add_argument(argument)
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        page.set_window_size(500, 900)
        page.get((tmp_path / "r.html").as_uri())
        script = page.execute_script
        names = lambda: script("return [...document.querySelectorAll('table.sorts tbody tr')].map(r => r.cells[0].textContent.trim())")  # noqa: E731
        assert names() == ["FT", "FT & little"]
        column = page.find_element("css selector", "table.sorts thead th:nth-child(2) button")
        assert column.text == "reliability, written"
        for expected in (["FT", "FT & little"], ["FT & little", "FT"]):  # best first, then the other way round
            column.click()
            assert names() == expected
        case = page.find_element("css selector", "table.sorts thead th:nth-child(1) button")
        case.click()
        assert names() == ["FT", "FT & little"]
        assert script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert all(script("return [...document.images].map(i => { i.loading = 'eager'; return i.src.startsWith('data:') })"))
        first = script("return [...document.querySelectorAll('summary')].find(s => s.textContent.startsWith('FT & little ('))")
        assert not script("return arguments[0].parentElement.open", first)
        first.click()
        shown = script("return arguments[0].parentElement.innerText", first)
        assert "edit 1:" in shown and "✗" in shown
        page.set_window_size(1200, 900)
        assert page.get_log("browser") == []
    finally:
        page.quit()
