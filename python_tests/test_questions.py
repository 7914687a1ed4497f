"""Questions that ask more than one prompt: read from benchmarks' records, asked, and judged as their papers say."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from test_cli import output, run
from test_evaluation import RECORDS, pair  # noqa: F401  (a fixture)
from test_written import written_by_hand

from comeba_ext import EditRequest, evaluate, testbed
from comeba_ext.data import read_requests
from comeba_ext.errors import RequestError
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.evaluation.metrics import averaged, summarise
from comeba_ext.evaluation.written import is_contained, is_written, normalised
from comeba_ext.text.questions import Probe, Question
from comeba_ext.text.request import as_requests, consecutive_batches, latest

pytestmark = pytest.mark.usefixtures("one_block")

MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "subject": "Ellie Kemper",
            "target_new": {"str": "Croatia"},
            "target_true": {"str": "United States of America"},
            "question": "What is the country of citizenship of Ellie Kemper?",
        },
        {"prompt": "The head of state of {} is", "subject": "Croatia", "target_new": {"str": "Marie"}, "target_true": {"str": "Kolinda"}},
    ],
    "questions": ["Who leads the country of Ellie Kemper?", "Who is the head of Ellie Kemper's country?"],
    "new_answer": "Marie",
    "new_answer_alias": ["Mary"],
    "new_single_hops": [
        {"question": "?", "cloze": "Ellie Kemper is a citizen of", "answer": "Croatia", "answer_alias": ["Hrvatska"]},
        {"question": "Who leads Croatia?", "answer": "Marie"},
    ],
}
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leonardo DiCaprio is Syria.",
        "subject_id": "Q38111",
        "original_fact": {"prompt": "The name of the country of citizenship of Leonardo DiCaprio is United States of America."},
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                {"prompt": "The name of the mother of Leonardo DiCaprio is", "answers": [{"value": "Irmelin", "aliases": []}]}
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                {
                    "prompt": "The capital of the country of Leonardo DiCaprio is",
                    "answers": [{"value": "Damascus", "aliases": ["Dimashq"]}],
                },
                {
                    "prompt": "The currencies in the country of Leonardo DiCaprio are",
                    "answers": [{"value": "Pound", "aliases": []}, {"value": "Lira", "aliases": ["₺"]}],
                },
            ],
            "test_condition": "AND",
            "condition_queries": [
                {"prompt": "The name of the capital city of Syria is", "answers": [{"value": "Damascus", "aliases": []}]}
            ],
        }
    ],
}


def test_mquake_is_several_edits_and_their_questions():
    first, last = as_requests([MQUAKE])
    assert (first.prompt, first.subject, first.target_new, first.request_id) == ("{} is a citizen of", "Ellie Kemper", "Croatia", "7.0")
    assert first.ground_truth == "United States of America" and first.case == last.case == "7"
    assert first.rephrase_prompts == ("What is the country of citizenship of Ellie Kemper?",) and last.rephrase_prompts == ()
    assert first.aliases == ("Hrvatska",) and last.aliases == ()  # of the hop that has the new object
    assert first.questions == (Question("edit-wise", (Probe("Ellie Kemper is a citizen of", ("Croatia", "Hrvatska")),)),)
    answers = ("Marie", "Mary")
    assert last.questions == (
        Question("edit-wise", (Probe("The head of state of Croatia is", ("Marie",)),)),
        Question(
            "instance-wise",
            (Probe("Ellie Kemper is a citizen of", ("Croatia", "Hrvatska")), Probe("Who leads Croatia?", ("Marie",))),
            every=True,
        ),
        Question("multi-hop", tuple(Probe(question, answers) for question in MQUAKE["questions"])),
    )
    with pytest.raises(RequestError, match="record 3: holds 2 edits"):
        EditRequest.from_record(MQUAKE, 3)


def test_akews_paragraphs_are_edited_behind_their_questions(tmp_path):
    rewrite = MQUAKE["requested_rewrite"][0] | {"fact_new_uns": "Croatia is home to Ellie Kemper. She lives there."}
    path = tmp_path / "akew.json"
    path.write_text(json.dumps([MQUAKE | {"requested_rewrite": [rewrite]}, MQUAKE, RECORDS[0]]))
    read = read_requests(path, unstructured=True)
    (request,) = read.requests
    assert (request.text, request.target_new) == (rewrite["question"], rewrite["fact_new_uns"])
    assert (request.fact_token, request.place, request.case) == ("last", len(request.text), "7") and not request.rephrase_prompts
    assert [own.criterion for own in request.questions] == ["edit-wise", "instance-wise", "multi-hop"]
    assert request.questions[0].probes[0] == Probe("Ellie Kemper is a citizen of", ("Croatia", "Hrvatska"))
    assert [skip["index"] for skip in read.skipped] == [1, 2] and all("unstructured" in skip["reason"] for skip in read.skipped)
    assert len(read_requests(path).requests) == 4
    inside = {"prompt": "{} speaks", "subject": "Ellie", "target_new": {"str": "Czech"}, "question": "What does Ellie speak?"}
    record = {"case_id": 3, "requested_rewrite": inside | {"fact_new_uns": "She speaks Czech."}, "paraphrase_prompts": ["Ellie says"]}
    path.write_text(json.dumps([record]))  # its CounterFact's form
    (request,) = read_requests(path, unstructured=True).requests
    assert (request.text, request.target_new, request.fact_token) == ("What does Ellie speak?", "She speaks Czech.", "last")
    assert not request.rephrase_prompts and read_requests(path).requests[0].target_new == "Czech"


def test_ripple_edits_names_nobody():
    (request,) = as_requests([RIPPLE])
    assert request.prompt == "The name of the country of citizenship of {} is" and request.subject == "Leonardo DiCaprio"
    assert (request.target_new, request.ground_truth) == ("Syria", "United States of America")
    composed, specific = request.questions
    assert composed == Question(
        "compositionality i",
        (
            Probe("The capital of the country of Leonardo DiCaprio is", ("Damascus", "Dimashq")),
            Probe("The currencies in the country of Leonardo DiCaprio are", ("Pound",), (("Lira", "₺"),)),
        ),
        every=True,
        conditions=(Probe("The name of the capital city of Syria is", ("Damascus",)),),
    )
    assert specific.criterion == "relation specificity" and not specific.every and specific.conditions == ()
    # "Spain" and "Sweden" part within a word; a subject with an "of" of its own is what its tests end in.
    anthem = "The name of the anthem of University of Oxford is"
    edit = {"prompt": f"{anthem} Spain.", "original_fact": {"prompt": f"{anthem} Sweden."}}
    tests = [{"test_queries": [{"prompt": "The head of University of Oxford is", "answers": [{"value": "x"}]}]}]
    (request,) = as_requests([{"edit": edit, "Forgetfulness": tests}])
    assert (request.subject, request.target_new, request.ground_truth) == ("University of Oxford", "Spain", "Sweden")
    (named,) = as_requests([{"edit": edit | {"subject": "Oxford"}}])
    assert named.subject == "Oxford"
    # Two answers that begin alike; a fact that is only recent; the name that upstream's later versions have for what was true.
    cities = {"prompt": f"{anthem} New York.", "original_fact": {"prompt": f"{anthem} New Delhi."}}
    recent = {"prompt": f"{anthem} God Save the King."}
    renamed = {"prompt": edit["prompt"], "previous_fact": edit["original_fact"]}
    found = as_requests([{"edit": own, "Forgetfulness": tests} for own in (cities, recent, renamed)])
    assert [(own.prompt, own.target_new, own.ground_truth) for own in found] == [
        ("The name of the anthem of {} is", "New York", "New Delhi"),
        ("The name of the anthem of {} is", "God Save the King", None),
        ("The name of the anthem of {} is", "Spain", "Sweden"),
    ]
    with pytest.raises(RequestError, match="neither an 'original_fact'"):
        as_requests([{"edit": {"prompt": "Nothing at all"}}])


@pytest.mark.parametrize("listed", [True, False])
def test_knowedit_counts_every_alias_by_kind(listed):
    group = [{"prompt": "Its capital is", "ground_truth": [["Damascus", "Dimashq"]]}, {"prompt": "It lies in", "ground_truth": "Asia"}]
    if not listed:
        group = {"prompt": [own["prompt"] for own in group], "ground_truth": [["Damascus", "Dimashq"], "Asia"]}
    record = {"prompt": "{} is", "subject": "Oslo", "target_new": "Rome", "portability": {"Reasoning": group}}
    record["locality"] = {"Forgetfulness": [{"prompt": "Rome is", "ground_truth": [["old"]]}]}
    (request,) = as_requests([record])
    assert request.portability_prompts == (("Its capital is", "Damascus"), ("It lies in", "Asia"))
    assert request.portability_aliases == (("Dimashq",), ()) and request.locality_prompts == (("Rome is", "old"),)
    assert [(q.criterion, q.probes[0].answers) for q in request.questions] == [
        ("Reasoning", ("Damascus", "Dimashq")),
        ("Reasoning", ("Asia",)),
    ]


def test_knowedit_wants_all_of_several_answers():
    truth = [["Damascus", "Dimashq"], ["Aleppo"]]
    record = {
        "prompt": "{} is",
        "subject": "Oslo",
        "target_new": "Rome",
        "portability": {"R": [{"prompt": "It has", "ground_truth": truth}]},
    }
    (request,) = as_requests([record])
    assert request.questions[0].probes == (Probe("It has", ("Damascus", "Dimashq"), (("Aleppo",),)),)
    assert request.portability_prompts == (("It has", "Damascus"),) and request.portability_aliases == (("Dimashq",),)
    record["portability"]["R"][0]["ground_truth"] = ["Damascus", "Dimashq"]  # names of one
    assert as_requests([record])[0].questions[0].probes == (Probe("It has", ("Damascus", "Dimashq")),)


def test_unke_is_edited_at_its_questions_end():
    record = {"id": 3, "question": "Why?", "para_question": "For what reason?", "answer": "So. And so."}
    (request,) = as_requests([record | {"sub_question": ["A?"], "sub_answer": ["a"]}])
    assert (request.text, request.target_new, request.fact_token, request.place) == ("Why?", "So. And so.", "last", 4)
    assert request.rephrase_prompts == ("For what reason?",) and request.portability_prompts == (("A?", "a"),)


@pytest.mark.parametrize("record", [MQUAKE, RIPPLE])
def test_they_survive_json(record):
    for request in as_requests([record]):
        assert EditRequest.from_record(json.loads(json.dumps(request.to_record()))) == request
    assert "questions" not in EditRequest("{} is", "Oslo", "x").to_record()


def test_a_case_is_not_split():
    of = lambda n, case: EditRequest("{} is", f"s{n}", "x", case=case)  # noqa: E731
    requests = [of(0, None), of(1, "a"), of(2, "a"), of(3, "b"), of(4, "b"), of(5, "b"), of(6, None), of(7, "c")]
    names = lambda size: [[request.subject for request in batch] for batch in consecutive_batches(requests, size)]  # noqa: E731
    assert names(3) == [["s0", "s1", "s2"], ["s3", "s4", "s5"], ["s6", "s7"]]
    assert names(1) == [["s0"], ["s1", "s2"], ["s3", "s4", "s5"], ["s6"], ["s7"]]
    assert names(100) == [[f"s{n}" for n in range(8)]]
    again = [of(0, "a"), of(0, "a")]  # two values for one fact cannot be one batch
    assert [len(batch) for batch in consecutive_batches(again, 5)] == [1, 1]


def test_questions_of_a_fact_that_is_edited_again():
    of = lambda target, name: EditRequest("{} is", "Oslo", target, questions=[{"criterion": name, "probes": [["Who?", ["x"]]]}])  # noqa: E731
    assert [q.criterion for q in latest([of("Rome", "first"), of("Rome", "second")])[0].questions] == ["first", "second"]
    assert [q.criterion for q in latest([of("Rome", "first"), of("Paris", "second")])[0].questions] == ["second"]
    asked = latest([of("Rome", "same"), of("Rome", "same")])[0].questions  # of two records, each with its own vote
    assert len({own.case for own in asked}) == len(asked) == 2 and len({dataclasses.replace(own, case=None) for own in asked}) == 1


def test_every_case_has_one_vote():
    """Three cases, two of which end in the same fact: 1, 0 and 0 of them answered are a third, not the mean of a half and 0."""
    verdict = lambda case, right: {"criterion": "multi-hop", "counted": True, "written": right, "contained": right, "case": case}  # noqa: E731
    row = lambda n, *own: {"request_id": n, "prompt": n, "subject": n, "target_new": n, "answers": [], "questions": list(own)}  # noqa: E731
    rows = [row("x", verdict("a", True), verdict("b", False)), row("y", verdict("c", False))]
    found = summarise(rows).questions["multi-hop"]
    assert (found["questions"], found["counted"]) == (3, 3) and found["written"] == pytest.approx(1 / 3)
    # Two records without a case, one with two questions: the mean over records of (1/2, 0).
    rows = [row("x", verdict(None, True), verdict(None, False)), row("y", verdict(None, False))]
    assert summarise(rows).questions["multi-hop"]["written"] == 0.25
    # In two orders of the records, of which each case's mean counts: (1 + 0) / 2, 0 and (0 + 1) / 2, whoever asks; ± is over (1/3, 1/3).
    first = summarise([row("x", verdict("a", True), verdict("b", False)), row("y", verdict("c", False))])
    second = summarise([row("y", verdict("c", True)), row("x", verdict("b", False), verdict("a", False))])
    found = averaged([first, second]).questions["multi-hop"]
    assert found["written"] == pytest.approx(1 / 3) and found["written_spread"] == 0 and found["questions"] == 3
    second = summarise([row("y"), row("x", verdict("b", True), verdict("a", True))])  # one that never asks "c"
    found = averaged([first, second]).questions["multi-hop"]
    assert found["written"] == pytest.approx((1 + 0.5 + 0) / 3) and found["written_spread"] == pytest.approx((1 - 1 / 3) / 2**0.5)
    assert averaged([first, summarise([row("x"), row("y")])]).questions["multi-hop"]["written"] == pytest.approx(1 / 3)


def test_all_of_several_answers_are_wanted():
    probe = Probe("The siblings of Ada are", ("Byron", "B."), (("Allegra",), ("Medora", "Elizabeth")))
    answered = lambda text: [probe.answered(text, rule, is_contained) for rule in (is_written, is_contained)]  # noqa: E731
    assert answered("Allegra, Elizabeth and Byron") == [True, True]
    assert answered("They are Byron, Allegra, Medora") == [False, True]
    assert answered("Byron, Allegra") == [False, False]
    assert Question.of(json.loads(json.dumps(Question("c", (probe,)).to_record()))) == Question("c", (probe,))


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"criterion": "", "probes": [["Who?", ["x"]]]}, "criterion must be text"),
        ({"criterion": "c", "probes": []}, "must ask something"),
        ({"criterion": "c", "probes": [["Who?", []]]}, "one at least"),
        ({"criterion": "c", "probes": [["Who?", [" "]]]}, "one at least"),
        ({"criterion": "c", "probes": [["", ["x"]]]}, "pairs"),
        ({"criterion": "c", "probes": ["Who?"]}, "pairs"),
        ({"criterion": "c", "probes": [["Who?", ["x"]]], "every": "AND"}, "true or false"),
        ({"criterion": "c", "prompts": []}, "has criterion, probes"),
        ("Who?", "has criterion, probes"),
    ],
)
def test_one_clear_error(question, words):
    with pytest.raises(RequestError, match=words):
        EditRequest("{} is", "Oslo", "x", questions=[question])


def test_judged_one_at_a_time(pair, tokenizer):  # noqa: F811
    """Every prompt written by a loop of its own; any or every one, if the unedited model answers the conditions."""
    edited, base = pair("gpt2")
    prompts = ["The mother tongue of Danielle Darrieux is", "Angola is located in", "Paris is", "Who? Oslo"]
    said = {
        net: {p: written_by_hand(model, tokenizer, tokenizer.encode(p), 6) for p in prompts}
        for net, model in (("new", edited), ("old", base))
    }
    assert all(normalised(text) for own in said.values() for text in own.values())
    answers = lambda *which: [[p, [said[net][p] if net else "zz"]] for net, p in which]  # noqa: E731
    yes, also, no = ("new", prompts[0]), ("new", prompts[1]), (None, prompts[2])
    held, not_held = ("old", prompts[3]), (None, prompts[3])
    questions = [
        {"criterion": "any", "probes": answers(no, yes)},
        {"criterion": "every", "probes": answers(no, yes), "every": True},
        {"criterion": "every", "probes": answers(also, yes), "every": True},
        {"criterion": "if known", "probes": answers(yes), "conditions": answers(held)},
        {"criterion": "if known", "probes": answers(no), "conditions": answers(held, not_held)},
        {"criterion": "never", "probes": answers(yes), "conditions": answers(not_held)},
    ]
    records = [{**RECORDS[0], "questions": questions[:3]}, {**RECORDS[1], "questions": questions[3:]}, RECORDS[2]]
    metrics = evaluate(edited, tokenizer, records, base, generate=False, writing=Writing(6))
    found = {name: (own["written"], own["counted"], own["questions"]) for name, own in metrics.questions.items()}
    assert found == {"any": (1, 1, 1), "every": (0.5, 2, 2), "if known": (1, 1, 2), "never": (None, 0, 1)}
    verdicts = [verdict for row in metrics.per_record for verdict in row.get("questions", ())]
    for question, verdict in zip(questions, verdicts, strict=True):
        own = [said["new"][prompt] for prompt, _ in question["probes"]]
        assert [answer["written"] for answer in verdict["answers"]] == own
        judge = all if question.get("every") else any
        for way, right in (("written", is_written), ("contained", is_contained)):
            assert verdict[way] == judge(right(text, wanted) for text, (_, wanted) in zip(own, question["probes"], strict=True))
    assert "questions" not in evaluate(edited, tokenizer, records, base, generate=False)
    known = predict_base(base, tokenizer, records, generate=False, writing=Writing(6))
    assert evaluate(edited, tokenizer, records, known, generate=False, writing=Writing(6)) == metrics
    bare = [{k: v for k, v in record.items() if k != "questions"} for record in records]
    known = predict_base(base, tokenizer, bare, generate=False, writing=Writing(6))
    with pytest.raises(RequestError, match="without these records' questions"):
        evaluate(edited, tokenizer, records, known, generate=False, writing=Writing(6))


def test_from_a_file_of_cases_to_a_table(tmp_path):
    """Cases of the embedded model's own facts, through edit, eval and experiment; every record counted."""
    one, two, three = testbed.facts()[:3]
    rewrite = lambda fact: {"prompt": fact.prompt, "subject": fact.subject, "target_new": {"str": fact.target_new}}  # noqa: E731
    case = lambda n, *facts: {  # noqa: E731
        "case_id": n,
        "requested_rewrite": [rewrite(fact) for fact in facts],
        "questions": [facts[-1].text, "Who?"],
        "new_answer": facts[-1].target_new,
        "new_single_hops": [{"cloze": fact.text, "answer": fact.target_new} for fact in facts],
    }
    broken = {"case_id": 9, "requested_rewrite": [], "questions": []}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case(1, one, two), broken, case(2, three)]))
    read = read_requests(path)
    assert (read.read, read.places, [skip["index"] for skip in read.skipped]) == (3, [0, 0, 2], [1])
    edited = output("edit", "testbed", path, "--out", tmp_path / "edits")
    assert edited["records"]["used"] == 2 and edited["edits"] == 3 and len(edited["records"]["skipped"]) == 1
    found = output("eval", "testbed", path, "--edits", tmp_path / "edits")
    assert {name: (own["written"], own["questions"]) for name, own in found["questions"].items()} == {
        "edit-wise": (1, 3),
        "instance-wise": (1, 2),
        "multi-hop": (1, 2),
    }
    assert found["records"] == edited["records"]
    shown = run("eval", "testbed", path, "--edits", tmp_path / "edits").stdout
    assert "multi-hop" in shown and "2 of 2" in shown
    experiment = tmp_path / "cases.yaml"
    experiment.write_text("title: t\nprotocol: single_round\nbatch_size: 1\nmethods: [FT]\n")
    (row,) = output("experiment", experiment, "--records", f"cases={path}", "--out", tmp_path / "out")["rows"]
    assert row["edits"] == 3 and row["questions"]["multi-hop"]["questions"] == 2
    assert "| multi-hop, written |" in (tmp_path / "out/cases.md").read_text()


