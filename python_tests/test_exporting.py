"""Exported models: the folder decides and answers as the hooked model does, without this package; merged weights and adapters are the
least squares they should be; what cannot be exported is said and leaves nothing behind."""

import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from test_cli import output, run
from test_continuation import CONFIGS, family_model
from test_editor import TEXTS, make_editor, random_values, small_model, some_requests
from transformers import AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel, StaticCache

from comeba_ext import EditConfig, Editor, load_edits, testbed
from comeba_ext.errors import ArchitectureError, ComebaError, StorageError
from comeba_ext.exporting import FORMATS, export_folder, export_lora, export_merged, folder
from comeba_ext.layers.attachment import attachments
from comeba_ext.methods import default_config

OPEN = {"alpha_floor": 0.1, "unnamed_floor": 0.4}  # gates that many tokens pass


def base_of(tiny_model, tokenizer, family):
    if family in CONFIGS and family not in ("gpt2", "llama", "opt"):
        return family_model(family, tokenizer, torch.float32)
    return tiny_model(family, n_layer=4, n_inner=48) if family == "gpt2" else tiny_model(family, num_hidden_layers=4)


def edited(base, tokenizer, path, count=8, **changes):
    """A copy of the model, edited and saved; the editor."""
    blocks = {} if "gemma" not in base.config.model_type else {"layers": (2,)}
    editor = make_editor(
        copy.deepcopy(base), tokenizer, **({"scope": "nearest"} | (OPEN if changes.get("scope") is None else {}) | blocks | changes)
    )
    editor.edit(some_requests(count), target_values=random_values(count))
    editor.save_pretrained(path)
    return editor


