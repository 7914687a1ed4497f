"""A real pretrained model, out of the box: SmolLM2-135M-Instruct, made by ``bench/real_models.py``."""

import json
import os
from pathlib import Path

import pytest
import torch

from comeba_ext import EditConfig, Editor, EditRequest, evaluate
from comeba_ext.data import read_texts
from comeba_ext.loading import load_model

ONE_THAT_SAYS_NOTHING = EditRequest("{} was founded by", "Microsoft", "Steve Jobs")  # one token, at the first position


@pytest.fixture(scope="module")
def smollm2():
    folder = os.environ.get("COMEBA_SMOLLM2")
    if not folder:
        pytest.skip("no real model: COMEBA_SMOLLM2 names the folder that bench/real_models.py makes")
    return Path(folder)


@pytest.fixture(scope="module")
def editor(smollm2, shared_data):
    model, tokenizer = load_model(smollm2)
    editor = Editor(model, tokenizer)
    editor.collect_covariance(read_texts(shared_data / "text" / "wikipedia_train_1000.csv"), tokens=5000, progress=False)
    return editor


@pytest.fixture(scope="module")
def edited(editor, shared_data):
    records = json.loads((shared_data / "counterfact" / "counterfact-train.json").read_text())[300:303]
    requests = [EditRequest.from_record(record) for record in records]
    return requests, editor.edit([*requests, ONE_THAT_SAYS_NOTHING])


def test_defaults_edit_it(editor, edited):
    requests, report = edited
    assert editor.config == EditConfig.for_model(editor.model) and editor.config.scope == "nearest"
    assert report.answered == [True] * (len(requests) + 1)
    metrics = evaluate(editor.model, editor.tokenizer, requests)
    assert metrics.reliability_generation == 1 and metrics.locality >= 0.8
    assert all(0.5 < share < 1 for share in report.share.values())
    assert all(leverage > 1000 for leverage in report.leverage.values())


def test_a_key_that_would_open_the_gate_for_every_text_is_not_used(editor, edited):
    """The edit goes to its prompt's end, and is of that prompt: neither other texts nor the same words about others meet it."""
    _, report = edited
    assert report.moved == report.request_ids[-1:] and not report.declined
    texts = [
        "Apple is a company.",
        "The weather was fine that day.",
        "Music is what she lived for.",
        "Google was founded by",
        "Harvard was founded by",
    ]
    ids = [torch.tensor([editor.tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        after = [editor.model(row).logits for row in ids]
        with editor.disabled():
            before = [editor.model(row).logits for row in ids]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_half_precision_serves_the_same_edits(editor, edited, smollm2, tmp_path):
    from comeba_ext import load_edits

    requests, _ = edited
    editor.save_pretrained(tmp_path, inference_only=True)
    model, tokenizer = load_model(smollm2, torch.bfloat16)
    load_edits(model, tmp_path)
    assert evaluate(model, tokenizer, requests, generate=False).reliability_exact >= 0.8
