import copy
import json
import logging
import math
import random
import types

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, GPT2TokenizerFast, PreTrainedTokenizerFast

from comeba_ext.data import read_requests
from comeba_ext.errors import RequestError
from comeba_ext.evaluation import BasePredictions, Metrics, bootstrap_interval, evaluate, predict_base
from comeba_ext.evaluation.queries import record_queries
from comeba_ext.evaluation.scoring import Query, grouped_batches, predict
from comeba_ext.layers.hooked_linear import HookedLinear, install

FAMILIES = ("gpt2", "gptj", "llama")
NAMES = ("reliability", "generality", "locality", "portability")

RECORDS = [
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": "the language of Peru",
        "rephrase_prompts": ["Danielle Darrieux speaks", "At home, Danielle Darrieux speaks "],
        "locality_prompts": [("The capital of Norway is", "Oslo"), ("Who built it?", None)],
        "portability_prompts": [("Danielle Darrieux comes from", "Lima"), ("no answer to this", None)],
        "request_id": "french",
    },
    {
        "prompt": "{} is located in",
        "subject": "Angola",
        "target_new": "Paris",
        "rephrase_prompts": ["If you look for it on a map of the world, you will see that Angola lies in"],
        "locality_prompts": [("Marie Curie worked in the field of", "physics and the piano"), "Toko Yasuda plays the"],
    },
    {"prompt": "{} was born in", "subject": "Marie Curie", "target_new": "Oslo, the capital"},
    {
        "prompt": "John Lennon performs on the",
        "subject": "John Lennon",
        "target_new": "Eiffel Tower",
        "locality_prompts": [("The Eiffel Tower stands in", "the city of Paris")],
        "portability_prompts": [("John Lennon worked in the field of", "physics")],
    },
]


def asked(record: dict) -> dict[str, list[tuple[str, str | None]]]:
    """Prompts and answers by metric, straight from the record."""
    prompt = record["prompt"].replace("{}", record["subject"])
    locality = [(p, None) if isinstance(p, str) else p for p in record.get("locality_prompts", [])]
    return {
        "reliability": [(prompt, record["target_new"])],
        "generality": [(p.rstrip(), record["target_new"]) for p in record.get("rephrase_prompts", [])],
        "locality": locality,
        "portability": [pair for pair in record.get("portability_prompts", []) if pair[1]],
    }


@torch.no_grad()
def easyedit_tokens(model, tokenizer, prompt, target):
    """EasyEdit's test_prediction_acc for one prompt: (argmax at the target positions, target tokens)."""
    if target is None:
        return [int(model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1].argmax())], None
    tokens = tokenizer.encode(prompt + " " + target)
    start = len(tokenizer.encode(prompt))
    answers = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    return answers[start - 1 : -1], tokens[start:]


