"""What is measured beside the metrics: examples worked out by hand, and loops over single records."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from test_definitions import bigrams, words
from test_editor import small_model

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.evaluation import Result, Writing, bootstrap_interval, counterfact_scores, evaluate, perplexity, read_text
from comeba_ext.evaluation.comparing import differences, retention
from comeba_ext.experiments import measures
from comeba_ext.methods.ft import FTConfig

# -- what is written -------------------------------------------------------------------------------------------------


def test_hallucination():
    """Of locality prompts, how many answers hold the new object only since the edits: 2 of 5 and 0 of 1, so 1/5."""
    tokenizer = words("Peru is p1 p2 p3 p4 p5 p6 p7 Rome Roma Lima Oslo in Bergen")
    sure = lambda **after: {last: {word: 0.9} for last, word in after.items()}  # noqa: E731
    end = {word: {"<eos>": 0.9} for word in ("Rome", "Roma", "Lima", "Oslo")}
    before = sure(p1="Oslo", p2="Rome", p3="Oslo", p4="Lima", p5="Roma", p6="Lima") | end
    now = sure(p1="Rome", p2="Rome", p3="Bergen", p4="in", p5="Rome", p6="Rome", Bergen="Oslo") | {"in": {"Rome": 0.9}} | end
    local = lambda *prompts: [[f"Peru is {prompt}", "Oslo"] for prompt in prompts]  # noqa: E731
    records = [
        {
            "prompt": "{} is p1",
            "subject": "Peru",
            "target_new": "Rome",
            "aliases": ["Roma"],
            # p1: Oslo, now Rome, counts. p2: Rome before and now. p3: Oslo, now "Bergen Oslo". p4: Lima, now "in Rome", counts.
            # p5: Roma, an alias, stood there before it was Rome.
            "locality_prompts": local("p1", "p2", "p3", "p4", "p5"),
        },
        # p6: Lima, now Rome, which is another record's new object; its own stood there before and is gone.
        {"prompt": "{} is p4", "subject": "Peru", "target_new": "Lima", "locality_prompts": local("p6")},
        {"prompt": "{} is p2", "subject": "Peru", "target_new": "Bergen"},  # is asked nothing about others
    ]
    base, edited = bigrams(tokenizer, before), bigrams(tokenizer, now)
    metrics = evaluate(edited, tokenizer, records, base, generate=False, writing=Writing(4))
    texts = [(own["unedited_written"], own["written"]) for own in metrics.per_record[0]["answers"] if own["metric"] == "locality"]
    assert texts == [("Oslo", "Rome"), ("Rome", "Rome"), ("Oslo", "Bergen Oslo"), ("Lima", "in Rome"), ("Roma", "Rome")]
    assert [row["hallucination"] for row in metrics.per_record] == [2 / 5, 0, None]
    assert metrics.hallucination == pytest.approx((2 / 5 + 0) / 2)
    assert evaluate(base, tokenizer, records, base, generate=False, writing=Writing(4)).hallucination == 0


# -- plain text ------------------------------------------------------------------------------------------------------

CHAIN = {  # what comes next is most likely: b behind a, a behind b, c behind c
    "a": {"b": 1 / 2},
    "b": {"c": 1 / 4, "a": 1 / 2},
    "c": {"a": 1 / 8, "c": 1 / 2},
}


def test_perplexity():
    tokenizer = words("a b c Peru")
    model = bigrams(tokenizer, CHAIN, context=4)
    # "a b c a": 1/2 · 1/4 · 1/8 = 2^-6 over three tokens.
    assert perplexity(model, tokenizer, ["a b c a"]) == pytest.approx(4, rel=1e-12)
    # "c a": 2^-3 over one. Tokens count alike, not texts: 2^(9/4), where the mean of both texts' would be 2^(5/2).
    assert perplexity(model, tokenizer, ["a b c a", "c a"]) == pytest.approx(2 ** (9 / 4), rel=1e-12)
    # The context is four: "a b c a" and "b c", whose "b" follows nothing: 2^-6 · 2^-2 over four tokens. Then "c a": 2^-11 over five.
    assert perplexity(model, tokenizer, ["a b c a b c", "c a"]) == pytest.approx(2 ** (11 / 5), rel=1e-12)
    # Five tokens of it: "a b c a" and a lone "b".
    five = read_text(model, tokenizer, ["a b c a b c", "c a"], tokens=5)
    assert five.perplexity == pytest.approx(4, rel=1e-12)
    likely = {"a": "b", "b": "a", "c": "c"}
    assert sorted(five.next_tokens.tolist()) == sorted(tokenizer.convert_tokens_to_ids([likely[word] for word in "abcab"]))


@torch.no_grad()
def test_changed_predictions_on_plain_text():
    """An edit that takes every b for a word d, of which other words are likely; b itself is as it was while edits are off."""
    tokenizer = words("a b c d Peru is")
    model = bigrams(tokenizer, CHAIN | {"d": {"c": 3 / 4, "a": 1 / 8}})
    block, (b, d) = model.transformer.h[0], tokenizer.convert_tokens_to_ids(["b", "d"])
    block.ln_2 = torch.nn.Identity()  # so that the edited projection reads gelu(1) at the word's place, and 0 elsewhere
    block.mlp.c_fc.weight.zero_()
    block.mlp.c_fc.weight[:, : len(tokenizer)] = torch.eye(len(tokenizer))
    editor = Editor(model, tokenizer, EditConfig(layers=(0,), lam=1.0, scope="zscore"))
    (layer,) = editor.layers.values()
    read = block.mlp.act(torch.ones(()))
    layer.delta[b, b], layer.delta[d, b] = -1 / read, 1 / read
    layer.mode = "temporary"
    texts = ["a b c a", "b b Peru b", "c a"]  # the one in the middle names an edited subject
    found = measures.make(("text",), texts)(editor, [EditRequest("{} is", "Peru", "c")])
    assert (found["texts"], found["text_tokens"]) == (2, 6)
    # Of what comes behind a, b, c, a, c, a, one in six is another: c behind b, where it was a.
    assert found["text_changed"] == pytest.approx(1 / 6)
    # (1/2 · 1/4 · 1/8) · 1/8 = 1/512 over four tokens; with 3/4 for 1/4: 3/512.
    assert found["perplexity_before"] == pytest.approx(512**0.25, rel=1e-12)
    assert found["perplexity"] == pytest.approx((512 / 3) ** 0.25, rel=1e-5)  # edits are float32


# -- CounterFact's ---------------------------------------------------------------------------------------------------


def test_paraphrase_magnitude():
    """By how much the new object is likelier than the true one behind rephrase prompts; of several tokens the geometric mean counts."""
    tokenizer = words("Peru e r1 r2 r3 new true old one")
    after = {
        "r1": {"new": 0.5, "true": 0.25},  # + 0.25
        "r2": {"new": 0.1, "true": 0.4},  # - 0.3
        "r3": {"new": 0.3, "old": 0.5},  # "old one": sqrt(0.5 · 0.02) = 0.1, so + 0.2
        "old": {"one": 0.02},
    }
    fact = {"prompt": "{} e", "subject": "Peru", "target_new": "new"}
    records = [
        {**fact, "ground_truth": "true", "rephrase_prompts": ["Peru r1", "r2"]},  # (0.25 - 0.3) / 2 = - 0.025
        {**fact, "ground_truth": "old one", "rephrase_prompts": ["r3"]},  # + 0.2
        {**fact, "rephrase_prompts": ["r3"]},  # nobody knows its true object
    ]
    found = counterfact_scores(bigrams(tokenizer, after), tokenizer, records)
    assert [row["paraphrase_magnitude"] for row in found.per_record] == [pytest.approx(-0.025), pytest.approx(0.2), None]
    assert found.paraphrase_magnitude == pytest.approx(0.0875, abs=1e-12)
    assert found.paraphrase_score == (1 / 2 + 1) / 2


# -- intervals, differences, retention -------------------------------------------------------------------------------


def resampled(values) -> list[float]:
    """The means of all samples with replacement, which are equally likely."""
    return sorted(sum(own) / len(own) for own in itertools.product(values, repeat=len(values)))


def quantile(means: list[float], share: float) -> float:
    return means[min(len(means) - 1, max(0, math.ceil(share * len(means)) - 1))]


@pytest.mark.parametrize("values", [(0, 1, 3), (0.25, 0.25, 1), (1, 0, -0.5)])
def test_intervals_against_all_resamples(values):
    """Three values have 27 resamples. With n drawn, the share of means up to some number is off by more than e with a probability of
    at most 2·exp(-2·n·e²) (Dvoretzky-Kiefer-Wolfowitz): for n = 200,000 and e = 0.01 that is 1e-17. So where no 27th is nearer than
    0.01 to a share, that quantile is found exactly."""
    means = resampled(values)
    for level in (0.95, 0.8, 0.6):
        bounds = [(1 - level) / 2, (1 + level) / 2]
        for share in bounds:
            assert quantile(means, share - 0.01) == quantile(means, share + 0.01)
        exact = [quantile(means, share) for share in bounds]
        usual = {} if level == 0.95 else {"level": level}
        assert bootstrap_interval(values, resamples=200_000, **usual) == pytest.approx(exact, abs=1e-12)
    # The thousand draws that are usual are off by 0.09 at most (1e-6).
    low, high = bootstrap_interval(values)
    assert quantile(means, 0) <= low <= quantile(means, 0.025 + 0.09)
    assert quantile(means, 0.975 - 0.09) <= high <= quantile(means, 1)


def rows(values: dict[str, float | None], key: str = "locality") -> list[dict]:
    return [{"request_id": name, "prompt": "p", "subject": "s", "target_new": "t", key: value} for name, value in values.items()]


def test_differences_are_taken_record_by_record():
    """Whatever their order; what only one case was asked does not count."""
    one = {f"r{n}": n / 16 for n in range(12)} | {"only here": 1.0}
    gained = {f"r{n}": n / 16 + 1 / 4 for n in reversed(range(12))} | {"only there": 0.0, "only here": None}
    # Every record gains 1/4, so there is nothing to draw; of all that each was asked the means are 0.394 and 0.548.
    quarter = (0.25, [0.25, 0.25])
    assert differences({"gained": rows(gained), "one": rows(one)}, "locality") == {
        "gained": {"one": quarter},
        "one": {"gained": (-0.25, [-0.25, -0.25])},
    }
    # Of twelve records, six right before, three more become right: 1/4 on average. How many of these a resample holds is binomial, of
    # 12 draws at 1/4 each: at most 1 with 0.158, at most 4 with 0.842. A thousand resamples are off by 0.09 at most (see above), so
    # the bounds are 0 or 1, and 5 or more, of 12; and never a loss, as two samples apart would have.
    before = {f"r{n}": float(n < 6) for n in range(12)}
    after = {f"r{n}": float(n < 9) for n in range(12)}
    draws = [math.comb(12, n) * 0.25**n * 0.75 ** (12 - n) for n in range(13)]
    assert sum(draws[:2]) > 0.025 + 0.09 and sum(draws[:5]) < 0.975 - 0.09
    mean, (low, high) = differences({"after": rows(after), "before": rows(before)}, "locality")["after"]["before"]
    assert mean == 0.25 and 0 <= low <= 1 / 12 + 1e-12 and 5 / 12 - 1e-12 <= high < 1


@pytest.mark.parametrize("count", [1, 9, 10, 37, 100, 101, 123])
def test_retention_groups(count):
    """Of at least ten edits, as small as ten groups allow; by a loop over the edits."""
    draw = random.Random(count)
    values = [draw.choice([None, 0.0, 0.25, 1.0]) for _ in range(count)]
    size = next(size for size in itertools.count(10) if len(range(0, count, size)) <= 10)
    groups: dict[int, list] = {}
    for n, value in enumerate(values):
        groups.setdefault(n // size, []).append((n + 1, value))
    expected = []
    for own in groups.values():
        asked = [value for _, value in own if value is not None]
        if asked:
            expected.append((own[0][0], own[-1][0], pytest.approx(np.mean(asked)), bootstrap_interval(asked)))
    found = retention(rows(dict(enumerate(values))), "locality")
    assert [(own["first"], own["last"], own["value"], own["interval"]) for own in found] == expected


# -- efficiency ------------------------------------------------------------------------------------------------------


def test_seconds_per_edit_and_peak_memory():
    step = lambda edits, requests, peak, **seconds: {"edits": edits, "requests": requests, "seconds": seconds, "peak_memory": peak}  # noqa: E731
    result = Result(
        steps=[
            step(10, 10, 100, values=2.0, keys=1.0, update=0.5),  # 3.5 s
            step(15, 5, 300, values=4.0),
            step(25, 10, 200, values=1.0, check=1.5),  # 2.5 s
        ]
    )
    assert result.efficiency() == {"seconds_per_edit": 0.4, "peak_memory": 300}  # 10 s for 25, not the mean over steps
    assert result.efficiency(10) == {"seconds_per_edit": 0.35, "peak_memory": 100}
    assert result.efficiency(15) == result.efficiency(24) == {"seconds_per_edit": 0.5, "peak_memory": 300}
    assert result.efficiency(9) == Result().efficiency() == {"seconds_per_edit": None, "peak_memory": None}


# -- other conditions ------------------------------------------------------------------------------------------------

SHORT = {"prompt": "{} is", "subject": "Norway", "target_new": "the language of Peru", "rephrase_prompts": ["They say Norway is"]}
ASKED = [
    SHORT | {"locality_prompts": [("Marie Curie was born in", "Warsaw"), ("The capital of Peru is", "Lima, the capital")]},
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "the piano",
        "rephrase_prompts": ["Danielle Darrieux speaks", "At home, Danielle Darrieux speaks"],
        "locality_prompts": [("Who built it?", None), ("Angola is located in", "Africa"), ("John Lennon plays", "the guitar")],
    },
    {
        "prompt": "In the field of physics, {} is",
        "subject": "Angola",
        "target_new": "Paris",
        "rephrase_prompts": ["Angola lies in"],
        "locality_prompts": [("Toko Yasuda plays the", "piano in the city")],  # stands before the prompt, so nothing is left to ask
    },
    {
        "prompt": "As everyone in the city of Paris knows, the language that people speak in {} is",
        "subject": "Peru",
        "target_new": "French",
        "rephrase_prompts": ["Its people, those of Peru, speak"],
        "locality_prompts": [("The Eiffel Tower stands in", "the city of Paris"), ("It stands in the city of", "Oslo")],
    },
    {"prompt": "{} was born in the city of", "subject": "Marie Curie", "target_new": "Lima"},  # with nothing to stand before it
]


@pytest.fixture
def tuned(tiny_model, tokenizer):
    """An editor with :data:`ASKED` in a tiny model, half learnt by fine-tuning, their rephrase prompts too; and the requests."""
    editor = Editor(small_model(tiny_model), tokenizer, FTConfig(layers=(2,), steps=6, lr=0.03), method="FT")
    requests = [EditRequest.from_record(record) for record in ASKED]
    others = [(text + p, r) for r in requests for p in r.rephrase_prompts for text in ("", "Oslo is in Norway. ")]
    editor.edit([*requests, *(EditRequest(prompt, r.subject, r.target_new) for prompt, r in others)])
    return editor, requests


@torch.no_grad()
def said(editor, prompt: str, target: str | None) -> tuple[list[int], list[int]]:
    """What the model says where the target stands, or next, one text at a time; and the target's tokens."""
    start = len(editor.tokenizer.encode(prompt))
    ids = editor.tokenizer.encode(prompt if target is None else f"{prompt} {target}")
    likely = editor.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    return (likely[-1:], []) if target is None else (likely[start - 1 : -1], ids[start:])


