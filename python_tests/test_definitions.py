"""EasyEdit's and CounterFact's published definitions on shared records, in float64, against loops that ask one prompt at a time."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from comeba_ext.evaluation import counterfact_scores, evaluate

FILES = {"zsre": "zsre/zsre_mend_eval_portability_gpt4.json", "counterfact": "counterfact/counterfact_500.json"}
COUNT = 30


# -- what is asked, straight from the files' own fields --------------------------------------------------------------


def zsre(row: dict) -> dict:
    """As EasyEdit's ``run_zsre_llama2.py`` hands it to the editor."""
    return {
        "prompt": row["src"],
        "target_new": row["alt"],
        "rephrase": [row["rephrase"]],
        "locality": [(row["loc"], row["loc_ans"])],
        "portability": [(row["portability"]["New Question"], row["portability"]["New Answer"])],
    }


def counterfact(row: dict) -> dict:
    rewrite = row["requested_rewrite"]
    new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    return {
        "prompt": rewrite["prompt"].format(rewrite["subject"]),
        "target_new": new,
        "target_true": true,
        "rephrase": row["paraphrase_prompts"],
        "locality": [(prompt, true) for prompt in row["neighborhood_prompts"]],
        "portability": [],
    }


FORMS = {"zsre": zsre, "counterfact": counterfact}


