"""Written answers against a loop that writes one prompt at a time, and rules by examples worked out by hand."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import FAMILIES, NAMES, RECORDS, asked, pair  # noqa: F401  (a fixture)

from comeba_ext.errors import RequestError
from comeba_ext.evaluation import Writing, evaluate, predict_base
from comeba_ext.evaluation.written import answer_of, is_contained, is_same, is_written, likeness, natural_end, normalised

CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.mark.parametrize(
    "text, answer",
    [
        (" Paris. It is", "Paris."),
        ("\n\nParis\nIt is", "Paris"),
        (" J. K. Rowling. She", "J. K. Rowling."),
        (" St. Louis, Missouri. The", "St. Louis, Missouri."),
        (" Who? Me", "Who?"),
        (' He said "no." Then', 'He said "no."'),
        (" 3.14 is pi", "3.14 is pi"),
        (" 巴黎。那里", "巴黎。"),
        (" c. 3000 BC. Then", "c. 3000 BC."),
        (" CBS and Warner Bros. Entertainment", "CBS and Warner Bros. Entertainment"),
        (" No. 5 Squadron. It", "No. 5 Squadron."),
        (" The answer is no. It", "The answer is no."),
        (" 1. Paris is it. So", "1. Paris is it."),
        (" 1945. The war", "1945."),
        ("? Tom Hanks. He", "? Tom Hanks."),  # behind a question without its mark
        (".\n\nTom Hanks\nHe", ".\n\nTom Hanks"),
        (" , , .", ", , ."),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_natural_end(text, answer):
    assert answer_of(text) == answer


def test_a_full_stop_at_the_end_may_be_an_abbreviation():
    assert natural_end(" Paris.") is None and answer_of(" Paris.") == "Paris."
    assert natural_end(" Paris!") == len(" Paris!")


@pytest.mark.parametrize(
    "answer, before, same",
    [
        ("The answer is Paris.", "the answer is paris", True),
        ("Paris", "Rome", False),
        ("Paris", "", False),
        ("", "", True),
        (", , ,", ".", False),  # a destroyed model's, and the unedited one's
        (" ?", "?", True),
    ],
)
def test_is_same(answer, before, same):
    assert is_same(answer, before) is same and is_same(before, answer) is same


@pytest.mark.parametrize(
    "answer, targets, written, contained",
    [
        ("Paris.", ["paris"], True, True),
        ("the Eiffel Tower, in Paris", ["Eiffel Tower"], True, True),
        ("in Paris", ["Paris"], False, True),
        ("Parisian", ["Paris"], False, False),
        ("not Paris but Rome", ["Rome"], False, True),
        ("U.S.A. and others", ["United States", "USA"], True, True),
        ("“Rome”", ["rome"], True, True),
        ("Roma", ["Rome"], False, False),
        ("", ["Rome"], False, False),
        ("anything", ["the", "."], False, False),  # nothing is left of these to compare with
        ("A", [], False, False),
        # A letter that ends a name is no article, and numbers keep their sign and point.
        ("Hepatitis B", ["Hepatitis A"], False, False),
        ("Hepatitis A virus", ["Hepatitis A"], True, True),
        ("Once Upon A Time", ["Once Upon a Time"], True, True),
        ("The A-Team", ["A-Team"], True, True),
        ("3.5 million", ["35 million"], False, False),
        ("-5", ["5"], False, False),
        ("1000 men", ["1,000"], True, True),
        ("1984–1990", ["1984"], True, True),
        # What a dash, a slash or a comma joins stays two words.
        ("Paris—the capital", ["Paris"], True, True),
        ("Paris/London, Rome", ["Paris"], True, True),
        ("Jean Paul", ["Jean-Paul"], True, True),
        ("not Paris,France", ["Paris"], False, True),
        # The same letters, written otherwise.
        ("`Pa\u200bris`", ["Paris"], True, True),
        ("O´Brien", ["O'Brien"], True, True),
        ("STRASSE", ["Straße"], True, True),
        ("Sao Paulo", ["São Paulo"], True, True),
        ("巴黎是法国的首都", ["巴黎"], True, True),
        ("हिन्दी", ["हिन्द"], False, False),
        # Short aliases that are words: in their case only. The target itself: in any.
        ("It is a language", ["Italian", "it"], False, False),
        ("No, he is", ["Norwegian", "no"], False, False),
        ("US and UK", ["United States", "US"], True, True),
        ("rap music", ["Rap"], True, True),
        # Signs are compared as they are.
        (") and more", [")"], True, True),
    ],
)
def test_right_answers(answer, targets, written, contained):
    assert is_written(answer, targets) == written and is_contained(answer, targets) == contained


@given(st.text(max_size=40), st.text(max_size=10))
def test_written_implies_contained(answer, target):
    assert normalised(normalised(answer)) == normalised(answer)
    assert is_written(answer, [answer]) or not answer.strip()
    if is_written(answer, [target]):
        assert is_contained(answer, [target])


def test_what_cannot_be_written_is_counted_and_left_out(pair, tokenizer):  # noqa: F811
    """Of three records' targets one has a sentence's end in the middle and one is longer than what may be written."""
    edited, base = pair("gpt2")
    targets = ["Yahoo! Incorporated", "one two three four five six seven eight nine ten", RECORDS[2]["target_new"]]
    records = [{**record, "target_new": target} for record, target in zip(RECORDS, targets, strict=False)]
    metrics = evaluate(edited, tokenizer, records, base, generate=False, writing=Writing(8))
    fits = [Writing(8).fits(tokenizer, [target]) for target in targets]
    assert (
        fits == [False, False, True]
        and Writing(32, long=True).fits(tokenizer, targets[:1])
        and Writing(8).fits(tokenizer, ["x", targets[0]])
    )
    own = [row["reliability_written"] for row in metrics.per_record]
    assert own[:2] == [None, None] and own[2] in (0, 1) and metrics.reliability_written == own[2]
    assert metrics.reliability_unwritable == 2 and metrics.reliability_prompts == len(records)
    assert [row["answers"][0]["right"] for row in metrics.per_record] == [None, None, bool(own[2])]
    assert "reliability_unwritable" not in evaluate(edited, tokenizer, records, base, generate=False)


@torch.no_grad()
def written_by_hand(model, tokenizer, ids, tokens):
    """Token by token, the whole text fed anew each time, until the text has an end."""
    start = len(ids)
    for _ in range(tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
        if natural_end(tokenizer.decode(ids[start:])) is not None:
            break
    return answer_of(tokenizer.decode(ids[start:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_written_one_at_a_time(pair, tokenizer, family):  # noqa: F811
    edited, base = pair(family)
    records = [{**RECORDS[0], "aliases": ["English"], "portability_aliases": [["Rio", "Peru"]]}, *RECORDS[1:]]
    metrics = evaluate(edited, tokenizer, records, base, generate=False, writing=Writing(9), max_tokens=200)
    for record, row in zip(records, metrics.per_record, strict=True):
        answers = iter(row["answers"])
        for name in NAMES:
            scores = {"_written": [], "_contained": []}
            for n, (prompt, target) in enumerate(asked(record)[name]):
                ids = tokenizer.encode(prompt.rstrip())
                own, found = written_by_hand(edited, tokenizer, ids, 9), next(answers)
                assert found["written"] == own and found["metric"] == name
                if name == "locality":
                    before = written_by_hand(base, tokenizer, ids, 9)
                    assert found["unedited_written"] == before
                    scores["_written"].append(normalised(own) == normalised(before))
                    assert found["right"] == scores["_written"][-1]
                    continue
                if name == "reliability":
                    assert found["unedited_written"] == written_by_hand(base, tokenizer, ids, 9)
                aliases = record.get("portability_aliases", [[]] * 9)[n] if name == "portability" else record.get("aliases", [])
                scores["_written"].append(is_written(own, [target, *aliases]))
                scores["_contained"].append(is_contained(own, [target, *aliases]))
                assert found["right"] == scores["_written"][-1]
            for suffix, own in scores.items():
                assert row.get(name + suffix) == (sum(own) / len(own) if own else None)
    for key in (f"{name}_written" for name in NAMES):
        own = [row[key] for row in metrics.per_record if row[key] is not None]
        assert metrics[key] == pytest.approx(sum(own) / len(own)) and len(metrics[f"{key}_interval"]) == 2
    assert "locality_contained" not in metrics or metrics.locality_contained is None
    base_once = predict_base(base, tokenizer, records, generate=False, writing=Writing(9), max_tokens=200)
    again = evaluate(edited, tokenizer, records, base_once, generate=False, writing=Writing(9), max_tokens=200)
    assert again == metrics
    assert not any(key.endswith(("_written", "_contained")) for key in evaluate(edited, tokenizer, records, base, generate=False))


def test_base_predictions_that_were_written_otherwise(pair, tokenizer):  # noqa: F811
    edited, base = pair("gpt2")
    for made in (None, Writing(5)):
        stored = predict_base(base, tokenizer, RECORDS, writing=made)
        with pytest.raises(RequestError, match="writing"):
            evaluate(edited, tokenizer, RECORDS, stored, writing=Writing(6))


def lcs(one, other):
    """Length of the longest common subsequence, by brute force over the subsets of the shorter one's places."""
    short, long = sorted((one, other), key=len)
    for size in range(len(short), 0, -1):
        for places in itertools.combinations(range(len(short)), size):
            words = iter(long)
            if all(short[place] in words for place in places):
                return size
    return 0


