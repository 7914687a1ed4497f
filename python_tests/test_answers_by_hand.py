"""Answers as they are written, of models whose next word is known: who counts, for what, and where an answer ends."""

import pytest
from test_definitions import bigrams, words

from comeba_ext import EditRequest
from comeba_ext.evaluation import Judge, Writing, evaluate
from comeba_ext.evaluation.written import is_contained, is_written
from comeba_ext.text.request import as_requests, latest


def sure(**after):
    """What a model says behind some words, nearly always."""
    return {last: {word: 0.9} for last, word in after.items()}


def ending(*words):
    """Words that end an answer."""
    return {word: {"<eos>": 0.9} for word in words}


def test_aliases_count_in_generality_and_portability():
    tokenizer = words("Peru is r1 r2 p1 p2 l1 Rome Roma Lima Lyma Oslo OSLO")
    end = ending("Rome", "Roma", "Lima", "Lyma", "Oslo", "OSLO")
    base = bigrams(tokenizer, {**sure(l1="Oslo"), "is": {"Oslo": 0.9}, **end})
    edited = bigrams(tokenizer, {**sure(r1="Roma", r2="Oslo", p1="Lyma", p2="Lyma", l1="OSLO"), "is": {"Roma": 0.9}, **end})
    record = {
        "prompt": "{} is",
        "subject": "Peru",
        "target_new": "Rome",
        "aliases": ["Roma"],
        "rephrase_prompts": ["Peru r1", "Peru r2"],
        "locality_prompts": [["l1", "Oslo"]],
        "portability_prompts": [["Peru p1", "Lima"], ["Peru p2", "Lima"]],
        "portability_aliases": [["Lyma"], []],
    }
    found = evaluate(edited, tokenizer, [record], base, generate=False, writing=Writing(4))
    assert (found.reliability_written, found.generality_written, found.portability_written) == (1, 0.5, 0.5)
    assert found.locality_written == 1  # "OSLO" is "Oslo"
    long = evaluate(edited, tokenizer, [record], base, generate=False, writing=Writing(4, long=True))
    assert (long.reliability_similarity, long.generality_similarity) == (1, 0.5)  # the likest of the names


def test_conditions_and_what_cannot_be_written_in_questions():
    tokenizer = words("Peru is q1 q2 c1 in Rome Lima Oslo one two three four five")
    said = {**sure(q1="Rome", q2="Oslo", c1="in"), "in": {"Lima": 0.9}, "is": {"Rome": 0.9}, **ending("Rome", "Lima", "Oslo")}
    model = bigrams(tokenizer, said)
    long, rome = ["one two three four five"], ["Rome"]
    asked = [
        ("known", [["q1", rome]], False, [["c1", ["Lima"]]]),  # "in Lima" holds it: counted
        ("any", [["q2", long], ["q1", rome]], False, []),  # one can be written: counted
        ("every", [["q2", long], ["q1", rome]], True, []),  # one cannot be: not counted
        ("none", [["q2", long]], False, []),
    ]
    questions = [{"criterion": name, "probes": probes, "every": every, "conditions": known} for name, probes, every, known in asked]
    record = {"prompt": "{} is", "subject": "Peru", "target_new": "Rome", "questions": questions}
    found = evaluate(model, tokenizer, [record], model, generate=False, writing=Writing(4)).questions
    wanted = {"known": (1, 1), "any": (1, 1), "every": (0, None), "none": (0, None)}
    assert {name: (own["counted"], own["written"]) for name, own in found.items()} == wanted


def test_an_object_that_cannot_be_written_is_no_hallucination_of_none():
    """It is left out, as it is as written: an answer of four words cannot hold five."""
    tokenizer = words("Peru is l1 one two three four five Oslo")
    model = bigrams(tokenizer, {**sure(l1="Oslo"), **ending("Oslo")})
    record = {"prompt": "{} is", "subject": "Peru", "target_new": "one two three four five", "locality_prompts": [["l1", "Oslo"]]}
    for length, wanted in ((4, None), (6, 0)):
        found = evaluate(model, tokenizer, [record], model, generate=False, writing=Writing(length))
        assert found.hallucination == wanted and found.locality_written == 1


class Verdicts:
    """A judge that says what it is told to."""

    asked = nothing = 0

    def __init__(self, said):
        self.said, self.seen = said, []

    def known(self, answers):
        return {}

    def verdicts(self, answers, bar=None):
        self.seen += answers
        return {answer: self.said[answer.prompt] for answer in answers}