def shared(shared_data, name: str) -> tuple[list[dict], list[dict]]:
    """Records as they stand in the file, from all over it, and what they ask."""
    path = shared_data / FILES[name]
    if not path.is_file():
        pytest.skip(f"no {path}")
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = rows[:: len(rows) // COUNT][:COUNT]
    return rows, [FORMS[name](row) for row in rows]


def half_learnt(tiny_model, tokenizer, records: list[dict]):
    """``(edited, base)`` in float64: the base has begun to learn what is asked, so that scores are neither all 0 nor all 1."""
    base = tiny_model("gpt2", initializer_range=0.1, n_positions=512).double()
    texts = [f"{r['prompt']} {r['target_new']}" for r in records] + [f"{r['locality'][0][0]} {r['locality'][0][1]}" for r in records]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimiser = torch.optim.Adam(base.parameters(), lr=0.02)
    for _ in range(12):
        optimiser.zero_grad()
        base(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimiser.step()
    edited, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return edited, base


# -- the published definitions, literally ----------------------------------------------------------------------------


@torch.no_grad()
def prediction_acc(model, tokenizer, prompt: str, target: str, locality: bool = False):
    """EasyEdit's ``test_prediction_acc`` for one prompt: the share of the target's tokens that are the argmax; with ``locality`` the
    argmaxes themselves."""
    labels = tokenizer.encode(prompt + " " + target)
    start = len(tokenizer.encode(prompt))
    answers = model(torch.tensor([labels])).logits[0].argmax(-1).tolist()[start - 1 : -1]
    return answers if locality else np.mean(np.equal(answers, labels[start:]))


def compute_edit_quality(model, base, tokenizer, record: dict) -> dict:
    """EasyEdit's rewrite, rephrase and portability accuracy, and, of what it keeps for locality before and after, the share that stayed."""
    ask = lambda prompt, target: prediction_acc(model, tokenizer, prompt, target)  # noqa: E731
    outputs = [[prediction_acc(m, tokenizer, *pair, locality=True) for m in (model, base)] for pair in record["locality"]]
    return {
        "reliability": ask(record["prompt"], record["target_new"]),
        "generality": np.mean([ask(prompt, record["target_new"]) for prompt in record["rephrase"]]),
        "locality": np.mean([np.mean(np.equal(post, pre)) for post, pre in outputs]),
        "portability": np.mean([ask(*pair) for pair in record["portability"]]) if record["portability"] else None,
    }


@torch.no_grad()
def nll(model, tokenizer, prompt: str, target: str) -> float:
    """MEMIT's ``test_batch_prediction`` for one text: mean NLL of the target's tokens, tokenised on their own."""
    own = tokenizer.encode(f" {target}")
    logits = model(torch.tensor([tokenizer.encode(f"{prompt} {target}")])).logits[0]
    start, total = len(tokenizer.encode(prompt)), 0.0
    for n, token in enumerate(own):
        total -= logits[start + n - 1].log_softmax(0)[token].item()
    return total / len(own)


def summarised(model, tokenizer, record: dict) -> dict:
    """MEMIT's ``summarize.py`` for one record: how often the NLLs stand as wanted, and by how much the probabilities differ."""
    asked = {
        "efficacy": [record["prompt"]],
        "paraphrase": record["rephrase"],
        "neighborhood": [prompt for prompt, _ in record["locality"]],
    }
    found = {}
    for name, prompts in asked.items():
        wins, gaps = [], []
        for prompt in prompts:
            new, true = (nll(model, tokenizer, prompt, record[key]) for key in ("target_new", "target_true"))
            wins.append(true < new if name == "neighborhood" else true > new)
            gaps.append(math.exp(-true) - math.exp(-new) if name == "neighborhood" else math.exp(-new) - math.exp(-true))
        found[f"{name}_score"], found[f"{name}_magnitude"] = np.mean(wins), np.mean(gaps)
    return found


# -- the comparisons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_teacher_forced_scores_are_easyedits(shared_data, tiny_model, tokenizer, name):
    rows, records = shared(shared_data, name)
    edited, base = half_learnt(tiny_model, tokenizer, records)
    expected = [compute_edit_quality(edited, base, tokenizer, record) for record in records]
    metrics = evaluate(edited, tokenizer, rows, base, generate=False)
    assert metrics.records == COUNT
    for key in expected[0]:
        own = [row[key] for row in expected]
        assert [row[key] for row in metrics.per_record] == pytest.approx(own, abs=1e-12)
        if None in own:  # CounterFact asks nothing of the kind
            assert metrics[key] is None
            continue
        assert 0 < np.mean(own) < 1 and len(set(own)) > 5, key  # else there would be little to compare
        assert metrics[key] == pytest.approx(np.mean(own), abs=1e-12)


def test_counterfact_scores_are_memits(shared_data, tiny_model, tokenizer):
    rows, records = shared(shared_data, "counterfact")
    model = tiny_model("gpt2", n_positions=512).double()  # which of two objects it likes more is chance
    expected = [summarised(model, tokenizer, record) for record in records]
    found = counterfact_scores(model, tokenizer, rows)
    for key in expected[0]:
        own = [row[key] for row in expected]
        assert [row[key] for row in found.per_record] == pytest.approx(own, abs=1e-12)
        assert found[key] == pytest.approx(np.mean(own), abs=1e-12)
        assert len(set(own)) > 1 and abs(found[key]) > 1e-6, key
    shares = [found[f"{name}_score"] for name in ("efficacy", "paraphrase", "neighborhood")]
    assert all(0 < share < 1 for share in shares)
    efficacy, paraphrase, neighborhood = shares
    product, pairs = efficacy * paraphrase * neighborhood, efficacy * paraphrase + efficacy * neighborhood + paraphrase * neighborhood
    assert found.score == pytest.approx(3 * product / pairs, abs=1e-12)


# -- by hand ---------------------------------------------------------------------------------------------------------


def words(text: str) -> PreTrainedTokenizerFast:
    """One token a word of a text, beside ``<pad>`` (0) and ``<eos>`` (1)."""
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(["<pad>", "<eos>", *text.split()]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@torch.no_grad()
def bigrams(tokenizer, after: dict[str, dict[str, float]], context: int = 64) -> GPT2LMHeadModel:
    """A GPT-2 in float64 whose next word depends on the last one alone: ``after[last][next]`` is its probability, what is left of 1 is
    shared by the words that are not named; after other words all are alike."""
    size = len(tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = GPT2Config(vocab_size=size, n_embd=size, n_layer=1, n_head=1, n_positions=context, tie_word_embeddings=False, **ids)
    model = GPT2LMHeadModel(config).double().eval()
    vocabulary, table = tokenizer.get_vocab(), torch.full((size, size), 1 / size, dtype=torch.float64)
    for last, own in after.items():
        row = table[vocabulary[last]]
        row[:] = (1 - sum(own.values())) / (size - len(own))
        for word, probability in own.items():
            row[vocabulary[word]] = probability
    model.transformer.wte.weight.copy_(torch.eye(size))
    model.transformer.wpe.weight.zero_()
    for part in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
        part.weight.zero_()
        part.bias.zero_()
    model.transformer.ln_f = torch.nn.Identity()
    model.lm_head.weight.copy_(table.log().T)
    return model


def test_score_is_the_harmonic_mean_of_three_shares():
    tokenizer = words("Peru new true e1 e2 r1 r2 n1 n2 n3 n4")
    after = {
        "e1": {"new": 0.5, "true": 0.25},  # the new object wins
        "e2": {"new": 0.2, "true": 0.3},  # loses
        "r1": {"new": 0.4, "true": 0.2},  # wins
        "r2": {"new": 0.1, "true": 0.3},  # loses
        "n1": {"new": 0.1, "true": 0.6},  # the true one wins
        "n2": {"new": 0.5, "true": 0.4},
        "n3": {"new": 0.3, "true": 0.2},
        "n4": {"new": 0.2, "true": 0.2},  # equal is no success
    }
    fact = {"subject": "Peru", "target_new": "new", "ground_truth": "true"}
    near = [[f"n{n}", "true"] for n in (1, 2, 3, 4)]
    first = {**fact, "prompt": "{} e1", "rephrase_prompts": ["r1", "r2"], "locality_prompts": near}
    second = {**fact, "prompt": "{} e2", "rephrase_prompts": ["Peru r1"]}
    found = counterfact_scores(bigrams(tokenizer, after), tokenizer, [first, second])
    assert found.efficacy_score == 1 / 2  # of 1 and 0
    assert found.paraphrase_score == 3 / 4  # of 1/2 and 1: over a record's prompts first
    assert found.neighborhood_score == 1 / 4  # of one record, the other has none
    assert found.score == pytest.approx(9 / 22, abs=1e-12)  # 3 / (2 + 4/3 + 4)
    assert found.efficacy_magnitude == pytest.approx((0.25 - 0.1) / 2, abs=1e-12)
    assert found.neighborhood_magnitude == pytest.approx((0.5 - 0.1 - 0.1 + 0) / 4, abs=1e-12)
    nothing = counterfact_scores(bigrams(tokenizer, after), tokenizer, [{**first, "locality_prompts": near[1:]}])
    assert (nothing.neighborhood_score, nothing.score) == (0, 0)  # nor is there a mean with 1/0 in it