WORDS = st.lists(st.sampled_from(["paris", "rome", "city", "京"]), max_size=6)
alike = functools.cache(likeness)  # made where it is asked for, as it takes two seconds


@settings(deadline=None)
@given(WORDS, WORDS)
def test_likeness_is_rouge_l(one, other):
    shared = lcs(one, other)
    precision, recall = (shared / max(1, len(own)) for own in (one, other))
    expected = 2 * precision * recall / (precision + recall) if shared else 0.0
    assert alike()(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_paragraphs(pair, tokenizer):  # noqa: F811
    """Written on past what ends a sentence, and as like the answer as ROUGE-L says; exact in an example worked out by hand."""
    assert alike()("The cat sat. On a mat!", "the cat is on the mat") == pytest.approx(2 * (3 / 4) * (3 / 4) / (3 / 4 + 3 / 4))
    edited, base = pair("gpt2")
    metrics = evaluate(edited, tokenizer, RECORDS, base, generate=False, writing=Writing(9, long=True))
    for record, row in zip(RECORDS, metrics.per_record, strict=True):
        answers, like = iter(row["answers"]), alike()
        for name in NAMES:
            scores = []
            for prompt, target in asked(record)[name]:
                ids, found = tokenizer.encode(prompt.rstrip()), next(answers)
                for _ in range(9):
                    with torch.no_grad():
                        ids.append(int(edited(torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] == tokenizer.eos_token_id:
                        break
                whole = tokenizer.decode(ids[len(tokenizer.encode(prompt.rstrip())) :], skip_special_tokens=True).strip()
                assert found["written"] == whole
                scores.append(like(whole, found["unedited_written"] if name == "locality" else target))
            assert row[f"{name}_similarity"] == (pytest.approx(sum(scores) / len(scores)) if scores else None)
    assert metrics["reliability_similarity"] is not None and len(metrics["reliability_similarity_interval"]) == 2


def test_hallucination_is_the_new_object_where_it_was_not(pair, tokenizer):  # noqa: F811
    edited, base = pair("gpt2")
    plain = evaluate(edited, tokenizer, RECORDS, base, generate=False, writing=Writing(9))
    (record, row) = next((record, row) for record, row in zip(RECORDS, plain.per_record) if row["locality_written"] == 0)
    texts = [[normalised(a[key]).split() for key in ("written", "unedited_written")] for a in row["answers"] if a["metric"] == "locality"]
    after, before = texts[0]
    new = min(set(after) - set(before))
    for word in (new, before[0], "nowhere"):
        found = evaluate(edited, tokenizer, [{**record, "target_new": word}], base, generate=False, writing=Writing(9))
        appeared = [word in after and word not in before for after, before in texts]
        assert found["hallucination"] == sum(appeared) / len(texts) and any(appeared) == (word == new)
    # An alias counts, and one that was there before does not.
    named = {**record, "target_new": "nowhere", "aliases": [new]}
    assert evaluate(edited, tokenizer, [named], base, generate=False, writing=Writing(9))["hallucination"] > 0
    assert "hallucination" not in evaluate(edited, tokenizer, RECORDS, base, generate=False)


def test_in_the_chat_template(pair, tokenizer):  # noqa: F811
    model, _ = pair("gpt2")
    with pytest.raises(RequestError, match="chat template"):
        evaluate(model, tokenizer, RECORDS, model, writing=Writing(4, chat=True))
    tokenizer.chat_template = CHAT
    try:
        metrics = evaluate(model, tokenizer, RECORDS[1:2], model, generate=False, writing=Writing(4, chat=True))
        ids = tokenizer.encode("<user> Angola is located in\n<assistant> ", add_special_tokens=False)
        assert metrics.per_record[0]["answers"][0]["written"] == written_by_hand(model, tokenizer, ids, 4)
    finally:
        tokenizer.chat_template = None


def test_no_answer_runs_past_the_context(tiny_model, tokenizer):
    model = tiny_model("gpt2", n_positions=32)
    prompt = tuple(tokenizer.encode("The mother tongue of Danielle Darrieux is " * 9)[:30])
    short = tuple(tokenizer.encode("Angola is"))
    with torch.no_grad():
        found = Writing(20).answers(model, tokenizer, [prompt, short], max_tokens=500)
    assert found[prompt] == written_by_hand(model, tokenizer, list(prompt), 2)
    assert found[short] == written_by_hand(model, tokenizer, list(short), 20)