def loaded(path, **how):
    """The folder's model by its own file alone; in this process, where Transformers would keep the file in a cache of the user's."""
    spec = importlib.util.spec_from_file_location(f"exported_{path.name}_{abs(hash(path))}", path / "modeling_comeba.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.EditedConfig.from_pretrained(path)
    return module.EditedForCausalLM.from_pretrained(path, config=config, **how).eval()


def batch(tokenizer, texts, side):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length, pad = max(map(len, rows)), tokenizer.pad_token_id
    left = lambda row, filler: [filler] * (length - len(row))  # noqa: E731
    ids = [left(row, pad) + row if side == "left" else row + left(row, pad) for row in rows]
    mask = [left(row, 0) + [1] * len(row) if side == "left" else [1] * len(row) + left(row, 0) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


ASKED = [request.text for request in some_requests(8)] + ["People say that " + some_requests(8)[5].text, *TEXTS[:3]]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("gpt2", {}),
        ("opt", {}),  # flattens its tokens before the MLP
        ("gemma3_text", {}),
        ("qwen3", {}),
        ("stablelm", {}),  # found by inspection
        ("gpt2", {"scope": "reference", "alpha_margin": 1.0}),
        ("llama", {"scope": "reference", "alpha_margin": 1.0, "gate": "sketch"}),
    ],
)
def test_the_folder_is_the_hooked_model(tiny_model, tokenizer, tmp_path, family, changes):
    base = base_of(tiny_model, tokenizer, family)
    edited(base, tokenizer, tmp_path / "edits", **changes)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    done = export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert done.edits == 8 and not attachments(base)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    exported, hooked = loaded(tmp_path / "out"), load_edits(copy.deepcopy(base), tmp_path / "edits")
    again = copy.deepcopy(exported)
    for side in ("left", "right"):
        asked = batch(tokenizer, ASKED, side)
        real = asked["attention_mask"].bool()
        with torch.no_grad():
            found, wanted, plain = (model(**asked).logits[real] for model in (exported, hooked, base))
            assert torch.equal(found, again(**asked).logits[real])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        moved = (wanted - plain).abs().amax(-1) > 1e-3
        assert 0.05 < moved.float().mean() < 1  # some tokens meet the edits, some do not
        assert torch.equal(found[(wanted == plain).all(-1)], plain[(wanted == plain).all(-1)])
    asked = batch(tokenizer, ASKED, "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        found, wanted = (model.generate(**asked, **options, num_beams=beams) for model in (exported, hooked))
        assert torch.equal(found, wanted)


def test_a_text_in_pieces_and_taken_back(tiny_model, tokenizer, tmp_path):
    """A cache by hand: piece by piece, copied, cropped, its rows chosen. In float64, where rounding hides nothing."""
    base = base_of(tiny_model, tokenizer, "llama")
    edited(base, tokenizer, tmp_path / "edits")
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    model, base = loaded(tmp_path / "out").double(), base.double()
    rows = torch.tensor([tokenizer(text)["input_ids"][:8] for text in ASKED[:2]])
    with torch.no_grad():
        whole, plain = model(rows).logits, base(rows).logits
        assert (whole - plain).abs().max() > 1e-2
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
            parts.append(model(rows[:, start:end], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
        cache = copy.deepcopy(cache)
        cache.crop(-4)
        torch.testing.assert_close(model(rows[:, 4:], past_key_values=cache).logits, whole[:, 4:], rtol=0, atol=1e-9)
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(model(rows.flip(0)[:, 4:], past_key_values=cache).logits, whole.flip(0)[:, 4:], rtol=0, atol=1e-9)


def test_a_static_cache_taken_back(tiny_model, tokenizer, tmp_path):
    """Its length is a tensor that changes in place; and a name's beginning is known however much is taken back."""
    base = base_of(tiny_model, tokenizer, "llama")
    edited(base, tokenizer, tmp_path / "edits", unnamed_floor=1.1)  # only the name tells
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    model = loaded(tmp_path / "out")
    rows = torch.tensor([tokenizer(ASKED[8])["input_ids"]])
    with torch.no_grad():
        whole, plain = model(rows).logits, base(rows).logits
        last = int(((whole - plain).abs().amax(-1) > 1e-3)[0].nonzero()[0])  # of the name
        for length in (3, 80):
            cache = StaticCache(config=model.config, max_cache_len=128)
            model(rows[:, :last], past_key_values=cache, use_cache=True)
            model(torch.full((1, length), 5), past_key_values=cache, use_cache=True)
            cache.crop(-length)
            again = model(rows[:, last:], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(again, whole[:, last:], rtol=1e-4, atol=1e-4)


def test_other_ways_to_run_it(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "llama")
    edited(base, tokenizer, tmp_path / "edits")
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    model, asked = loaded(tmp_path / "out"), batch(tokenizer, ASKED, "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**asked, **options)
    assert torch.equal(model.generate(**asked, **options, cache_implementation="static"), wanted)
    for row in range(3):  # assisted decoding takes tokens back
        alone = {"input_ids": asked["input_ids"][row][asked["attention_mask"][row].bool()][None]}
        found, wanted = (model.generate(**alone, **options, **more) for more in ({"prompt_lookup_num_tokens": 3}, {}))
        assert torch.equal(found, wanted)
    with torch.no_grad():
        wanted = model(**asked).logits
        places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
        places |= {"model.layers": "disk", "edits": "disk"}
        assert torch.equal(loaded(tmp_path / "out", device_map=places, offload_folder=tmp_path / "disk")(**asked).logits, wanted)
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], r=2))
        assert torch.equal(adapted(**asked).logits, wanted)  # an adapter begins at zero


def test_embeddings_of_an_unknown_text(tiny_model, tokenizer, tmp_path):
    """No name is known then: every token is compared with every key, as the hooked model does."""
    base = base_of(tiny_model, tokenizer, "llama")
    edited(base, tokenizer, tmp_path / "edits", unnamed_floor=0.1)
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    exported, hooked = loaded(tmp_path / "out"), load_edits(copy.deepcopy(base), tmp_path / "edits")
    vectors = base.get_input_embeddings().weight[batch(tokenizer, ASKED, "right")["input_ids"]].detach()
    with torch.no_grad():
        found, wanted, plain = (model(inputs_embeds=vectors).logits for model in (exported, hooked, base))
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_one_delta_for_all_and_names_unknown(tiny_model, tokenizer, tmp_path):
    """Layers whose anchors are in no shard, as an earlier version saved them."""
    base = base_of(tiny_model, tokenizer, "gpt2")
    editor = edited(base, tokenizer, tmp_path / "edits", unnamed_floor=0.1)
    for layer in editor.layers.values():
        layer.delta.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        layer.shards.clear()
        layer.score.assign(torch.full_like(layer.score.shards[: layer.score.known], -1))
    editor.save_pretrained(tmp_path / "one", inference_only=True)
    from comeba_ext.storage import read_manifest, write_folder

    manifest, adapter = read_manifest(tmp_path / "one"), {}
    for name, layer in editor.layers.items():
        adapter |= {
            f"{name}.{what}": tensor for what, tensor in {**layer.score.tensors(), "alpha": layer.alpha, "delta": layer.delta}.items()
        }
    write_folder(tmp_path / "one", {k: v for k, v in manifest.items() if k not in ("files", "blocks")}, {"adapter": adapter}, {})
    export_folder(base, tokenizer, tmp_path / "one", tmp_path / "out")
    exported, hooked = loaded(tmp_path / "out"), load_edits(copy.deepcopy(base), tmp_path / "one")
    asked = batch(tokenizer, ASKED, "right")
    with torch.no_grad():
        found, wanted, plain = (model(**asked).logits for model in (exported, hooked, base))
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_and_layers_put_in_later(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "llama")
    edited(base, tokenizer, tmp_path / "edits")
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    half = loaded(tmp_path / "out", dtype=torch.bfloat16)
    gate = half.edits[0]
    assert gate.anchors.dtype == torch.bfloat16 and gate.alpha.dtype == gate.thresholds.dtype == torch.float32
    base.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    hooked, asked = load_edits(copy.deepcopy(plain), tmp_path / "edits"), batch(tokenizer, ASKED, "right")
    with torch.no_grad():
        found, wanted, plain = (model(**asked).logits for model in (half, hooked, plain))
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(found, wanted)
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        before = model(**asked).logits
        for name in ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"):  # as a quantiser does
            other = torch.nn.Linear(64, 32, bias=False)
            other.weight.copy_(model.get_submodule(name).weight)
            model.set_submodule(name, other)
        assert torch.equal(model(**asked).logits, before)
    with pytest.raises(ValueError, match="checkpointing"):
        model.gradient_checkpointing_enable()


def test_what_was_taken_back_is_not_in_the_folder(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "gpt2")
    editor = edited(base, tokenizer, tmp_path / "edits")
    editor.retract([entry.request.request_id for entry in editor.ledger.live()[:6]])
    editor.save_pretrained(tmp_path / "edits")
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    gate, subjects = loaded(tmp_path / "out").edits[0], {entry.request.subject for entry in editor.ledger.live()}
    assert len(gate.left) == 2 * 2 and len(gate.rows) == len(subjects) == len(set(gate.anchor_shards.tolist()))


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "comeba_ext":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
try:
    import comeba_ext
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("comeba_ext is here")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, asked, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("refused:", str(error))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
asked = torch.load(asked)
with torch.no_grad():
    logits = model(**asked["batch"]).logits
written = model.generate(**asked["batch"], max_new_tokens=6, do_sample=False)
model.save_pretrained(out + ".again")
again = AutoModelForCausalLM.from_pretrained(out + ".again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**asked["batch"]).logits, logits)
ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
torch.save({"logits": logits, "written": written, "ids": ids}, out)
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model's default edits, saved: the folder and its requests."""
    path = tmp_path_factory.mktemp("embedded")
    model, tokenizer = testbed.load()
    editor, requests = Editor(model, tokenizer), testbed.facts()[:6]
    editor.set_covariance(testbed.covariance(model, tokenizer))
    editor.edit(requests)
    editor.save_pretrained(path / "edits")
    (path / "records.json").write_text(json.dumps([request.to_record() for request in requests]))
    return path, requests


def test_it_loads_where_this_package_is_not(embedded, tmp_path):
    path, requests = embedded
    model, tokenizer = testbed.load()
    export_folder(model, tokenizer, path / "edits", tmp_path / "out")
    load_edits(model, path / "edits")
    texts = [request.text for request in requests] + [prompt for request in requests[:4] for prompt, _ in request.locality_prompts]
    asked = batch(tokenizer, texts, "left")
    torch.save({"batch": asked, "texts": texts}, tmp_path / "asked.pt")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [tmp_path / "out", tmp_path / "asked.pt", tmp_path / "found.pt"]
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trust_remote_code" in done.stdout  # and not the unedited model
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        wanted = model(**asked).logits
    real = asked["attention_mask"].bool()
    torch.testing.assert_close(found["logits"][real], wanted[real], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["written"], model.generate(**asked, max_new_tokens=6, do_sample=False))
    answers = tokenizer.batch_decode(found["written"][: len(requests), asked["input_ids"].shape[1] :])
    assert all(answer.strip().startswith(request.target_new) for answer, request in zip(answers, requests))
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in texts]


# -- plain weights ----------------------------------------------------------------------------------------------------


def weights_of(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_is_the_least_squares_of_all_edits(tiny_model, tokenizer, tmp_path, family):
    base = base_of(tiny_model, tokenizer, family)
    editor = edited(base, tokenizer, tmp_path / "edits")
    export_merged(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    merged, before = weights_of(tmp_path / "out"), base.state_dict()
    live = editor.ledger.live()
    for name in editor.layers:
        keys, responses = (torch.cat([getattr(entry, what)[name] for entry in live]).double() for what in ("keys", "responses"))
        memory = 20.0 * editor.covariance[name].double() + keys.T @ keys
        delta = torch.linalg.solve(memory, keys.T @ responses).T  # (d_out, d_in)
        change = merged[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(change.T if family == "gpt2" else change, delta, rtol=1e-4, atol=1e-5 * delta.abs().max().item())
        assert delta.abs().max() > 1e-2
    changed = {f"{name}.weight" for name in editor.layers}
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == changed


@pytest.mark.parametrize("method", ["MEMIT-seq", "AlphaEdit", "ROME", "FT", "UltraEdit", "LoRA"])
def test_methods_without_a_gate_are_their_merged_weights(tiny_model, tokenizer, tmp_path, method):
    from comeba_ext.methods import method_named

    base, kind = small_model(tiny_model), method_named(method)
    layers = (1,) if kind.one_layer else (1, 2)
    editor = Editor(copy.deepcopy(base), tokenizer, default_config(method, base, layers=layers, steps=4, prefixes=0), method=method)
    editor.collect_covariance(TEXTS, tokens=10**6, progress=False)
    for request in some_requests(2):
        editor.edit([request])
    asked = batch(tokenizer, ASKED, "right")
    with torch.no_grad():
        wanted, plain = editor.model(**asked).logits, base(**asked).logits
    assert (wanted - plain).abs().max() > 1e-4
    editor.save_pretrained(tmp_path / "edits")
    editor.save_pretrained(tmp_path / "small", inference_only=True)
    for source in ("edits", "small"):
        export_merged(base, tokenizer, tmp_path / source, tmp_path / f"out of {source}")
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(tmp_path / f"out of {source}").eval()(**asked).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ComebaError, match="merged"):
        export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_is_the_merged_model(tiny_model, tokenizer, tmp_path, family):
    peft = pytest.importorskip("peft")
    base = base_of(tiny_model, tokenizer, family)
    editor = edited(base, tokenizer, tmp_path / "edits", count=3)
    keys = 2 * len(editor.ledger.live())
    done = export_lora(base, tokenizer, tmp_path / "edits", tmp_path / "lora")
    export_merged(base, tokenizer, tmp_path / "edits", tmp_path / "merged")
    assert 1 <= done.rank <= keys
    asked = batch(tokenizer, ASKED, "right")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, wanted, plain = (model(**asked).logits for model in (adapted, merged, base))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - plain).abs().max() > 1e-1
        torch.testing.assert_close(adapted.merge_and_unload()(**asked).logits, wanted, rtol=1e-4, atol=1e-4)


# -- what is refused ----------------------------------------------------------------------------------------------------


def nothing_but(path, *names):
    return {own.name for own in path.iterdir()} == set(names)


@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_that_holds_something(tiny_model, tokenizer, tmp_path, to):
    base = base_of(tiny_model, tokenizer, "gpt2")
    edited(base, tokenizer, tmp_path / "edits", count=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"out is there already .* not an empty folder"):
        FORMATS[to](base, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert nothing_but(tmp_path / "out", "thesis.txt") and nothing_but(tmp_path, "edits", "out")
    (tmp_path / "out" / "thesis.txt").unlink()
    FORMATS[to](base, tokenizer, tmp_path / "edits", tmp_path / "out")  # an empty one is taken
    assert len(list((tmp_path / "out").iterdir())) >= 2


@pytest.mark.parametrize("to", FORMATS)
def test_edits_of_another_base(tiny_model, tokenizer, tmp_path, to):
    edited(base_of(tiny_model, tokenizer, "gpt2"), tokenizer, tmp_path / "edits", count=2)
    other = tiny_model("gpt2", 5, n_layer=4, n_inner=48)
    with pytest.raises(StorageError, match="belongs to another model"):
        FORMATS[to](other, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert nothing_but(tmp_path, "edits") and not attachments(other)


def test_scores_and_methods_that_a_folder_cannot_bring(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "gpt2")
    edited(base, tokenizer, tmp_path / "edits", count=2, scope="zscore")
    with pytest.raises(ComebaError, match="'zscore' cannot be exported with their gate: it looks at a sequence's other tokens"):
        export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    export_merged(base, tokenizer, tmp_path / "edits", tmp_path / "merged")  # by explicit wish
    for method, why in (("ICE", "in front of every prompt"), ("GRACE", "decided while the model runs")):
        editor = Editor(copy.deepcopy(base), tokenizer, default_config(method, base, layers=(1,), steps=2), method=method)
        editor.edit(some_requests(1))
        editor.save_pretrained(tmp_path / method)
        for to in ("merged", "lora"):
            with pytest.raises(ComebaError, match=f"{method}: .*{why}"):
                FORMATS[to](base, tokenizer, tmp_path / method, tmp_path / "out")
        with pytest.raises(ComebaError, match=f"{method} has no gate"):
            export_folder(base, tokenizer, tmp_path / method, tmp_path / "out")
    assert nothing_but(tmp_path, "edits", "merged", "ICE", "GRACE") and not attachments(base)


def test_saved_for_inference_only(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "llama")
    editor = edited(base, tokenizer, tmp_path / "edits", count=3)
    editor.save_pretrained(tmp_path / "small", inference_only=True)
    with pytest.raises(ComebaError, match="without inference_only"):
        export_merged(base, tokenizer, tmp_path / "small", tmp_path / "out")
    export_folder(base, tokenizer, tmp_path / "small", tmp_path / "out")
    asked = batch(tokenizer, ASKED, "right")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(**asked).logits, editor.model(**asked).logits, rtol=1e-5, atol=1e-5)


def test_models_that_cannot_be_written(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "gpt2")
    editor = edited(base, tokenizer, tmp_path / "edits", count=2)
    with pytest.raises(ArchitectureError, match="as it came"):
        export_merged(editor.model, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert attachments(editor.model)

    class Mine(GPT2LMHeadModel):
        pass

    mine = Mine(base.config)
    mine.load_state_dict(base.state_dict())
    with pytest.raises(ArchitectureError, match="Mine is not of Transformers"):
        export_folder(mine, tokenizer, tmp_path / "edits", tmp_path / "out")
    base.hf_quantizer = object()
    with pytest.raises(ArchitectureError, match="quantised"):
        export_merged(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    empty = Editor(small_model(tiny_model), tokenizer, EditConfig(layers=(1, 2), lam=20.0, prefixes=0))
    empty.save_pretrained(tmp_path / "empty")
    empty.close()
    with pytest.raises(ComebaError, match="no edits"):
        export_merged(empty.model, tokenizer, tmp_path / "empty", tmp_path / "out")
    assert nothing_but(tmp_path, "edits", "empty")


def test_a_rank_that_is_no_saving(tiny_model, tokenizer, tmp_path):
    base = base_of(tiny_model, tokenizer, "gpt2")
    edited(base, tokenizer, tmp_path / "edits", count=30)
    with pytest.raises(ComebaError, match=r"rank \d+ of 32, .* export it as merged"):
        export_lora(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert nothing_but(tmp_path, "edits")


def test_an_export_that_fails_leaves_nothing(tiny_model, tokenizer, tmp_path, monkeypatch):
    base = base_of(tiny_model, tokenizer, "gpt2")
    edited(base, tokenizer, tmp_path / "edits", count=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    monkeypatch.undo()
    assert nothing_but(tmp_path, "edits") and not attachments(base)
    stale = tmp_path / ".out.0123abcd.tmp"  # of a process that was killed
    stale.mkdir()
    (stale / ".comeba.lock").touch()
    export_folder(base, tokenizer, tmp_path / "edits", tmp_path / "out")
    assert nothing_but(tmp_path, "edits", "out")


# -- the command line ---------------------------------------------------------------------------------------------------


def test_the_command_says_how_to_load_both(embedded, tmp_path):
    path, _ = embedded
    done = run("export", "testbed", "--edits", path / "edits", "--to", "folder", "--out", tmp_path / "out")
    lines = [line.strip() for line in done.stdout.replace("\n", "").split("  ") if "from_pretrained" in line]
    assert [line.partition("(")[0] for line in lines] == ["AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained"]
    assert done.stdout.replace("\n", "").count("trust_remote_code=True") == 2


def test_the_command_says_what_it_costs(embedded, tmp_path):
    path, requests = embedded
    arguments = ("export", "testbed", "--edits", path / "edits", "--records", path / "records.json", "--limit", 4)
    result = output(*arguments, "--to", "merged", "--out", tmp_path / "merged")
    unedited, before, after = result["measured"].values()
    assert result["records"] == {"read": 4, "used": 4, "skipped": []} and result["edits"] == len(requests)
    assert unedited["locality"] == 1.0 and before["reliability"] == 1.0 and unedited["reliability"] < 0.5 < after["reliability"]
    assert "other tokens" in result["notes"][0]  # Transformers takes the embedded model's tokenizer for Qwen2's
    # The other way: a changed checkpoint is measured against its base.
    (tmp_path / "texts.txt").write_text("\n".join(itertools.islice(testbed.texts(9), 8)))
    given = ("--base", "testbed", "--limit", 4, "--no-generate", "--answer-tokens", 0, "--texts", tmp_path / "texts.txt")
    own = output("eval", tmp_path / "merged", path / "records.json", *given)
    assert own["base"] == "testbed" and own["text_changed"] > 0 and own["perplexity"] != own["perplexity_before"]
    assert own["reliability"] == after["reliability"] and own["locality"] == after["locality"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--to", "gguf"), "unknown --to 'gguf'; choose folder, merged, lora"),
        (("--to", "folder", "--records", "x.json"), "--to folder keeps it"),
        (("--to", "lora", "--edits", "nowhere"), "nowhere holds no edits"),
    ],
)
def test_what_the_command_refuses(embedded, tmp_path, changes, message):
    path, _ = embedded
    result = run("export", "testbed", "--edits", path / "edits", "--out", tmp_path / "out", *changes, "--json")
    assert result.exit_code == 1 and message in json.loads(result.stdout)["error"]
    assert nothing_but(tmp_path)


def test_a_base_of_other_words(embedded, tiny_model, tokenizer, tmp_path):
    path, _ = embedded
    tiny_model("llama").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    result = run("eval", "testbed", path / "records.json", "--base", tmp_path / "other", "--no-generate", "--answer-tokens", 0, "--json")
    assert result.exit_code == 1 and "its tokenizer is not that of testbed" in json.loads(result.stdout)["error"]
