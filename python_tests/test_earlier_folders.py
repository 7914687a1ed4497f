"""Folders of edits that the version before methods and editors were told apart has written: they are used as then, and gone on with.

``data/edits_of_0_1_0.zip`` holds, for some methods, a folder of three edits in two steps on the tiny GPT-2, and the logits behind four
prompts as that version gave them: with those edits, and after one more. That version kept all edits of a layer in one matrix; where
keys are compared, whoever goes on editing has every subject's apart.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_editor import assert_compares_with_the_live_keys, assert_least_squares, ids_of, small_model, some_requests
from test_methods import given

from comeba_ext import Editor, load_edits

ZIP = Path(__file__).parent / "data" / "edits_of_0_1_0.zip"


@pytest.mark.parametrize(
    "label, method", [("nearest", "COMEBA-HK"), ("zscore", "COMEBA-HK"), ("memit", "MEMIT"), ("ft", "FT"), ("without-hooks", "MEMIT-seq")]
)
def test_a_folder_of_the_version_before(tiny_model, tokenizer, tmp_path, label, method):
    with zipfile.ZipFile(ZIP) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith(f"{label}/")])
    folder = tmp_path / label
    expected = load_file(folder / "expected.safetensors")
    requests = some_requests(4)
    used = load_edits(small_model(tiny_model), folder)
    editor = Editor.from_pretrained(small_model(tiny_model), tokenizer, folder)
    assert editor.method.name == method and editor.step == 2 and len(editor.ledger) == 3
    moved = 0.0
    with torch.no_grad():
        for n, request in enumerate(requests):
            ids = ids_of(used, tokenizer, request.text)
            for model in (used, editor.model) if label != "nearest" else (used,):
                assert torch.allclose(model(ids).logits[0, -1], expected[f"logits{n}"], atol=1e-4)
            moved = max(moved, (expected[f"logits{n}"] - small_model(tiny_model)(ids).logits[0, -1]).abs().max().item())
    assert moved > 0.1  # the folder does hold edits
    if label == "nearest":
        assert_least_squares(editor)
        assert_compares_with_the_live_keys(editor)
    editor.edit(requests[3:], **given(editor, 1, 2))
    if label == "nearest":
        assert len(editor.ledger) == 4
        assert_least_squares(editor)
    with torch.no_grad():
        for n, request in enumerate(requests if label != "nearest" else ()):
            assert torch.allclose(
                editor.model(ids_of(editor.model, tokenizer, request.text)).logits[0, -1], expected[f"after{n}"], atol=1e-3
            )
    editor.rollback(0)
    with torch.no_grad():
        ids = ids_of(editor.model, tokenizer)
        assert torch.equal(editor.model(ids).logits, small_model(tiny_model)(ids).logits)
