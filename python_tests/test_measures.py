"""What experiments measure beside the metrics, against literal loops over single prompts and texts."""

import math
import types

import pytest
import torch

from comeba_ext import EditConfig, Editor, testbed
from comeba_ext.errors import ComebaError
from comeba_ext.evaluation import perplexity
from comeba_ext.evaluation.ability import UnrelatedText
from comeba_ext.experiments import measures
from comeba_ext.experiments.table import markdown
from comeba_ext.methods import default_config

TEXTS = [fact["subject"] + " is mentioned here, and so is the weather." for fact in testbed.raw_facts()[:3]] + [
    "The town lies on a river and has a market.",
    "Many people go there, and they speak of it when they come home.",
    "Rain.",
]


@pytest.fixture(scope="module", params=["zscore", "reference", "nearest"])
def edited(request):
    """An editor with six edits in the embedded model, and their requests."""
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope=request.param, steps=10))
    editor.set_covariance(testbed.covariance(model, tokenizer))
    requests = testbed.facts()[:6]
    editor.edit(requests)
    return editor, requests


@torch.no_grad()
def test_scores_and_shares_in_scope(edited):
    editor, requests = edited
    found = measures.make(("scores",), [])(editor, requests)
    asked = {
        "edited": [r.text for r in requests],
        "rephrased": [p for r in requests for p in r.rephrase_prompts],
        "other": list(dict.fromkeys(p for r in requests for p, _ in r.locality_prompts)),
    }
    shares = {}
    for kind, prompts in asked.items():
        inside = []
        for n, prompt in enumerate(prompts):  # each alone, unpadded, and scored by the layer's own formula over its input, in the pass
            seen = {}
            handles = [
                layer.register_forward_pre_hook(lambda m, args, name=name, seen=seen: seen.__setitem__(name, m.scores(args[0])[0]))
                for name, layer in editor.layers.items()
            ]
            editor.model(torch.tensor([editor.tokenizer(prompt)["input_ids"]]), use_cache=False)
            for handle in handles:
                handle.remove()
            for name, layer in editor.layers.items():
                peak = max(seen[name].tolist())
                assert found["peak_scores"][kind][name][n] == pytest.approx(peak, rel=2e-3, abs=2e-3)
                inside.append(peak >= layer.alpha.item() * (1 - 1e-4))
        shares[kind] = sum(inside) / len(inside)
        assert len(prompts) == len(found["peak_scores"][kind][name])
        assert found[f"in_scope_{kind}"] == pytest.approx(shares[kind])
    assert shares["edited"] == 1
    assert found["alpha"] == {name: layer.alpha.item() for name, layer in editor.layers.items()}


@torch.no_grad()
def test_plain_text_that_names_no_edited_subject(edited):
    editor, requests = edited
    measure = measures.make(("text",), TEXTS)
    found = measure(editor, requests)
    chosen = TEXTS[3:]  # the first three name edited subjects
    nll, said = {}, {}
    for state in ("edited", "unedited"):
        if state == "unedited":
            with editor.disabled():
                nll[state], said[state] = literal(editor, chosen)
        else:
            nll[state], said[state] = literal(editor, chosen)
    assert found["texts"] == len(chosen)
    assert found["perplexity"] == pytest.approx(math.exp(nll["edited"]), rel=1e-4)
    assert found["perplexity_before"] == pytest.approx(math.exp(nll["unedited"]), rel=1e-4)
    changed = sum(a != b for a, b in zip(said["edited"], said["unedited"], strict=True)) / len(said["edited"])
    assert found["text_changed"] == pytest.approx(changed)
    editor.layers["model.layers.0.mlp.down_proj"].delta.add_(0.5)  # a change that text must show
    for layer in editor.layers.values():
        layer.mode = "temporary"
    worse = measure(editor, requests)
    for layer in editor.layers.values():
        layer.mode = "validated"
    editor.layers["model.layers.0.mlp.down_proj"].delta.sub_(0.5)
    assert worse["text_changed"] > 0.2 and worse["perplexity_before"] == found["perplexity_before"]
    assert "names an edited subject" in measures.make(("text",), TEXTS[:3])(editor, requests)["text_error"]


@torch.no_grad()
def test_a_changed_model_without_edits_to_switch_off_is_compared_with_what_its_base_said():
    model, tokenizer = testbed.load()
    requests, chosen = testbed.facts()[:6], TEXTS[3:]
    reading = UnrelatedText(TEXTS)
    reading.read_base(model, tokenizer, requests)
    editor = types.SimpleNamespace(model=model, tokenizer=tokenizer)
    nll, said = literal(editor, chosen)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(-3)
    found = reading(model, tokenizer, requests)
    changed = sum(a != b for a, b in zip(said, literal(editor, chosen)[1], strict=True)) / len(said)
    assert found["text_changed"] == pytest.approx(changed) and changed > 0.2
    assert found["perplexity_before"] == pytest.approx(math.exp(nll), rel=1e-4)


def literal(editor, texts):
    total, count, said = 0.0, 0, []
    for text in texts:
        ids = editor.tokenizer(text)["input_ids"]
        log_p = editor.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        total -= sum(log_p[n - 1, ids[n]].item() for n in range(1, len(ids)))
        count += len(ids) - 1
        said += log_p.argmax(-1).tolist()
    return total / count, said


@pytest.mark.parametrize("named", [False, True])
def test_edits_in_the_prompt_are_not_measured_without_it(named):
    """Where a text would be asked otherwise, there is no number; one that is asked as it is has the unedited model's, rightly."""
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, default_config("ICE", model, named=named), method="ICE")
    requests = testbed.facts()[:2]
    editor.edit(requests)
    plain = [text for text in TEXTS if not any(r.subject in text for r in requests)]
    with editor.disabled():
        expected = perplexity(model, tokenizer, plain)
    found = measures.make(("text", "abilities"), TEXTS, tasks=measures.Tasks(("any",)))(editor, requests)
    if named:
        assert perplexity(model, tokenizer, plain) == found["perplexity"] == found["perplexity_before"] == expected
        assert found["text_changed"] == 0
    else:
        assert "stand in the prompt" in found["text_error"] and "perplexity" not in found
    with pytest.raises(ComebaError, match="stand in the prompt"):
        perplexity(model, tokenizer, [requests[0].text])
    assert "stand in the prompt" in found["abilities_error"]
    rows = [{"dataset": "d", "case": "ICE", "edits": n, "reliability": 1.0, "text_error": "why"} for n in (1, 2)]
    result = {"title": "t", "protocol": "single", "samples": 2, "paper": None, "note": None, "expected": []}
    table = markdown({**result, "records": {"d": {"used": 2, "skipped": []}}, "rows": rows})
    assert "d, ICE: no text in 2 rows: why" in table