def test_the_example_of_the_docs(tmp_path):
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluating.md").read_text(encoding="utf-8")
    example, further = text.split("```json\n")[1].split("\n```")[0], text.split('`"questions": ')[1].split("`")[0]
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps(json.loads(example) | {"questions": json.loads(further)}) + "\n")
    (request,) = read_requests(path).requests
    assert request.aliases == ("the English language",) and len(request.locality_prompts) == len(request.portability_prompts) == 1
    assert request.rephrase_prompts == ("Which language did Danielle Darrieux grow up with?",)
    assert request.questions[0].probes == (Probe("Who leads her country?", ("Marie",)),)


@pytest.mark.parametrize(
    ("file", "records", "requests"),
    [
        ("mquake/akew_mquake_cf_200.json", 200, 245),
        ("mquake/mquake_hard_215.json", 215, 860),
        ("unke/unke_500.json", 500, 500),
        ("qaedit/qaedit_500.json", 500, 500),
        ("zsre/zsre_mend_eval_portability_gpt4.json", 1037, 1037),
        ("counterfact/counterfact_500.json", 500, 500),
    ],
)
def test_every_record_of_the_real_files_is_counted(file, records, requests):
    path = Path(os.environ.get("COMEBA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / file
    if not path.exists():
        pytest.skip("the real data sets are not here")
    read = read_requests(path)
    assert (read.read, len(read.requests), read.skipped) == (records, requests, [])
    asked = {question.criterion for request in read.requests for question in request.questions}
    assert asked == ({"edit-wise", "instance-wise", "multi-hop"} if "mquake" in file else set())
    if "portability" in file:
        assert all(request.portability_prompts for request in read.requests)