def test_answers_without_a_verdict_are_left_out_and_all_names_are_shown():
    tokenizer = words("Peru is r1 r2 r3 Rome Roma Oslo")
    model = bigrams(tokenizer, {**sure(r1="Oslo", r2="Oslo", r3="Oslo"), "is": {"Oslo": 0.9}, **ending("Rome", "Roma", "Oslo")})
    record = {"prompt": "{} is", "subject": "Peru", "target_new": "Rome", "aliases": ["Roma"], "rephrase_prompts": ["r1", "r2", "r3"]}
    judge = Verdicts({"Peru is": None, "r1": True, "r2": False, "r3": None})
    found = evaluate(model, tokenizer, [record], model, generate=False, writing=Writing(4), judge=judge)
    assert (found.reliability_judged, found.generality_judged) == (None, 0.5)
    assert {answer.right for answer in judge.seen} == {("Rome", "Roma")} and found["judge"]["answers"] == 4


def test_a_judge_that_is_away_says_nothing():
    """Not of the answers either that are right word for word and need no asking: they would be all that is scored."""
    tokenizer = words("Peru Chile is Rome Oslo")
    model = bigrams(tokenizer, {"is": {"Rome": 0.9}, **ending("Rome")})
    records = [{"prompt": "{} is", "subject": who, "target_new": new} for who, new in (("Peru", "Rome"), ("Chile", "Oslo"))]
    found = evaluate(model, tokenizer, records, model, generate=False, writing=Writing(4), judge=Judge("http://127.0.0.1:9/v1", "m"))
    assert "cannot be reached" in found["judge_error"] and found.reliability_written == 0.5
    assert not any("_judged" in key for own in (found, *found.per_record) for key in own)
    assert [own["answers"][0]["judged"] for own in found.per_record] == [True, None]


def test_end_tokens_of_the_generation_config():
    tokenizer = words("Peru is Rome Stop Oslo")
    model = bigrams(tokenizer, {"is": {"Rome": 0.9}, "Rome": {"Stop": 0.9}, "Stop": {"Oslo": 0.9}, **ending("Oslo")})
    ids = Writing(4).ids(tokenizer, "Peru is")
    write = lambda: Writing(4).answers(model, tokenizer, [ids], max_tokens=99)[ids]  # noqa: E731
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert write() == "Rome Stop Oslo"
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Stop")]
    assert write() == "Rome"


def test_what_is_written_ends_with_its_sentence():
    """The full stop ends nothing until a word stands behind it, which is then no part of the answer."""
    tokenizer = words("Peru is Rome. It Oslo")
    model = bigrams(tokenizer, {"is": {"Rome.": 0.9}, "Rome.": {"It": 0.9}, "It": {"Oslo": 0.9}, **ending("Oslo")})
    write = lambda how: next(iter(how.answers(model, tokenizer, [how.ids(tokenizer, "Peru is")], max_tokens=99).values()))  # noqa: E731
    assert write(Writing(4)) == "Rome." and write(Writing(4, long=True)) == "Rome. It Oslo"


@pytest.mark.parametrize(
    "answer, names, written, contained",
    [
        ("His own son", ["Sonoma", "HIS"], False, False),  # three letters
        ("hisp", ["Hispania", "HISP"], True, True),  # four
        ("u2 played", ["The band", "U2"], True, True),  # digits are no word of another meaning
        ("It belongs to us all", ["United States", "U.S."], False, False),  # two letters, with points
        ("It is a language", ["Informatics", "I.T."], False, False),
        ("the US", ["United States", "U.S."], True, True),
        ("in the U.S.", ["United States", "US"], False, True),
    ],
)
def test_short_aliases(answer, names, written, contained):
    assert (is_written(answer, names), is_contained(answer, names)) == (written, contained)


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_ripple_edits_without_a_condition_and_a_subject_that_only_a_condition_names():
    anthem = "The name of the anthem of University of Oxford is"
    edit = {"prompt": f"{anthem} Spain.", "original_fact": {"prompt": f"{anthem} Sweden."}}
    one = lambda prompt: {"prompt": prompt, "answers": [{"value": "x"}]}  # noqa: E731
    tests = [
        {"test_queries": [one("Who sings it?"), one("What is it?")], "condition_queries": [one("The head of University of Oxford is")]}
    ]
    (request,) = as_requests([{"edit": edit, "Forgetfulness": tests}])
    assert request.subject == "University of Oxford"
    assert request.questions[0].every is False  # "OR" where nothing is said


def test_a_prompt_without_an_answer_of_its_own_has_none():
    record = {"src": "What does Ann speak?", "subject": "Ann", "alt": "Latin", "loc": ["Bob speaks", "Eve speaks"], "loc_ans": ["Greek"]}
    (request,) = as_requests([record])
    assert request.locality_prompts == (("Bob speaks", "Greek"), ("Eve speaks", None))


def test_questions_have_the_same_case_in_every_order():
    asked = [EditRequest("{} is", f"s{n}", "x", questions=[{"criterion": "c", "probes": [["Who?", ["x"]]]}]) for n in range(3)]
    cases = lambda order: {request.subject: request.questions[0].case for request in latest(order)}  # noqa: E731
    assert cases(asked) == cases(asked[::-1]) and len(set(cases(asked).values())) == 3