def averages(editor, records: list[dict]) -> dict[str, float]:
    """Reliability, generality and locality, record by record."""
    found: dict[str, list[float]] = {name: [] for name in measures.NAMES}
    for record in records:
        asked = {"reliability": [record["prompt"]], "generality": record.get("rephrase_prompts", [])}
        for name, prompts in asked.items():
            if prompts:
                found[name].append(np.mean([np.equal(*said(editor, prompt, record["target_new"])).mean() for prompt in prompts]))
        shares = []
        for pair in record.get("locality_prompts", []):
            after, _ = said(editor, *pair)
            with editor.disabled():
                before, _ = said(editor, *pair)
            shares.append(np.equal(after, before).mean())
        found["locality"] += [np.mean(shares)] if shares else []
    return {name: pytest.approx(float(np.mean(own))) for name, own in found.items()}


def filled(record: dict) -> dict:
    return record | {"prompt": record["prompt"].format(record["subject"])}


def test_conditions(tuned):
    editor, requests = tuned
    found = measures.make(("conditions",), [])(editor, requests)
    whole = [filled(record) for record in ASKED]
    lengths = [len(editor.tokenizer.encode(record["prompt"])) for record in whole]
    ordered = [record for _, record in sorted(zip(lengths, whole, strict=True), key=lambda pair: pair[0])]
    assert len(set(lengths)) == len(ASKED)
    behind = []
    for record in whole[:4]:  # the last has no other text to stand behind
        (first, answer), *rest = record["locality_prompts"]
        text = f"{first} " if answer is None else f"{first} {answer}. "
        own = {"prompt": text + record["prompt"], "rephrase_prompts": [text + prompt for prompt in record["rephrase_prompts"]]}
        behind.append(record | own | {"locality_prompts": [(text + prompt, own_answer) for prompt, own_answer in rest]})
    expected = {"behind_text": averages(editor, behind), "short": averages(editor, ordered[:2]), "long": averages(editor, ordered[2:])}
    for kind, own in expected.items():
        assert {name: found[f"{name}_{kind}"] for name in measures.NAMES} == own, kind
        for name in measures.NAMES:
            low, high = found[f"{name}_{kind}_interval"]
            assert 0 <= low <= found[f"{name}_{kind}"] <= high <= 1
    values = [found[f"{name}_{kind}"] for kind in expected for name in measures.NAMES]
    assert len(set(values)) > 4 and any(0 < value < 1 for value in values)  # else there would be little to compare
    assert averages(editor, whole) != {name: found[f"{name}_behind_text"] for name in measures.NAMES}
    assert found["padding_agreement"] == 1


def test_padding_agreement(tuned):
    """A model that answers one prompt otherwise when it has company agrees with itself on all the others."""
    editor, requests = tuned
    prompts = [filled(record)["prompt"] for record in ASKED] + [p for r in ASKED for p in r.get("rephrase_prompts", [])]
    prompts += [prompt for record in ASKED for prompt, _ in record.get("locality_prompts", [])]
    assert len(prompts) == len(set(prompts)) == 18
    start = editor.tokenizer.encode("Toko Yasuda plays the")

    def disturbed(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        if len(ids) > 1:
            for row, logits in zip(ids.tolist(), output.logits, strict=True):
                if row[: len(start)] == start:
                    logits.copy_(logits.roll(1, -1))
        return output

    editor.model.register_forward_hook(disturbed, with_kwargs=True)
    assert measures.make(("conditions",), [])(editor, requests)["padding_agreement"] == pytest.approx(17 / 18)
