"""CounterFact's probabilities, fluency, perplexity: against hand-computed examples and literal loops."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from test_cli import output
from test_editor import small_model
from transformers import GPT2Config, GPT2LMHeadModel

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.errors import ComebaError, RequestError
from comeba_ext.evaluation import counterfact_scores, fluency, harness, ngram_entropy, perplexity, read_text
from comeba_ext.strict_json import strict_json

pytestmark = pytest.mark.usefixtures("one_block")

RECORDS = [
    EditRequest(
        "The mother tongue of {} is",
        "Danielle Darrieux",
        "English",
        "French",
        ("Danielle Darrieux speaks", "At home, Danielle Darrieux talks in"),
        (("The capital of Norway is", "Oslo"), ("Who built it?", None)),
    ),
    EditRequest("{} is located in", "Angola", "Europe", "Africa, far in the south", (), (("Peru is located in", "Lima"),)),
    EditRequest("{} plays the", "Toko Yasuda", "guitar"),
]


@torch.no_grad()
def probability(model, tokenizer, prompt, target):
    """MEMIT's test_batch_prediction for one text: exp(−mean NLL of the target's tokens)."""
    start = len(tokenizer.encode(prompt))
    ids = tokenizer.encode(f"{prompt} {target}")
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return math.exp(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))) / (len(ids) - start))


def test_counterfact_scores_equal_the_literal_loop(tiny_model, tokenizer):
    model = small_model(tiny_model)
    p = lambda prompt, target: probability(model, tokenizer, prompt, target)  # noqa: E731
    for max_tokens in (1, 4096):
        found = counterfact_scores(model, tokenizer, RECORDS, max_tokens=max_tokens)
        efficacy = [p(r.text, r.target_new) - p(r.text, r.ground_truth) for r in RECORDS[:2]]
        paraphrase = [p(q, "English") - p(q, "French") for q in RECORDS[0].rephrase_prompts]
        near = [
            p("The capital of Norway is", "Oslo") - p("The capital of Norway is", "English"),
            p("Peru is located in", "Lima") - p("Peru is located in", "Europe"),
        ]
        for name, gaps in (("efficacy", efficacy), ("paraphrase", paraphrase), ("neighborhood", near)):
            assert found[f"{name}_magnitude"] == pytest.approx(sum(gaps) / 2, rel=1e-4)
            assert found[f"{name}_score"] == sum(g > 0 for g in gaps) / 2
            low, high = found[f"{name}_magnitude_interval"]
            assert low <= found[f"{name}_magnitude"] <= high
    assert found.per_record[2]["efficacy_score"] is None  # no true object
    assert counterfact_scores(model, tokenizer, RECORDS[2:])["score"] is None


def test_counterfact_score_of_a_model_of_known_probabilities(tokenizer):
    """A model that ignores its input: the next token is t with probability softmax(bias)_t."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    (good,), (bad,) = (tokenizer(f" {w}")["input_ids"][:1] for w in ("is", "was"))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(8)[0])
        model.lm_head.weight.zero_()
        model.lm_head.weight[good, 0], model.lm_head.weight[bad, 0] = math.log(30), math.log(20)
    total = 30 + 20 + len(tokenizer) - 2
    record = EditRequest("{} it", "Peru", "is", "was", (), (("Peru", "was"),))
    found = counterfact_scores(model, tokenizer, [record])
    assert found.efficacy_score == 1 and found.neighborhood_score == 0
    assert found.efficacy_magnitude == pytest.approx(10 / total, rel=1e-5)
    assert found.neighborhood_magnitude == pytest.approx(-10 / total, rel=1e-5)
    model.lm_head.weight.data[bad, 0] = float("nan")  # a destroyed model gives nothing a probability, and what it says is JSON
    found = counterfact_scores(model, tokenizer, [record])
    assert found.efficacy_score == found.efficacy_magnitude == 0 and found.efficacy_magnitude_interval == [0, 0]


def test_json_that_any_reader_takes():
    value = {"a": [float("nan"), float("inf"), (-float("inf"), 1.5)], "b": {"c": None, "d": True, "e": "NaN", "f": np.float64("nan")}}
    text = strict_json(value, indent=1)
    refuse = lambda word: pytest.fail(f"{word} is no JSON")  # noqa: E731
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [None, "inf", ["-inf", 1.5]], "b": {"c": None, "d": True, "e": "NaN", "f": None}}


