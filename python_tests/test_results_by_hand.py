"""What is measured beside the scores, averaged over orders, compared and said of results: small examples with known outcomes."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_definitions import bigrams, words
from test_editor import small_model
from test_measures_by_hand import CHAIN

from comeba_ext import Editor, EditRequest, testbed
from comeba_ext.data.readers import ReadResult
from comeba_ext.evaluation import Result, perplexity
from comeba_ext.evaluation.ability import UnrelatedText
from comeba_ext.evaluation.comparing import differences, pairs, retention_over
from comeba_ext.evaluation.metrics import averaged, summarise
from comeba_ext.experiments import measures, plots
from comeba_ext.experiments.definition import Case, Experiment
from comeba_ext.experiments.rows import rows_of
from comeba_ext.experiments.runner import _Work
from comeba_ext.experiments.table import _ahead, _asked, cell
from comeba_ext.methods import default_config
from comeba_ext.report.page import _section
from comeba_ext.report.results import Results, _orders
from comeba_ext.text.request import latest


def row(name=0, value=1.0, **more):
    """A record's row of a run."""
    return {"request_id": None, "prompt": f"{name}", "subject": "s", "target_new": "t", "reliability": value, "answers": []} | more


# -- measures beside the scores --------------------------------------------------------------------------------------


class Switched:
    """An editor of which only matters whether its edits are on."""

    model, on, max_tokens = None, True, 99

    def tokenizer(self, text, **_):
        return {"input_ids": [1, 2, 3]}

    @contextlib.contextmanager
    def disabled(self):
        self.on = False
        yield
        self.on = True

    def save_pretrained(self, folder, inference_only=False):
        folder.mkdir()
        (folder / "a").write_bytes(b"x" * (10 if inference_only else 99))
        (folder / "b").mkdir()
        (folder / "b" / "c").write_bytes(b"y" * 5)


def test_costs(monkeypatch):
    """The first token takes 3.5 s and 2.25 s, every further one 0.5 and 0.25; of seven prompts the median."""
    editor, late = Switched(), iter([0, 0] * 2 + [50] * 4 + [0] * 99)  # one prompt of the seven is a slow one

    def seconds(own, ids, tokens):
        return (3 + tokens / 2 if own.on else 2 + tokens / 4) + next(late) * tokens

    monkeypatch.setattr(measures, "_seconds", seconds)
    monkeypatch.setattr(measures, "input_device", lambda model: "cpu")
    found = measures.make(("costs",), [])(editor, [EditRequest("{} is", f"s{n}", "x") for n in range(21)])
    assert (found["prompt_seconds"], found["prompt_seconds_before"], found["prompt_slowdown"]) == (3.5, 2.25, 3.5 / 2.25)
    assert (found["token_seconds"], found["token_seconds_before"], found["token_slowdown"]) == (0.5, 0.25, 2)
    assert found["edits_bytes"] == 15


def test_what_stood_before_is_asked_without_the_edits(monkeypatch):
    editor = Switched()
    task = lambda *_, **__: {"a": {"alias": "a", "acc_stderr,none": 0.1, "acc,none": 0.25 if editor.on else 0.75}}  # noqa: E731
    monkeypatch.setattr(measures, "fluency", lambda *_: {"fluency": 5.0 if editor.on else 6.0})
    monkeypatch.setattr(measures, "harness", task)
    found = measures.make(("fluency", "abilities"), [], tasks=measures.Tasks(("a",)))(editor, [EditRequest("{} is", "s", "x")])
    assert (found["fluency"], found["fluency_before"]) == (5.0, 6.0)
    assert found["abilities"] == {"a": {"metric": "acc", "edited": 0.25, "unedited": 0.75}}


@torch.no_grad()
def test_text_that_a_later_edit_names_is_left_out_before_and_after():
    tokenizer = words("a b c Peru Oslo is")
    model = bigrams(tokenizer, CHAIN)
    one, two = EditRequest("{} is", "Peru", "c"), EditRequest("{} is", "Oslo", "c")
    read = UnrelatedText(["a b c a", "b c Oslo a", "c Peru a c"])
    assert read(model, tokenizer, [one])["texts"] == 2 and read(model, tokenizer, [two])["texts"] == 2
    found = read(model, tokenizer, [one, two])
    assert (found["texts"], found["text_tokens"]) == (1, 4) and found["text_changed"] == 0
    assert found["perplexity"] == found["perplexity_before"] == pytest.approx(4)
    again = read(model, tokenizer, [two])  # of as many tokens as the first, and others
    assert again["perplexity_before"] == again["perplexity"] and again["text_changed"] == 0


def test_perplexity_of_no_number(tiny_model, tokenizer):
    model = small_model(tiny_model).double()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert perplexity(model, tokenizer, ["The capital of Norway is Oslo"]) == math.exp(700)