@torch.no_grad()
def write_greedily(model, tokenizer, prompt, count):
    """Token by token, the whole text fed anew each time."""
    tokens = tokenizer.encode(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def literal_scores(model, base, tokenizer, records) -> list[dict]:
    """Every score of every record: one prompt at a time, no batch, no padding, no cache."""
    rows = []
    for record in records:
        row = {}
        for name, pairs in asked(record).items():
            scores = []
            for prompt, target in pairs:
                answers, labels = easyedit_tokens(model, tokenizer, prompt, target)
                written = write_greedily(model, tokenizer, prompt, len(answers))
                wanted = labels
                if name == "locality":
                    labels, _ = easyedit_tokens(base, tokenizer, prompt, target)
                    wanted = write_greedily(base, tokenizer, prompt, len(answers))
                equal = np.equal(answers, labels)
                scores.append((equal.mean(), float(equal.all()), float(written == wanted)))
            for n, suffix in enumerate(("", "_exact", "_generation")):
                row[name + suffix] = float(np.mean([s[n] for s in scores])) if scores else None
        rows.append(row)
    return rows


@pytest.fixture
def pair(tiny_model, tokenizer):
    """Factory: (edited, base) of a family; the base has half learnt the records, so that scores differ widely."""

    def make(family: str):
        base = tiny_model(family, initializer_range=0.1)
        learnt = [[pair for pairs in asked(r).values() for pair in pairs if pair[1]] for r in RECORDS]
        rows = [tokenizer.encode(f"{p} {t}") for pairs in learnt for p, t in pairs]
        optimiser = torch.optim.Adam(base.parameters(), lr=0.01)
        for _ in range(12):
            loss = 0
            for row in rows:
                ids = torch.tensor([row])
                loss = loss + base(ids, labels=ids).loss / len(rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        edited = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in edited.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        return edited, base

    return make


# ---------------------------------------------------------------- against the literal implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_literal_unbatched_implementation(pair, tokenizer, family):
    edited, base = pair(family)
    expected = literal_scores(edited, base, tokenizer, RECORDS)
    # The comparison is worth something only if the scores are neither all 0 nor all 1.
    for name in ("reliability", "generality", "locality"):
        values = [row[name] for row in expected if row[name] is not None]
        assert 0 < np.mean(values) < 1, (name, values)
    for max_tokens in (1, 40, 4096):
        metrics = evaluate(edited, tokenizer, RECORDS, base, max_tokens=max_tokens)
        for row, oracle in zip(metrics.per_record, expected, strict=True):
            assert {key: row[key] for key in oracle} == pytest.approx(oracle)
        for key in expected[0]:
            assert metrics[key] == pytest.approx(np.mean([row[key] for row in expected if row[key] is not None]))


def test_counts_and_texts(pair, tokenizer):
    edited, base = pair("gpt2")
    metrics = evaluate(edited, tokenizer, RECORDS, base)
    assert [metrics[f"{name}_prompts"] for name in NAMES] == [4, 3, 5, 2]
    assert metrics.records == 4
    row = metrics.per_record[0]
    assert {key: row[key] for key in ("request_id", "prompt", "subject", "target_new")} == {
        key: RECORDS[0][key] for key in ("request_id", "prompt", "subject", "target_new")
    }
    prompt, target = asked(RECORDS[0])["reliability"][0]
    answers, _ = easyedit_tokens(edited, tokenizer, prompt, target)
    assert row["predicted"] == tokenizer.decode(answers).strip()
    assert row["generated"] == tokenizer.decode(write_greedily(edited, tokenizer, prompt, len(answers))).strip()


def test_order_of_records_does_not_matter(pair, tokenizer):
    edited, base = pair("llama")
    forward = evaluate(edited, tokenizer, RECORDS, base)
    backward = evaluate(edited, tokenizer, RECORDS[::-1], base)
    assert backward.per_record == forward.per_record[::-1]


# ---------------------------------------------------------------- computed by hand


class NextWord(torch.nn.Module):
    """After token n comes token ``after.get(n, n + 1)``, whatever stood before; padding is never continued."""

    def __init__(self, vocabulary: int, after: dict[int, int] | None = None):
        super().__init__()
        self.config = types.SimpleNamespace()
        self.vocabulary, self.after = vocabulary, after or {}

    def forward(self, input_ids, attention_mask, use_cache=None):
        following = [[self.after.get(i, i + 1) for i in row] for row in input_ids.tolist()]
        logits = torch.nn.functional.one_hot(torch.tensor(following), self.vocabulary).float()
        return types.SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, num_beams, pad_token_id):
        assert (do_sample, num_beams) == (False, 1)
        assert attention_mask[:, -1].all()  # padding is on the left
        for _ in range(max_new_tokens):
            following = [[self.after.get(i, i + 1)] for i in input_ids[:, -1].tolist()]
            input_ids = torch.cat([input_ids, torch.tensor(following)], 1)
        return input_ids


@pytest.fixture(scope="module")
def letters():
    """One token a word: <pad>=0, a=1, b=2, … p=16."""
    vocabulary = {"<pad>": 0, **{chr(ord("a") + n): n + 1 for n in range(16)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def test_hand_computed_scores(letters):
    records = [
        {  # forced: after b comes c, after c comes d, after d comes e (not x=p): 2 of 3
            "prompt": "{} b",
            "subject": "a",
            "target_new": "c d p",
            "rephrase_prompts": ["b", "k"],  # b: 2 of 3; k: l (not c), d, e (not p): 1 of 3
            "locality_prompts": [("a", "b c"), ("e", "f g h i"), "e", "h"],
            "portability_prompts": [("c", "d"), ("c", "e f"), ("a", None)],
        },
        {"prompt": "{}", "subject": "b", "target_new": "c d"},  # 2 of 2
        # Forced after the true first token, the second one is right; generation stays wrong.
        {"prompt": "{}", "subject": "b", "target_new": "j k"},  # c (not j), k: 1 of 2
    ]
    model, base = NextWord(18), NextWord(18, {7: 3, 5: 9})  # the base says c after g and i after e
    metrics = evaluate(model, letters, records, base)
    assert metrics.reliability == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert metrics.reliability_exact == pytest.approx(1 / 3)
    assert metrics.reliability_generation == pytest.approx(1 / 3)
    assert metrics.generality == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics.generality_exact == metrics.generality_generation == 0
    # "a" agrees. "e f g h i": the models differ after e and after g, 2 of 4 agree. Next word of "e": differs; of "h":
    # agrees.
    assert metrics.locality == pytest.approx((1 + 2 / 4 + 0 + 1) / 4)
    assert metrics.locality_exact == pytest.approx(2 / 4)
    assert metrics.locality_generation == pytest.approx(2 / 4)
    assert metrics.portability == pytest.approx((1 + 1 / 2) / 2)  # c→d; c→d (not e), e→f
    assert metrics.portability_exact == metrics.portability_generation == 0.5
    assert [row["predicted"] for row in metrics.per_record] == ["c d e", "c d", "c k"]
    assert [row["generated"] for row in metrics.per_record] == ["c d e", "c d", "c d"]
    assert [row["generality"] for row in metrics.per_record] == [pytest.approx(0.5), None, None]


def test_locality_is_measured_against_the_base_model_not_the_answer(letters):
    record = {"prompt": "{}", "subject": "a", "target_new": "b", "locality_prompts": [("c", "p p")]}
    assert evaluate(NextWord(18), letters, [record], NextWord(18)).locality == 1
    assert evaluate(NextWord(18), letters, [record], NextWord(18, {3: 8})).locality == 0.5


# ---------------------------------------------------------------- the unedited model


def test_precomputed_base_predictions_give_the_same(pair, tokenizer):
    edited, base = pair("gptj")
    expected = evaluate(edited, tokenizer, RECORDS, base)
    stored = predict_base(base, tokenizer, RECORDS)
    assert isinstance(stored, BasePredictions)
    assert evaluate(edited, tokenizer, RECORDS, stored) == expected
    subset = evaluate(edited, tokenizer, RECORDS[:2], stored)  # one computation serves every part of the records
    assert subset.per_record == expected.per_record[:2]


def test_base_predictions_of_other_records_are_refused(pair, tokenizer):
    edited, base = pair("gpt2")
    stored = predict_base(base, tokenizer, RECORDS[:1])
    with pytest.raises(RequestError, match="record 1: .* other records"):
        evaluate(edited, tokenizer, RECORDS[:2], stored)
    forced_only = predict_base(base, tokenizer, RECORDS, generate=False)
    with pytest.raises(RequestError, match="generate=False"):
        evaluate(edited, tokenizer, RECORDS, forced_only)
    metrics = evaluate(edited, tokenizer, RECORDS, forced_only, generate=False)
    assert metrics.locality == evaluate(edited, tokenizer, RECORDS, base).locality


def test_model_without_hooks_is_its_own_base(pair, tokenizer):
    metrics = evaluate(pair("gpt2")[0], tokenizer, RECORDS)
    assert metrics.locality == metrics.locality_exact == metrics.locality_generation == 1
    assert metrics.locality_interval == [1, 1]


def test_hooked_layers_are_switched_off_for_the_base(pair, tokenizer):
    _, base = pair("gpt2")
    edited = copy.deepcopy(base)
    names = ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    layers = install(edited, names, "transformer", "zscore", None)
    for layer in layers.values():
        layer.delta.copy_(0.3 * torch.randn(layer.delta.shape, generator=torch.Generator().manual_seed(2)))
        layer.mode = "temporary"
    expected = evaluate(edited, tokenizer, RECORDS, base)
    assert 0 < expected.locality < 1
    assert evaluate(edited, tokenizer, RECORDS) == expected
    assert evaluate(edited, tokenizer, RECORDS, predict_base(edited, tokenizer, RECORDS)) == expected
    assert all(layer.mode == "temporary" for layer in edited.modules() if isinstance(layer, HookedLinear))


def test_gated_edits_are_scored_as_one_sequence_at_a_time(pair, tokenizer):
    """With the paper's scope the choice of a token depends on its whole sequence, the last target token included."""
    _, base = pair("gpt2")
    edited = copy.deepcopy(base)
    layers = install(edited, ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"], "transformer", "zscore", 0.5)
    for layer in layers.values():
        layer.delta.copy_(torch.randn(layer.delta.shape, generator=torch.Generator().manual_seed(2)))
    expected = literal_scores(edited, base, tokenizer, RECORDS)
    assert expected != literal_scores(base, base, tokenizer, RECORDS)
    metrics = evaluate(edited, tokenizer, RECORDS, generate=False)
    for row, oracle in zip(metrics.per_record, expected, strict=True):
        teacher_forced = {key: value for key, value in oracle.items() if not key.endswith("_generation")}
        assert {key: row[key] for key in teacher_forced} == pytest.approx(teacher_forced)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_plain_greedy_whatever_the_model_is_set_to(pair, tokenizer, family, recwarn):
    """Sampling settings, penalties and end-of-text ids of the model must not touch what is compared."""
    edited, base = pair(family)
    expected = evaluate(edited, tokenizer, RECORDS, base)
    prompt, _ = asked(RECORDS[0])["reliability"][0]
    first = write_greedily(edited, tokenizer, prompt, 1)[0]
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "repetition_penalty": 9.0, "num_beams": 3}
    chatty = GenerationConfig(**settings, eos_token_id=[first], suppress_tokens=[first], max_length=7)
    edited.generation_config = chatty
    before = chatty.to_dict()

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        metrics = evaluate(edited, tokenizer, RECORDS, base)
    finally:
        logger.removeHandler(handler)
    assert metrics == expected
    assert edited.generation_config is chatty and chatty.to_dict() == before
    assert messages == [] and [str(w.message) for w in recwarn] == []


def test_generation_that_ends_the_text_is_no_match_for_its_second_choice(tiny_model, tokenizer):
    """A model that would end the text is scored by that, not by what it would say if it were not allowed to."""
    model = tiny_model("gpt2")
    prompt = "The capital of Norway is"
    logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    model.generation_config = GenerationConfig(eos_token_id=best)
    answer = Query(tuple(tokenizer.encode(prompt)), (second,))
    found = predict(model, [answer], pad_token=0, max_tokens=100, generate=True)[answer]
    assert found.generated == (best,)


def test_without_generation(pair, tokenizer):
    edited, base = pair("gpt2")
    edited.generate = None  # calling it would fail
    forced_only = predict_base(base, tokenizer, RECORDS, generate=False)
    metrics = evaluate(edited, tokenizer, RECORDS, forced_only, generate=False)
    assert all(metrics[f"{name}_generation"] is None for name in NAMES)
    assert all(metrics[f"{name}_generation_interval"] is None for name in NAMES)
    assert metrics.per_record[0]["generated"] is None
    assert 0 < metrics.reliability < 1


# ---------------------------------------------------------------- the model is left as it was


def test_model_state_and_random_generators_are_left_alone(pair, tokenizer):
    edited, base = pair("gpt2")
    edited.train()
    edited.transformer.h[0].eval()  # a user who froze one block's dropout
    flags = [module.training for module in edited.modules()]
    attributes = set(vars(edited))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    metrics = evaluate(edited, tokenizer, RECORDS, base)
    assert [module.training for module in edited.modules()] == flags
    assert set(vars(edited)) == attributes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert metrics == evaluate(edited.eval(), tokenizer, RECORDS, base)  # dropout was off


def test_training_flags_come_back_after_an_error(pair, tokenizer):
    edited, _ = pair("gpt2")
    edited.train()
    config = edited.generation_config
    with pytest.raises(ZeroDivisionError):
        edited.generate = lambda **_: 1 / 0
        evaluate(edited, tokenizer, RECORDS)
    assert edited.training and edited.generation_config is config


# ---------------------------------------------------------------- errors and edges


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_text_longer_than_the_context_is_refused_before_any_forward_pass(tiny_model, tokenizer, family):
    model = tiny_model(family)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    prompt = "a " * 200
    long = {**RECORDS[1], "request_id": "long", "rephrase_prompts": [prompt]}
    with pytest.raises(RequestError, match=r"record 2 \(request 'long'\).*context is 128"):
        evaluate(model, tokenizer, [RECORDS[0], RECORDS[2], long])
    with pytest.raises(RequestError, match="record 0.*context is 128"):
        predict_base(model, tokenizer, [{**RECORDS[1], "locality_prompts": [prompt]}])
    with pytest.raises(RequestError, match="shorten the prompt"):
        evaluate(model, tokenizer, [long])
    with pytest.raises(RequestError, match="shorten the target"):
        evaluate(model, tokenizer, [{**RECORDS[1], "target_new": prompt}])
    assert calls == []


def test_text_that_just_fits_the_context_is_scored_beside_shorter_ones(tiny_model, tokenizer):
    model = tiny_model("gpt2")
    target = len(Query.of(tokenizer, "x", RECORDS[1]["target_new"]).target_ids)
    prompt, full = "?" * (128 - target), "?" * 128
    assert len(Query.of(tokenizer, prompt, RECORDS[1]["target_new"]).ids) == 128
    assert len(Query.of(tokenizer, full, None).ids) == 128
    records = [{**RECORDS[1], "rephrase_prompts": [prompt], "locality_prompts": [full]}, RECORDS[0]]
    metrics = evaluate(model, tokenizer, records)  # the second record's targets are longer
    expected = literal_scores(model, model, tokenizer, records)
    for key in ("generality", "generality_generation", "locality_generation"):
        assert [row[key] for row in metrics.per_record] == [row[key] for row in expected]


def test_bad_records_are_named(tiny_model, tokenizer):
    model = tiny_model("gpt2")
    with pytest.raises(RequestError, match="record 1"):
        evaluate(model, tokenizer, [RECORDS[0], {"prompt": "x"}])
    with pytest.raises(RequestError, match="record 0.*no token"):
        evaluate(model, tokenizer, [{**RECORDS[1], "rephrase_prompts": [" "]}])
    with pytest.raises(ValueError, match="max_tokens"):
        evaluate(model, tokenizer, RECORDS, max_tokens=0)


def test_metrics_without_prompts_are_none(tiny_model, tokenizer):
    metrics = evaluate(tiny_model("gpt2"), tokenizer, [RECORDS[2]])
    for name in ("generality", "locality", "portability"):
        for suffix in ("", "_exact", "_generation"):
            assert metrics[name + suffix] is None and metrics[f"{name}{suffix}_interval"] is None
        assert metrics[f"{name}_prompts"] == 0
    assert metrics.reliability is not None
    nothing = evaluate(tiny_model("gpt2"), tokenizer, [])
    assert (nothing.records, nothing.reliability, nothing.reliability_interval) == (0, None, None)


def test_metrics_are_json_and_attributes(pair, tokenizer):
    edited, base = pair("gpt2")
    metrics = evaluate(edited, tokenizer, RECORDS, base)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics.locality == metrics["locality"]
    assert copy.deepcopy(metrics) == metrics
    with pytest.raises(AttributeError, match="fluency"):
        metrics.fluency  # noqa: B018
    assert "per_record" not in metrics.to_dict()
    assert metrics.to_dict(per_record=True) == metrics and isinstance(metrics, Metrics)
    assert metrics.reliability_interval == bootstrap_interval([row["reliability"] for row in metrics.per_record])


def test_progress_bar_counts_every_pass(pair, tokenizer, capsys):
    edited, base = pair("gpt2")
    evaluate(edited, tokenizer, RECORDS, base)
    assert capsys.readouterr() == ("", "")
    evaluate(edited, tokenizer, RECORDS, base, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "base: 100%" in err and "10/10" in err  # 5 locality prompts, forced and generated
    assert "evaluate: 100%" in err and "28/28" in err  # and 9 others


# ---------------------------------------------------------------- real data


@pytest.mark.parametrize("name", ["zsre/zsre_mend_eval_portability_gpt4.json", "counterfact/counterfact_500.json"])
def test_real_records_are_split_where_easyedit_splits_them(shared_data, name):
    """GPT-2's own vocabulary: prompt tokens are those of the prompt alone, and nothing of the target is lost."""
    folder = shared_data / "gpt2_bpe"
    gpt2 = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    assert len(gpt2) == 50_257
    for index, request in enumerate(read_requests(shared_data / name, limit=200).requests):
        queries = record_queries(gpt2, request, index)
        pairs = [(request.text, request.target_new)]
        pairs += [(prompt, request.target_new) for prompt in request.rephrase_prompts]
        pairs += [*request.locality_prompts, *request.portability_prompts]
        found = [query for name in NAMES for query in queries[name]]
        assert len(found) == len(pairs)
        for query, (prompt, target) in zip(found, pairs):
            assert list(query.prompt_ids) == gpt2.encode(prompt)
            assert list(query.ids) == gpt2.encode(f"{prompt} {target}")


# ---------------------------------------------------------------- batches and intervals


def test_grouped_batches_keep_to_the_budget_and_lose_nothing():
    sizes = [3, 50, 7, 7, 1, 20, 9, 9, 2, 31]
    queries = [Query((n,) * size, (n,) * (n % 2)) for n, size in enumerate(sizes)]
    size, group = (lambda q: len(q.prompt_ids)), (lambda q: len(q.target_ids))
    batches = list(grouped_batches(queries, 30, size=size, group=group))
    assert sorted((q for b in batches for q in b), key=lambda q: q.prompt_ids) == queries
    for batch in batches:
        assert len({group(q) for q in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(map(size, batch)) <= 30
    assert len(batches) < len(queries)


def test_no_forward_pass_exceeds_max_tokens(tiny_model, tokenizer):
    model = tiny_model("gpt2")
    shapes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    evaluate(model, tokenizer, RECORDS, max_tokens=60)
    assert all(shape.numel() <= 60 or shape[0] == 1 for shape in shapes)
    assert any(shape[0] > 1 for shape in shapes)


def test_bootstrap_interval():
    coin = [0, 1] * 200
    low, high = bootstrap_interval(coin)
    margin = 1.96 * math.sqrt(0.25 / len(coin))  # the normal approximation
    assert (low, high) == (pytest.approx(0.5 - margin, abs=0.006), pytest.approx(0.5 + margin, abs=0.006))
    assert bootstrap_interval(coin) == [low, high] != bootstrap_interval(coin, seed=1)
    narrow = bootstrap_interval(coin, level=0.5)
    assert low < narrow[0] < 0.5 < narrow[1] < high
    assert bootstrap_interval([1.0] * 7) == [1, 1]
    assert bootstrap_interval([None, 0.25]) == [0.25, 0.25]
    assert bootstrap_interval([]) is None and bootstrap_interval([None]) is None