def test_ngram_entropy_by_hand():
    assert ngram_entropy("a a a a a") == 0
    # bigrams ab ba ab: H = −(2/3 log 2/3 + 1/3 log 1/3); trigrams aba bab: H = 1
    h2 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * h2 + 4 / 3 * 1) / 2)
    # "Oslo, it's" has five units: Oslo , it ' s
    assert ngram_entropy("Oslo, it's") == pytest.approx((2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2)
    assert ngram_entropy("") == 0 and ngram_entropy("one") == 0


def test_fluency_of_greedy_text(tiny_model, tokenizer):
    model = small_model(tiny_model)
    prompts = ["The mother tongue of Danielle", "Peru"]
    model.generation_config.repetition_penalty = 9.0  # the model's own settings would hide what is measured
    model.generation_config.do_sample = True
    found = fluency(model, tokenizer, prompts, new_tokens=12)
    values = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        values.append(ngram_entropy(tokenizer.decode(ids, skip_special_tokens=True)))
    assert found["fluency"] == pytest.approx(sum(values) / 2)
    assert model.generation_config.repetition_penalty == 9.0
    with pytest.raises(ComebaError, match="no prompt"):
        fluency(model, tokenizer, [])
    with pytest.raises(ComebaError, match="context"):
        fluency(model, tokenizer, prompts, new_tokens=1000)


def test_perplexity_and_next_tokens(tiny_model, tokenizer):
    model = small_model(tiny_model, n_positions=16)
    texts = ["The capital of Norway is Oslo, and the capital of Peru is Lima. " * 2, "Angola"]
    total, count, tokens = 0.0, 0, []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for piece in (ids[i : i + 16] for i in range(0, len(ids), 16)):
            with torch.no_grad():
                log_p = model(torch.tensor([piece])).logits[0].log_softmax(-1)
            total -= sum(log_p[i - 1, piece[i]].item() for i in range(1, len(piece)))
            count += len(piece) - 1
            tokens += log_p.argmax(-1).tolist()
    for max_tokens in (1, 4096):
        assert perplexity(model, tokenizer, texts, max_tokens=max_tokens) == pytest.approx(math.exp(total / count), rel=1e-5)
        assert sorted(read_text(model, tokenizer, texts, max_tokens=max_tokens).next_tokens.tolist()) == sorted(tokens)
    with pytest.raises(ComebaError, match="two tokens"):
        perplexity(model, tokenizer, [])


def test_perplexity_of_a_destroyed_model_is_a_number(tiny_model, tokenizer):
    model = small_model(tiny_model).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = perplexity(model, tokenizer, ["The capital of Norway is Oslo"])
    assert 1e300 < found < math.inf


def test_clear_errors(tiny_model, tokenizer):
    model = small_model(tiny_model)
    with pytest.raises(RequestError, match="context"):
        counterfact_scores(model, tokenizer, [EditRequest("Lima " * 200 + "{} is", "Peru", "x", "y")])


def test_without_the_harness(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ComebaError, match=r"pip install 'comeba_ext\[harness\]'"):
        harness(small_model(tiny_model), tokenizer, ["lambada"])


def own_task(folder, rows, name="own_facts"):
    """A multiple-choice task of the harness over local records: the new object or the old one."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{[new, old]}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(text))
    return name


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def preferred(model, tokenizer, row) -> bool:
    """Whether the new object is likelier behind the prompt, from one pass a text."""
    found = []
    for answer in (row["new"], row["old"]):
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(f"{row['prompt']} {answer}")["input_ids"]
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(log_p[n - 1, ids[n]].item() for n in range(start, len(ids))))
    return found[0] > found[1]


@pytest.mark.parametrize("scope", ["nearest", "zscore"])  # one looks at tokens alone, one at whole rows
def test_the_harness_measures_the_edited_model(tmp_path, offline, scope):
    from comeba_ext.testbed import covariance, facts, load

    model, tokenizer = load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope=scope))
    editor.set_covariance(covariance(model, tokenizer))
    chosen = facts()[:12]
    rows = [{"prompt": r.text, "new": r.target_new, "old": r.ground_truth} for r in chosen]
    name = own_task(tmp_path / "task", rows)
    measured = lambda: harness(model, tokenizer, [name], tmp_path / "task")[name]["acc,none"]  # noqa: E731
    oracle = lambda: sum(preferred(model, tokenizer, row) for row in rows) / len(rows)  # noqa: E731
    assert measured() == oracle() < 0.2
    with pytest.raises(ComebaError, match="no task 'nothing'"):
        harness(model, tokenizer, [name, "nothing"], tmp_path / "task")
    editor.edit(chosen[:6])
    assert measured() == pytest.approx(oracle()) and 0.4 < oracle() < 0.7
    with editor.disabled():
        assert measured() == oracle() < 0.2
    editor.save_pretrained(tmp_path / "edits", inference_only=True)
    (tmp_path / "texts.txt").write_text("The capital of Peru is Lima.\n")
    found = output(
        "ability",
        "testbed",
        "--edits",
        str(tmp_path / "edits"),
        "--tasks",
        name,
        "--task-folder",
        str(tmp_path / "task"),
        "--texts",
        str(tmp_path / "texts.txt"),
    )
    assert found["edited"]["tasks"][name]["acc,none"] == pytest.approx(oracle())
    assert found["unedited"]["tasks"][name]["acc,none"] < 0.2
    with editor.disabled():
        assert found["unedited"]["perplexity"] == pytest.approx(perplexity(model, tokenizer, ["The capital of Peru is Lima."]))