def test_other_questions_share_no_word_with_the_edit():
    asked = lambda prompt: [text for text, _ in measures.questions_beside(EditRequest(prompt, "Oslo", "x"))]  # noqa: E731
    assert len(asked("The cat and the dog of {} are")) == 5  # words of three letters do not count
    assert len(asked("The twin of {} is")) == 4 and "The twin city of Oslo is" not in asked("The twin of {} is")


@pytest.fixture(scope="module")
def editor():
    found = Editor(*testbed.load())
    yield found
    found.close()


def test_other_facts_are_asked_of_so_many_records_at_most(editor, monkeypatch):
    asked, real = [], measures.evaluate

    def evaluate(model, tokenizer, records, **how):
        asked.append([record.subject for record in records])
        return real(model, tokenizer, records, **how)

    monkeypatch.setattr(measures, "OTHER_RECORDS", 2)
    monkeypatch.setattr(measures, "evaluate", evaluate)
    facts = testbed.facts()[:3]
    of_all = EditRequest("Religion, headquarters, twin city, year, famous: {} is", facts[1].subject, "x")
    found = measures.make(("other_facts",), [])(editor, facts)
    assert found["other_facts_records"] == 2 and asked == [[facts[0].subject, facts[2].subject]]
    found = measures.make(("other_facts",), [])(editor, [facts[0], of_all])  # who is asked nothing is no record
    assert found["other_facts_records"] == 1
    assert "shares a word" in measures.make(("other_facts",), [])(editor, [of_all])["other_facts_error"]


def test_prompts_that_two_records_share_are_one(editor):
    local = (("The Eiffel Tower stands in", None),)
    same = [dataclasses.replace(fact, rephrase_prompts=(), locality_prompts=local) for fact in testbed.facts()[:2]]
    assert measures.make(("conditions",), [])(editor, same)["padding_agreement"] == 1


# -- several runs ----------------------------------------------------------------------------------------------------


def test_retention_over_orders_goes_by_the_place_in_each():
    orders = [[row(n, value) for n, value in enumerate(values)] for values in ([1.0] * 10 + [0.0] * 10, [1.0] * 10 + [0.5] * 10)]
    found = retention_over(orders, "reliability")
    assert [(own["first"], own["last"], own["value"]) for own in found] == [(1, 10, 1.0), (11, 20, 0.25)]


def test_the_peak_of_several_orders_is_the_highest():
    step = lambda peak: {"edits": 1, "requests": 1, "seconds": {"values": 1.0}, "peak_memory": peak}  # noqa: E731
    (found,) = rows_of([Result({1: summarise([row()])}, {1: {}}, [step(peak)]) for peak in (100, 300)], 0)
    assert found["peak_memory"] == 300 and found["orders"] == 2


def test_records_of_several_orders_are_those_of_one():
    assert averaged([summarise([row(n) for n in range(4)]), summarise([row(n) for n in range(2, 6)])]).records == 4


@pytest.mark.parametrize("named", [True, False])
def test_orders_are_no_further_records(named):
    """An interval over questions is over the records, however often each was asked."""
    question = {"criterion": "c", "probes": [["Who?", ["x"]]]}
    asked = [EditRequest("{} is", f"s{n}", "x", request_id=f"r{n}" if named else None, questions=[question]) for n in range(20)]

    def verdicts(request):
        right = request.subject[-1] in "13579"
        own = [
            {"criterion": one.criterion, "counted": True, "written": right, "contained": right, "case": one.case}
            for one in request.questions
        ]
        return row(request.prompt, request_id=request.request_id, subject=request.subject, questions=own)

    runs = [summarise([verdicts(request) for request in latest(order)]) for order in (asked, asked[::-1], asked[7:] + asked[:7])]
    assert averaged(runs).questions["c"]["written_interval"] == runs[0].questions["c"]["written_interval"]


def test_a_run_that_failed_has_no_retention():
    rows = [row(n) for n in range(20)]
    whole, broken = (Result({20: summarise(rows)}, {20: {"saved_bytes": 1}}, [], *end) for end in ((None, None), (20, "infinities")))
    assert len(rows_of([whole], 0)[-1]["retention"]) == 2
    assert all("retention" not in own for own in rows_of([broken], 0))


# -- comparing -------------------------------------------------------------------------------------------------------


def test_two_that_are_equal_are_one_pair():
    rows = [row(n) for n in range(10)]
    (own,) = pairs({"a": rows, "b": rows}, ["reliability"])["reliability"]
    assert own == {"ahead": "a", "behind": "b", "mean": 0, "interval": [0, 0], "apart": False}


def test_two_targets_of_one_fact_are_two_records():
    rows = lambda value: [row("p", value, subject=f"{n}", target_new=target) for n in range(5) for target in "xy"]  # noqa: E731
    assert differences({"a": rows(1.0), "b": rows(0.0)}, "reliability")["a"] == {"b": (1.0, [1.0, 1.0])}


def test_who_is_not_told_apart_is_not_ahead():
    pair = lambda behind, apart: {"ahead": "a", "behind": behind, "mean": 0.1, "interval": [0, 0.2], "apart": apart}  # noqa: E731
    assert _ahead({"reliability": [pair("b", False)]}) == ["Nobody is ahead in reliability.", ""]
    (line, _) = _ahead({"reliability": [pair("b", False), pair("c", True)]})
    assert line == "Ahead in reliability (paired over records, 95 %): a of c."


def test_what_is_compared_is_every_records_mean_over_the_orders():
    results = [Result({1: summarise([row(value=value)])}, {1: {}}, []) for value in (1.0, 0.5)]
    case, configs = Case("FT", "FT", {}), {"FT": default_config("FT", testbed.load()[0])}
    experiment, asked = Experiment(name="e", title="t", cases=(case,), orders=2), {"d": [EditRequest("{} is", "s", "t")]}
    work = _Work(experiment, None, None, Path(), 0, None, configs, asked, {})
    _, last = work.rows([case], (case,), {("d", "FT"): results})
    assert [own["reliability"] for own in last["d"]["FT"]] == [0.75]


# -- what is said ----------------------------------------------------------------------------------------------------


def test_how_much_was_counted_stands_in_the_table():
    asked = {"reliability_prompts": 7, "generality_prompts": 4, "reliability_unwritable": 2}
    assert _asked([asked | {"questions": {"multi-hop": {"questions": 9, "counted": 3}}}]) == [
        "Prompts asked: 7 (reliability), 4 (generality).",
        "Left out as written, since no right answer can be written so: 2 (reliability).",
        "Questions counted: 3 of 9 (multi-hop).",
    ]
    assert cell({"edits_bytes": 1_234_567}, "edits_bytes") == "1.23" and cell({"peak_memory": 5_000_000}, "peak_memory") == "5"


def test_a_limit_counts_records_not_their_edits():
    requests = [EditRequest("{} is", f"s{n}", "x", case=f"{n // 2}") for n in range(6)]
    used, skipped = ReadResult(requests, 3, [], [0, 0, 1, 1, 2, 2]).usable(lambda *_: None, limit=2)
    assert used == requests[:4] and not skipped


def section(count, edits, protocol="consecutive", error=()):
    """The page's section of two cases, one of which is right everywhere."""
    rows = {case: [row(n, right) for n in range(count)] for case, right in (("A", 1.0), ("B", 0.0))}
    cases = [{"dataset": "d", "case": case, "edits": n, "reliability": rows[case][0]["reliability"]} for case, n in edits.items()]
    cases += [{"dataset": "d", "case": case, "edits": edits[case], "reliability": None, "error": "infinities"} for case in error]
    result = {"title": "t", "protocol": protocol, "rows": cases, "records": {"d": {"used": count, "skipped": []}}}
    return _section(Results(result, {"d": rows}, {"d": {case: [own] for case, own in rows.items()}}), "d", "s")


def test_a_case_that_was_asked_earlier_is_not_compared(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "retention", lambda ages, real=plots.retention: drawn.append(sorted(ages)) or real(ages))
    level, early = section(20, {"A": 20, "B": 20}), section(20, {"A": 20, "B": 10}, error=["B"])
    assert level["differences"][0][2]["A"]["B"] == (1.0, [1.0, 1.0]) and early["differences"] == []
    assert [own["cells"][0]["top"] for own in level["table"]["rows"]] == [True, False]
    assert [own["cells"][0]["top"] for own in early["table"]["rows"]] == [False, False]
    assert drawn == [["A", "B"], ["A"]]  # and one that failed has no retention after its last edit


def test_retention_is_drawn_from_two_ages_on():
    drawn = lambda *given: any(own["title"].startswith("Retention") for own in section(*given)["figures"])  # noqa: E731
    assert drawn(20, {"A": 20, "B": 20}) and not drawn(19, {"A": 19, "B": 19}) and not drawn(20, {"A": 20, "B": 20}, "single_round")
    groups = retention_over([[row(n) for n in range(20)]], "reliability")
    (axis,) = plots.retention({"A": [], "B": groups}).axes  # who has no score is none of the lines
    assert [line.get_label() for line in axis.lines] == ["B"]


def test_all_rows_of_a_single_round(tmp_path):
    folder = tmp_path / "e/d/A"
    folder.mkdir(parents=True)
    lines = [{"event": "record", "edits": edits, "subject": f"{n}"} for n, edits in enumerate((2, 2, 4, 4))]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def subjects(protocol):
        result = {"records": {"d": {}}, "protocol": protocol, "rows": [{"dataset": "d", "case": "A", "log": "e/d/A"}]}
        return [own["subject"] for own in _orders(result, tmp_path)["d"]["A"][0]]

    assert subjects("single_round") == ["0", "1", "2", "3"] and subjects("consecutive") == ["2", "3"]
