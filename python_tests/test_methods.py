"""The baselines against closed forms and loops written plainly, and the interface that all methods share."""

import copy
import dataclasses
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_editor import TEXTS, ids_of, make_editor, random_values, relative, small_model, some_requests
from transformers.pytorch_utils import Conv1D

from comeba_ext import EditConfig, Editor, EditRequest, load_edits, methods, testbed
from comeba_ext.editing import session
from comeba_ext.errors import ArchitectureError, ConfigError, CovarianceError, RequestError
from comeba_ext.forward import half_compute
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.methods.ft import FTConfig
from comeba_ext.methods.settings import default_config, entry
from comeba_ext.methods.trained import FILE, save_learner
from comeba_ext.text.prefixes import sample_prefixes

NAMES = list(methods.method_names())
SINGLE = ("ROME", "R-ROME", "EMMET", "FT", "FT-L", "GRACE", "WISE", "MEMOIR")
LAYERS = dict.fromkeys(SINGLE, (1,))
TRAINED = {"lr": 0.01, "weight_decay": 0.0, "early_stop": 0.01}
SETTINGS = {
    "FT": TRAINED,
    "FT-L": TRAINED | {"norm_constraint": 0.02},
    "LoRA": {"lr": 0.01, "rank": 2},
    "UltraEdit": {"lr": 1e-2},
    "StableEdit": {"lr": 1e-2},
    "AlphaEdit": {"null_threshold": None, "null_share": 0.5, "ridge": 1.0},
    "BetaEdit": {"null_threshold": None, "null_share": 0.5, "ridge": 1.0, "preserve": 2.0, "refresh": 3},
    "GRACE": {"lr": 0.5, "steps": 20},
    "WISE": {"lr": 0.5, "low": 0.1, "high": 1.0, "margin_loss": 0.5, "threshold_share": 0.5},
    "MEMOIR": {"lr": 0.5, "irrelevant": 4},
    "MELO": {"lr": 0.05, "edits_per_block": 2, "blocks_in_all": 4},
    "KN": {"adaptive_threshold": 0.05},
    "MEND": {"edit_rate": 0.05, "rank": 8},
    "KE": {"hidden": 8, "condition": 6},
    "SERAC": {"rank": 2, "buckets": 64, "width": 4},
}
WITH_VALUES = [name for name in NAMES if methods.method_named(name).takes_values]
NO_SHARES = ("FT", "FT-L", "UltraEdit", "StableEdit", "WISE", "MEND", "KE", "LoRA")  # a single edit cannot be taken back


@pytest.fixture(autouse=True, scope="module")
def demonstrations(tmp_path_factory):
    """What IKE shows, in a file."""
    file = tmp_path_factory.mktemp("shown") / "shown.json"
    file.write_text(
        json.dumps(
            [
                {
                    "prompt": "The capital of {} is",
                    "subject": name,
                    "target_new": "Rome",
                    "rephrase_prompts": [f"{name}'s capital is"],
                    "locality_prompts": [["Water is", "wet"]],
                }
                for name in ("Peru", "Chad", "Oman")
            ]
        )
    )
    SETTINGS["IKE"] = {"demonstrations": str(file), "shown": 1}


def make_method(name, model, tokenizer, **changes):
    kind = methods.method_named(name)
    settings = {"layers": LAYERS.get(name, (1, 2)), "lam": 20.0, "prefixes": 2, "prefix_length": 4, "steps": 5, "lr": 0.1, "clamp": 2.0}
    editor = Editor(model, tokenizer, kind.config_class(**(settings | SETTINGS.get(name, {}) | changes)), method=name)
    if hasattr(kind, "learner") and editor.config.editor is None:
        object.__setattr__(editor.config, "editor", untrained(editor))
    editor.collect_covariance(TEXTS, tokens=10**6, progress=False)
    return editor


def untrained(editor):
    """Folder of an editor that has learned nothing yet."""
    folder = Path(tempfile.mkdtemp())
    save_learner(editor.method.new_learner(), folder / FILE, {"kind": "editor", "method": editor.method.name})
    return str(folder)


def given(editor, count, seed=0):
    """Target values, for methods that take any."""
    return {"target_values": random_values(count, seed=seed)} if editor.method.takes_values else {}


def requests_of(count):
    """With a prompt that is not to be touched, for methods that learn from one."""
    return [dataclasses.replace(request, locality_prompts=(("Water is", "wet"),)) for request in some_requests(count)]


def held(editor):
    """What a model's edits are kept in."""
    return {f"{name}.{what}": own.clone() for name, a in editor.method.attachments.items() for what, own in a.tensors().items()}


def assert_held(found, wanted, tolerance=0.0):
    assert set(found) == set(wanted)
    for name, own in wanted.items():
        assert found[name].shape == own.shape, name
        if name.endswith("packed"):
            ids = [
                [{k: v for k, v in fact.items() if k != "id"} for fact in json.loads(bytes(t.tolist()) or b"[]")]
                for t in (own, found[name])
            ]
            assert ids[0] == ids[1]
        elif own.is_floating_point() and tolerance and own.numel():
            own, other = own.double().nan_to_num(), found[name].double().nan_to_num()  # thresholds may be infinite
            assert (other - own).abs().max() <= tolerance * own.abs().max(), name
        else:
            assert torch.equal(found[name], own), name


def answers(editor, ids):
    """Logits behind a prompt; of in-context methods, behind what is asked instead."""
    rewrite = prompt_rewriter(editor.model)
    ids = ids if rewrite is None else torch.tensor([editor.tokenizer(rewrite(editor.tokenizer.decode(ids[0])))["input_ids"]])
    with torch.no_grad():
        return editor.model(ids).logits[:, -1]


# -- oracles --------------------------------------------------------------------------------------------------------


class Dense:
    """Weight-editing methods by literal loops: the model's own float64 weights are written, one text at a time."""

    def __init__(self, model, tokenizer, layers, prefixes, lam):
        self.model, self.tokenizer, self.layers, self.prefixes, self.lam = model, tokenizer, layers, prefixes, lam
        self.projections = {n: model.transformer.h[n].mlp.c_proj for n in layers}
        self.seen = {}
        for n, projection in self.projections.items():
            projection.register_forward_pre_hook(lambda m, args, n=n: self.seen.__setitem__(n, args[0][0]))
        last = model.transformer.h[layers[-1]]
        last.register_forward_hook(lambda m, a, out: self.seen.__setitem__("h", (out[0] if isinstance(out, tuple) else out)[0]))
        self.c0 = {}
        count = 0
        for text in TEXTS:
            self.run(text, 1)
            count += len(self.seen[layers[0]])
            for n in layers:
                self.c0[n] = self.c0.get(n, 0) + sum(torch.outer(k, k) for k in self.seen[n])
        self.c0 = {n: c / count for n, c in self.c0.items()}

    @torch.no_grad()
    def run(self, text, subject_end):
        tokens = self.tokenizer(text, return_offsets_mapping=True)
        self.model(torch.tensor([tokens["input_ids"]]))
        return max(i for i, (a, b) in enumerate(tokens["offset_mapping"]) if a < subject_end and b > a)

    def read(self, request, n):
        """Key averaged over prefixes, and key and value layer's state behind the empty one."""
        before, after = request.prompt.split("{}")
        keys = []
        for prefix in self.prefixes:
            head = prefix + before + request.subject
            last = self.run(head + after, len(head))
            keys.append(self.seen[n][last])
            if prefix == "":
                plain, hidden = keys[-1], self.seen["h"][last]
        return sum(keys) / len(keys), plain, hidden

    def write(self, n, change):
        with torch.no_grad():
            self.projections[n].weight += change.T  # Conv1D holds (d_in, d_out)

    def memit(self, requests, values, root=False):
        for number, n in enumerate(self.layers):
            left = len(self.layers) - number
            read = [self.read(r, n) for r in requests]
            K = torch.stack([k for k, _, _ in read], 1)
            R = torch.stack([(v - h) / (left**0.5 if root else left) for (_, _, h), v in zip(read, values, strict=True)], 1)
            self.write(n, R @ K.T @ torch.linalg.inv(self.lam * self.c0[n] + K @ K.T))

    def emmet(self, requests, values, ridge):
        (n,) = self.layers
        read = [self.read(r, n) for r in requests]
        K = torch.stack([k for k, _, _ in read], 1)
        R = torch.stack([v - h for (_, _, h), v in zip(read, values, strict=True)], 1)
        inverse = torch.linalg.inv(self.lam * self.c0[n])
        ridge = ridge if len(requests) > 1 else 0  # as the authors' code
        self.write(n, R @ torch.linalg.inv(K.T @ inverse @ K + ridge * torch.eye(len(requests))) @ K.T @ inverse)

    def alphaedit(self, requests, values, share, ridge, preserve=0.0, refresh=None, threshold=None):
        self.past = getattr(self, "past", {n: [] for n in self.layers})
        for number, n in enumerate(self.layers):
            read = [self.read(r, n) for r in requests]
            K = torch.stack([k for k, _, _ in read], 1)
            R = torch.stack([(v - h) / (len(self.layers) - number) for (_, _, h), v in zip(read, values, strict=True)], 1)
            past, moment = self.past[n], self.c0[n]
            seen = len(past) // refresh * refresh if refresh else 0
            if seen:
                moment = (sum(torch.outer(k, k) for k in past[:seen]) / seen + preserve * moment) / (preserve + 1)
            U, S, _ = torch.linalg.svd(moment)
            U = U[:, -round(share * len(S)) :] if threshold is None else U[:, threshold > S]
            P = U @ U.T
            kept = K @ K.T + sum(torch.outer(k, k) for k in past) + preserve * self.c0[n]
            self.write(n, torch.linalg.solve(P @ kept + ridge * torch.eye(len(P)), P @ K @ R.T).T)
            past += list(K.T)

    def r_rome(self, requests, values):
        """W k̄ = v* − (h − W k): what the mean key is to give, beside all else that the hidden state behind the prompt holds."""
        (n,) = self.layers
        for request, value in zip(requests, values, strict=True):
            mean, k, h = self.read(request, n)
            W = self.projections[n].weight.T
            u = torch.linalg.inv(self.c0[n]) @ mean
            self.write(n, torch.outer(value - (h - W @ k) - W @ mean, u) / (mean @ u))

    def rome(self, requests, values):
        (n,) = self.layers
        for request, value in zip(requests, values, strict=True):
            mean, k, h = self.read(request, n)
            u = torch.linalg.inv(self.c0[n]) @ mean
            self.write(n, torch.outer(value - h, u) / (k @ u))


@pytest.mark.parametrize(
    "name, procedure",
    [
        ("MEMIT", "memit"),
        ("PMET", "pmet"),
        ("ROME", "rome"),
        ("R-ROME", "r_rome"),
        ("EMMET", "emmet"),
        ("AlphaEdit", "alphaedit"),
        ("BetaEdit", "betaedit"),
    ],
)
def test_closed_forms(tiny_model, tokenizer, name, procedure):
    model = small_model(tiny_model).double()
    plain = copy.deepcopy(model)
    editor = make_method(name, model, tokenizer)
    oracle = Dense(plain, tokenizer, editor.config.layers, editor.prefixes, 20.0)
    start = {n: p.weight.detach().clone() for n, p in oracle.projections.items()}
    requests = some_requests(7)
    for number, size in enumerate((3, 1, 3)):
        batch, requests = requests[:size], requests[size:]
        values = random_values(size, seed=number)
        editor.edit(batch, target_values=values)
        if procedure in ("rome", "r_rome"):
            getattr(oracle, procedure)(batch, values)
        elif procedure == "emmet":
            oracle.emmet(batch, values, 0.1)
        elif procedure == "alphaedit":
            oracle.alphaedit(batch, values, 0.5, 1.0)
        elif procedure == "betaedit":
            oracle.alphaedit(batch, values, 0.5, 1.0, 2.0, 3)
        else:
            oracle.memit(batch, values, root=procedure == "pmet")
    for n, (layer, c0) in zip(editor.config.layers, zip(editor.layers.values(), oracle.c0.values(), strict=True), strict=True):
        assert relative(layer.delta, (oracle.projections[n].weight - start[n]).T) < 1e-8
        name = editor.architecture.projection_name(n)
        assert relative(editor.key_memory[name].matrix(), 20.0 * c0) < 1e-9  # nothing accumulates
    with torch.no_grad():
        ids = ids_of(model, tokenizer)
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "name, settings, sizes",
    [
        ("AlphaEdit", {"null_share": 0.3, "ridge": 3.0}, (3, 2)),
        ("BetaEdit", {"null_share": 0.3, "ridge": 3.0, "preserve": 2.0, "refresh": 3}, (4, 2)),  # refresh divides no batch
        ("BetaEdit", {"null_threshold": "median", "null_share": None, "preserve": 2.0, "refresh": 3}, (3, 2)),
        ("EMMET", {"ridge": 0.7}, (3, 2)),
    ],
)
def test_closed_forms_with_other_settings(tiny_model, tokenizer, name, settings, sizes):
    model = small_model(tiny_model).double()
    oracle = Dense(copy.deepcopy(model), tokenizer, (1,) if name == "EMMET" else (1, 2), [""], 20.0)
    if settings.get("null_threshold"):
        settings = settings | {"null_threshold": 1.01 * torch.linalg.eigvalsh(oracle.c0[1]).median().item()}
    editor = make_method(name, model, tokenizer, prefixes=0, **settings)
    start = {n: p.weight.detach().clone() for n, p in oracle.projections.items()}
    requests, config = some_requests(sum(sizes)), editor.config
    for number, size in enumerate(sizes):
        batch, requests = requests[:size], requests[size:]
        values = random_values(size, seed=number)
        editor.edit(batch, target_values=values)
        if name == "EMMET":
            oracle.emmet(batch, values, 0.7)
        else:
            oracle.alphaedit(batch, values, config.null_share, config.ridge, config.preserve, config.refresh, config.null_threshold)
    for n, layer in zip(config.layers, editor.layers.values(), strict=True):
        assert relative(layer.delta, (oracle.projections[n].weight - start[n]).T) < 1e-7


def test_a_new_covariance_has_a_new_null_space(tiny_model, tokenizer):
    editor = make_method("AlphaEdit", small_model(tiny_model).double(), tokenizer)
    editor.collect_covariance(TEXTS[len(TEXTS) // 2 :], tokens=10**6, progress=False)
    for name in editor.layers:
        vectors = torch.linalg.eigh(editor.method.covariance[name].double()).eigenvectors[:, :24]
        assert (editor.method.projectors[name][1].double() - vectors @ vectors.T).norm() < 1e-6


@pytest.mark.parametrize("undo", ["retract", "supersede"])
def test_betaedits_null_space_is_of_the_live_edits(tiny_model, tokenizer, tmp_path, undo):
    """What was taken back is not in it, as it is not in that of an editor which is made from the folder and finds it anew."""
    requests = some_requests(5)
    editor = make_method("BetaEdit", small_model(tiny_model).double(), tokenizer)  # refresh: 3
    editor.edit(requests[:3], target_values=random_values(3))
    editor.edit(requests[3:4], target_values=random_values(1, seed=1))
    if undo == "retract":
        editor.retract("edit-0")
    else:
        editor.edit([dataclasses.replace(requests[0], target_new="Lima", request_id=None)], target_values=random_values(1, seed=3))
    editor.save_pretrained(tmp_path / "edits")
    loaded = Editor.from_pretrained(small_model(tiny_model).double(), tokenizer, tmp_path / "edits")
    for one in (editor, loaded):
        one.edit(requests[4:], target_values=random_values(1, seed=2))
    for name in editor.layers:
        assert relative(loaded.layers[name].delta, editor.layers[name].delta) < 1e-6


def test_alphaedits_null_space_by_a_threshold(tiny_model, tokenizer):
    """What lies below it may be written to: in the middle of the spectrum, where every layer has another number of directions."""
    model = small_model(tiny_model).double()
    plain = copy.deepcopy(model)
    oracle = Dense(plain, tokenizer, (1, 2), [""], 20.0)
    spectra = {n: torch.linalg.eigvalsh(c0) for n, c0 in oracle.c0.items()}
    threshold = spectra[1].median().item() * 1.01
    below = {n: int((values < threshold).sum()) for n, values in spectra.items()}
    assert len(set(below.values())) == 2 and all(8 < count < 40 for count in below.values())
    editor = make_method("AlphaEdit", model, tokenizer, prefixes=0, null_threshold=threshold, null_share=None, ridge=1.0)
    start = {n: p.weight.detach().clone() for n, p in oracle.projections.items()}
    requests = some_requests(5)
    for number, batch in enumerate((requests[:3], requests[3:])):
        values = random_values(len(batch), seed=number)
        editor.edit(batch, target_values=values)
        oracle.alphaedit(batch, values, None, 1.0, threshold=threshold)
    for n, layer in zip((1, 2), editor.layers.values(), strict=True):
        assert relative(layer.delta, (oracle.projections[n].weight - start[n]).T) < 1e-8
        upper = torch.linalg.svd(oracle.c0[n]).U[:, : 48 - below[n]]
        assert (layer.delta @ upper).norm() < 1e-8 * layer.delta.norm()  # nothing is written above it


@pytest.mark.parametrize("prefixes", [0, 5])
def test_rome_meets_its_constraint(tiny_model, tokenizer, prefixes):
    """``W k = v*`` for the request edited last (equation 2), behind the prompt alone."""
    editor = make_method("ROME", small_model(tiny_model).double(), tokenizer, prefixes=prefixes)
    requests, values = some_requests(2), random_values(2)
    editor.edit(requests, target_values=values)
    oracle = Dense(editor.model, tokenizer, (2,), [""], 1.0)  # reads only; another block's key is not looked at
    end = requests[1].prompt.index("{}") + len(requests[1].subject)
    caught = []
    editor.model.transformer.h[1].register_forward_hook(lambda m, a, out: caught.append((out[0] if isinstance(out, tuple) else out)[0]))
    last = oracle.run(requests[1].text, end)
    assert torch.allclose(caught[-1][last], values[1], atol=1e-8)


@pytest.mark.parametrize("bound, chunk", [(None, None), (0.02, None), (None, 1), (0.02, 2)])
def test_fine_tuning_is_the_plain_loop(tiny_model, tokenizer, bound, chunk):
    model = small_model(tiny_model).double()
    plain = copy.deepcopy(model)
    name = "FT" if bound is None else "FT-L"
    # Rows that do not fit one pass: the gradient is still that of the whole batch.
    editor = make_method(name, model, tokenizer, steps=6, max_tokens=24, chunk=chunk)
    weight = plain.transformer.h[1].mlp.c_proj.weight
    first = weight.detach().clone()
    requests = some_requests(5)
    requests[0] = EditRequest(requests[0].prompt, requests[0].subject, "Warsaw, the capital of Angola")
    for batch in (requests[:3], requests[3:]):
        report = editor.edit(batch)
        optimiser = torch.optim.Adam([weight], lr=0.01)
        start = weight.detach().clone()
        for step in range(7):
            losses = []
            for n, request in enumerate(batch):
                prompt = tokenizer(request.text)["input_ids"]
                ids = torch.tensor([tokenizer(f"{request.text} {request.target_new}")["input_ids"]])
                log_p = plain(ids).logits[0].log_softmax(-1)
                losses.append(-sum(log_p[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1])) / (ids.shape[1] - len(prompt)))
                full = n + 1 == len(batch) or (n + 1) % (chunk or len(batch)) == 0
                if full and step < 6:
                    of_chunk = losses[n // (chunk or len(batch)) * (chunk or len(batch)) :]
                    if sum(of_chunk) / len(of_chunk) < 0.01:
                        continue
                    optimiser.zero_grad()
                    (sum(of_chunk) / len(of_chunk)).backward()
                    optimiser.step()
                    if bound is not None:
                        weight.data = start + (weight.data - start).clamp(-bound, bound)
            if sum(losses) / len(losses) < 0.01:
                break
        assert report.losses == pytest.approx([loss.item() for loss in losses], rel=1e-6)
        assert report.optimizer_steps == [step] * len(batch)
    (layer,) = editor.layers.values()
    assert relative(layer.delta, (weight - first).T) < 1e-6
    if bound is not None:
        assert (layer.delta.abs() > bound).any() and layer.delta.abs().max() <= 2 * bound + 1e-12  # two batches


@pytest.mark.parametrize("name", ["FT", "FT-L", "LoRA", "GRACE", "WISE", "MEMOIR", "MELO"])
def test_products_in_bfloat16_behind_what_is_trained(tiny_model, tokenizer, monkeypatch, name):
    """Behind the last layer that is trained, and nowhere else; close to float32, and the model is as before."""
    made, multiplied, product = [], set(), half_compute._product

    def noting(module, dtype):
        forward = product(module, dtype)
        made.append(dtype)
        return lambda x: (multiplied.add(module.weight.data_ptr()), forward(x))[1]  # of the editor's twin, which shares weights

    def sampled(*how):  # context prefixes are what the model itself writes
        assert not made
        return sample_prefixes(*how)

    monkeypatch.setattr(half_compute, "_product", noting)
    monkeypatch.setattr(session, "sample_prefixes", sampled)
    reports, held_by = [], []
    for dtype in (None, "bfloat16"):
        editor = make_method(name, small_model(tiny_model), tokenizer, compute_dtype=dtype, early_stop=1e-9)
        assert not made
        reports.append(editor.edit(requests_of(3)))
        held_by.append(held(editor))
    model = editor.model
    behind = [m for block in model.transformer.h[editor.config.layers[-1] + 1 :] for m in block.modules() if isinstance(m, Conv1D)]
    assert multiplied == {m.weight.data_ptr() for m in (*behind, model.lm_head)} and set(made) == {torch.bfloat16}
    assert reports[1].losses == pytest.approx(reports[0].losses, rel=0.05, abs=0.05)
    assert any(not torch.equal(own, held_by[1][name]) for name, own in held_by[0].items())
    assert all("forward" not in vars(m) for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("scope, alpha", [("reference", -torch.inf), ("always", None)])
def test_without_hooks_is_the_editor_with_every_token_in_scope(tiny_model, tokenizer, scope, alpha):
    open_ = make_editor(small_model(tiny_model).double(), tokenizer, alpha=alpha, scope=scope)
    ablation = make_method("COMEBA without hooks", small_model(tiny_model).double(), tokenizer, scope=scope)
    for n in range(3):
        batch = some_requests(6)[2 * n : 2 * n + 2]
        for editor in (open_, ablation):
            editor.edit(batch, target_values=random_values(2, seed=n))
    for name, layer in ablation.layers.items():
        assert relative(layer.delta, open_.layers[name].delta) < 1e-9
        assert layer.mode == "temporary"
    ids = ids_of(open_.model, tokenizer)
    with torch.no_grad():
        assert torch.allclose(open_.model(ids).logits, ablation.model(ids).logits, atol=1e-9)


# -- the interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_edit_go_on_disable_and_roll_back(tiny_model, tokenizer, name):
    model = small_model(tiny_model)
    ids = ids_of(model, tokenizer)
    with torch.no_grad():
        untouched = model(ids).logits
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    editor = make_method(name, model, tokenizer)
    requests, start = requests_of(5), held(editor)
    states = []
    for n in range(2):
        report = editor.edit(requests[2 * n : 2 * n + 2], **given(editor, 2, n))
        assert report.step == n + 1 and len(report.losses) == (0 if given(editor, 1) or name in ("ICE", "IKE", "KN", "SERAC") else 2)
        states.append(held(editor))
        with editor.disabled(), torch.no_grad():
            assert torch.equal(model(ids).logits, untouched)
    assert any(not torch.equal(own, states[0][key]) for key, own in states[1].items() if own.shape == states[0][key].shape) or (
        {key: own.shape for key, own in states[1].items()} != {key: own.shape for key, own in states[0].items()}
    )
    found = dict(model.state_dict())
    for key, value in weights.items():
        assert torch.equal(found.get(key, found.get(key.replace("c_proj.", "c_proj.base_layer."))), value)
    editor.rollback(1)
    assert_held(held(editor), states[0], 1e-4)
    again = editor.edit(requests[2:4], **given(editor, 2, 1))  # goes on as if the later step had never been
    assert again.step == 2
    assert_held(held(editor), states[1], 1e-3)
    editor.rollback(0)
    assert_held(
        {k: v for k, v in held(editor).items() if not k.endswith("centre")}, {k: v for k, v in start.items() if not k.endswith("centre")}
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, untouched)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(tiny_model, tokenizer, tmp_path, name):
    editor = make_method(name, small_model(tiny_model), tokenizer)
    requests = requests_of(4)
    editor.edit(requests[:2], **given(editor, 2))
    editor.save_pretrained(tmp_path / "edits")
    loaded = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    assert type(loaded.method) is methods.method_named(name) and loaded.config == editor.config
    used = load_edits(small_model(tiny_model), tmp_path / "edits")
    for request in requests[:2]:
        ids = ids_of(used, tokenizer, request.text)
        expected = answers(editor, ids)
        assert torch.equal(answers(loaded, ids), expected)
        assert torch.allclose(answers(SimpleNamespace(model=used, tokenizer=tokenizer), ids), expected, atol=1e-4)
    for each in (editor, loaded):
        each.edit(requests[2:], **given(each, 2, 1))
    assert_held(held(loaded), held(editor))
    loaded.rollback(1)
    editor.rollback(1)
    assert_held(held(loaded), held(editor), 1e-6)
    for line in (tmp_path / "edits").glob("*.jsonl"):
        assert "Infinity" not in line.read_text() or name == "COMEBA-HK"


@pytest.mark.parametrize("name", NAMES)
def test_autocast(tiny_model, tokenizer, name):
    """The same edits, as close as half precision comes."""
    editor = make_method(name, small_model(tiny_model), tokenizer)
    requests = requests_of(2)
    editor.edit(requests, **given(editor, 2))
    for request in requests:
        ids = ids_of(editor.model, tokenizer, request.text)
        live = answers(editor, ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert (answers(editor, ids) - live).abs().max() < 0.05 * live.abs().max()


def offloaded(model, folder):
    """Two blocks on disk, as accelerate does it: their weights are there for the time of their pass."""
    accelerate = pytest.importorskip("accelerate")
    places = {**dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")}
    places |= {f"transformer.h.{n}": "disk" if n in (1, 2) else "cpu" for n in range(4)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_whose_blocks_are_on_disk(tiny_model, tokenizer, tmp_path, name):
    """Edited, and loaded with edits, as one that is in memory: the logits are its, bit for bit."""
    whole = make_method(name, small_model(tiny_model), tokenizer)
    placed = make_method(name, offloaded(small_model(tiny_model), tmp_path / "one"), tokenizer)
    requests = requests_of(2)
    for editor in (whole, placed):
        editor.edit(requests, **given(editor, 2))
    whole.save_pretrained(tmp_path / "edits")
    loaded, moved = (
        load_edits(model, tmp_path / "edits") for model in (small_model(tiny_model), offloaded(small_model(tiny_model), tmp_path / "two"))
    )
    for request in requests:
        ids = ids_of(whole.model, tokenizer, request.text)
        assert torch.allclose(answers(placed, ids), answers(whole, ids), atol=1e-5)
        of = lambda model, ids=ids: answers(SimpleNamespace(model=model, tokenizer=tokenizer), ids)  # noqa: E731
        assert torch.equal(of(moved), of(loaded))


@pytest.mark.parametrize("name", ["COMEBA-HK", "GRACE", "SERAC"])
def test_a_model_whose_embeddings_are_offloaded(tiny_model, tokenizer, name):
    """With all the rest: there is no weight that says where token ids go."""
    accelerate = pytest.importorskip("accelerate")
    whole = make_method(name, small_model(tiny_model), tokenizer)
    placed = make_method(name, accelerate.cpu_offload(small_model(tiny_model), torch.device("cpu")), tokenizer)
    requests = requests_of(2)
    for editor in (whole, placed):
        editor.edit(requests, **given(editor, 2))
    ids = ids_of(whole.model, tokenizer, requests[0].text)
    assert torch.allclose(answers(placed, ids), answers(whole, ids), atol=1e-5)


class Packed(torch.nn.Module):
    """A linear layer as quantisers keep it: no weight by that name."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scale = weight.abs().max().item() / 127
        self.register_buffer("qweight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("name, settings", [*((name, {}) for name in NAMES), ("GRACE", {"warm": True})])
def test_a_model_whose_layers_are_quantised(tiny_model, tokenizer, name, settings):
    model = small_model(tiny_model, "llama")
    for n in (1, 2):
        block = model.model.layers[n].mlp
        block.down_proj = Packed(block.down_proj.weight.detach())
    editor = make_method(name, model, tokenizer, **settings)
    requests = requests_of(2)
    ids = ids_of(model, tokenizer, requests[0].text)
    before = answers(editor, ids)
    editor.edit(requests, **given(editor, 2))
    assert name in ("SERAC", "KE", "KN") or not torch.equal(answers(editor, ids), before)  # untrained, or no neuron found


@pytest.mark.parametrize("name", ["COMEBA-HK", "GRACE", "SERAC"])
def test_a_method_that_fails_as_it_starts_leaves_nothing(tiny_model, tokenizer, name, monkeypatch):
    model = small_model(tiny_model)
    ids, kind = ids_of(model, tokenizer, some_requests(1)[0].text), methods.method_named(name)
    start, modules, listeners = model(ids).logits, list(dict(model.named_modules())), len(model.transformer._forward_hooks)

    def fail(self, session):
        super(kind, self).__init__(session)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__init__", fail)
        with pytest.raises(MemoryError):
            make_method(name, model, tokenizer)
        assert list(dict(model.named_modules())) == modules and len(model.transformer._forward_hooks) == listeners
        assert torch.equal(model(ids).logits, start)
    editor = make_method("GRACE", model, tokenizer)
    with pytest.raises(ArchitectureError, match="already"):  # it was there before: it stays
        make_method(name, model, tokenizer)
    editor.edit(some_requests(1))
    assert not torch.equal(model(ids).logits, start)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_changes_nothing(tiny_model, tokenizer, name, monkeypatch):
    editor = make_method(name, small_model(tiny_model), tokenizer)
    requests = requests_of(3)
    editor.edit(requests[:1], **given(editor, 1))
    before = held(editor)
    monkeypatch.setattr(type(editor.method), "answered", lambda *_: 1 / 0)  # the last thing of a step
    with pytest.raises(ZeroDivisionError):
        editor.edit(requests[1:], **given(editor, 2))
    monkeypatch.undo()
    assert_held(held(editor), before)
    assert editor.step == 1 and len(editor.ledger) == 1
    if name in WITH_VALUES:
        with pytest.raises(RequestError):
            editor.edit(requests[1:], target_values=torch.full((2, 32), 1e300, dtype=torch.float64))
        assert_held(held(editor), before)
        assert all(layer.mode == ("validated" if "HK" in name else "temporary") for layer in editor.layers.values())


def test_fine_tuning_that_diverges_changes_nothing(tiny_model, tokenizer):
    editor = make_method("FT", small_model(tiny_model), tokenizer)
    requests = some_requests(3)
    editor.edit(requests[:1])
    before = held(editor)
    object.__setattr__(editor.config, "lr", 1e37)
    with pytest.raises(RequestError, match="diverged"):
        editor.edit(requests[1:])
    assert_held(held(editor), before)


@pytest.mark.parametrize("name", NAMES)
def test_taking_a_single_edit_back(tiny_model, tokenizer, name):
    editor = make_method(name, small_model(tiny_model).double(), tokenizer)
    first, second, third = requests_of(3)
    editor.edit([first, second], **given(editor, 2))
    if name in NO_SHARES:
        with pytest.raises(RequestError, match="rollback"):
            editor.retract("edit-0")
        assert editor.step == 1
        return
    editor.retract("edit-0")
    report = editor.edit(
        [EditRequest(second.prompt, second.subject, "Warsaw", locality_prompts=second.locality_prompts)], **given(editor, 1, 1)
    )
    assert report.superseded == ["edit-1"] and [entry.request.target_new for entry in editor.ledger.live()] == ["Warsaw"]
    editor.edit([third], **given(editor, 1, 2))
    editor.rollback(2)
    alone = make_method(name, small_model(tiny_model).double(), tokenizer)
    alone.edit([first, second], **given(alone, 2))
    alone.retract("edit-0")
    assert_held(held(editor), held(alone), 1e-6)


@pytest.mark.parametrize("name", ["MEMIT", "PMET", "ROME", "R-ROME", "EMMET", "AlphaEdit"])
def test_retraction_and_superseding_take_the_share_out(tiny_model, tokenizer, name):
    editor = make_method(name, small_model(tiny_model).double(), tokenizer)
    first, second = some_requests(2)
    editor.edit([first], target_values=random_values(1))
    alone = {key: layer.delta.clone() for key, layer in editor.layers.items()}
    editor.edit([second], target_values=random_values(1, seed=1))
    editor.retract("edit-1")
    for key, layer in editor.layers.items():
        assert relative(layer.delta, alone[key]) < 1e-6
    report = editor.edit([EditRequest(first.prompt, first.subject, "Warsaw")], target_values=random_values(1, seed=2))
    assert report.superseded == ["edit-0"]
    fresh = make_method(name, small_model(tiny_model).double(), tokenizer)
    fresh.edit([EditRequest(first.prompt, first.subject, "Warsaw")], target_values=random_values(1, seed=2))
    for key, layer in editor.layers.items():
        assert relative(layer.delta, fresh.layers[key].delta) < 1e-5
    editor.rollback(1)
    for key, layer in editor.layers.items():
        assert relative(layer.delta, alone[key]) < 1e-6


def test_what_fine_tuning_cannot_do(tiny_model, tokenizer, monkeypatch):
    editor = make_method("FT", small_model(tiny_model), tokenizer, steps=1)
    with pytest.raises(RequestError, match="no target values"):
        editor.edit(some_requests(1), target_values=random_values(1))
    with pytest.raises(RequestError, match="no target values"):
        editor.target_values(some_requests(1))
    monkeypatch.setattr("comeba_ext.methods.snapshots.KEPT", 2)
    for request in some_requests(4):
        report = editor.edit([request])
    with pytest.raises(RequestError, match="rollback"):
        editor.retract(report.request_ids)
    with pytest.raises(RequestError, match=r"\[0, 3\]"):
        editor.rollback(1)
    assert editor.step == 4
    editor.rollback(3)
    editor.rollback(0)
    for request in some_requests(2):  # what was made before the rollback is no step any more
        editor.edit([request])
    editor.rollback(1)


def test_states_that_a_rollback_can_reach_are_bounded_in_memory(tiny_model, tokenizer, monkeypatch):
    """The latest two are there whatever they take; a matrix before any edit takes nothing."""
    editor = make_method("FT", small_model(tiny_model), tokenizer)
    size = sum(layer.delta.nbytes for layer in editor.layers.values())
    bytes_of = lambda kept: sum({own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in kept}.values())  # noqa: E731
    assert bytes_of(editor.method.first[0].values()) < 100
    for bound, reached in ((3 * size + 100, [0, 3, 4]), (size, [0, 4])):
        monkeypatch.setattr("comeba_ext.methods.snapshots.KEPT_BYTES", bound)
        editor.rollback(0)
        for request in some_requests(5):
            editor.edit([request])
        kept = [own for state, _ in editor.method.kept.values() for own in state.values()]
        assert bytes_of(kept) <= max(bound, 2 * size + 100)
        with pytest.raises(RequestError, match=re.escape(str(reached))):
            editor.rollback(1)
        before = {name: layer.delta.clone() for name, layer in editor.layers.items()}
        editor.rollback(4)
        assert any(not torch.equal(layer.delta, before[name]) for name, layer in editor.layers.items())
        editor.rollback(0)
        assert not any(layer.delta.any() for layer in editor.layers.values())


def test_fine_tuning_rolls_back_to_the_step_that_was_loaded(tiny_model, tokenizer, tmp_path):
    editor = make_method("FT", small_model(tiny_model), tokenizer)
    first, second = some_requests(2)
    editor.edit([first])
    before = next(iter(editor.layers.values())).delta.clone()
    editor.save_pretrained(tmp_path / "edits")
    loaded = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    loaded.edit([second])
    loaded.rollback(1)
    (layer,) = loaded.layers.values()
    assert before.any() and torch.equal(layer.delta, before)


def test_settings_of_fine_tuning(tiny_model, tokenizer):
    assert FTConfig(layers=(0,)).weight_decay == 0 and FTConfig(layers=(0,)).lr < 0.01  # a weight's, not a target value's
    for wrong, words in (({"chunk": 0}, "chunk"), ({"lr_unit": "hidden_rms"}, "absolute"), ({"norm_constraint": -1}, "norm_constraint")):
        with pytest.raises(ConfigError, match=words):
            FTConfig(layers=(0,), **wrong)
    with pytest.raises(ConfigError, match="norm_constraint"):
        Editor(small_model(tiny_model), tokenizer, FTConfig(layers=(1,)), method=methods.FTL)


@pytest.mark.parametrize("name", SINGLE)
def test_one_layer_only(tiny_model, tokenizer, name):
    model = small_model(tiny_model)
    with pytest.raises(ConfigError, match="one layer"):
        Editor(
            model,
            tokenizer,
            methods.method_named(name).config_class(layers=(1, 2), **({"norm_constraint": 1.0} if name == "FT-L" else {})),
            method=name,
        )
    Editor(model, tokenizer, EditConfig(layers=(1,)))  # the model was left unhooked


# -- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_defaults_for_every_model(tiny_model, tokenizer, name):
    model = small_model(tiny_model)
    needs = {"demonstrations": SETTINGS["IKE"]["demonstrations"]} if name == "IKE" else {}
    config = default_config(name, model, **needs)
    assert type(config) is methods.method_named(name).config_class
    assert Editor(model, tokenizer, config if needs else None, method=name).config == config
    assert default_config(name, testbed.load()[0], lam=7.0).lam == 7.0
    for shape in (("gpt2", 48), ("gptj", 28), ("llama", 32), ("qwen2", 5)):
        found = entry(methods.method_named(name), type("Config", (), dict(zip(("model_type", "num_hidden_layers"), shape, strict=True))))
        assert found["source"] and set(found) == {"match", "source", "settings"}
        methods.method_named(name).config_class.from_dict({"layers": [0], **{k: v for k, v in found["settings"].items() if k != "layers"}})


def test_a_method_whose_needs_are_not_met(tiny_model, tokenizer, tmp_path):
    """One clear error, and the model as it was."""
    model = small_model(tiny_model)
    with pytest.raises(ConfigError, match="give 'demonstrations'"):
        Editor(model, tokenizer, method="IKE")
    (tmp_path / "none.json").write_text("[{}]")
    editor = Editor(model, tokenizer, methods.default_config("IKE", model, demonstrations=str(tmp_path / "none.json")), method="IKE")
    for needing in (editor.method.ready, lambda: editor.edit(some_requests(1))):
        with pytest.raises(ConfigError, match="no usable record"):
            needing()
    assert editor.step == 0
    editor.close()
    with pytest.raises(ConfigError, match="takes settings of GraceConfig"):
        Editor(model, tokenizer, EditConfig(layers=(1,)), method="GRACE")
    with pytest.raises(ConfigError, match="has no 'transformer.h.1.mlp.gate'"):
        Editor(model, tokenizer, methods.default_config("UltraEdit", model, modules={"mlp.gate": [1]}), method="UltraEdit")
    editor = Editor(model, tokenizer, method="AlphaEdit")  # the failures before left nothing in the model
    with pytest.raises(CovarianceError, match="no covariance yet"):
        editor.edit(some_requests(1))
    with pytest.raises(ArchitectureError, match="edited already"):
        Editor(model, tokenizer, method="GRACE")
    editor.close()
    editor = make_method("WISE", model, tokenizer)
    before = held(editor)
    with pytest.raises(RequestError, match="no locality prompt"):
        editor.edit(some_requests(1))
    assert_held(held(editor), before)
    editor.close()
    with pytest.raises(CovarianceError, match="give null_share instead"):
        make_method("AlphaEdit", model, tokenizer, null_threshold=1e-9, null_share=None)


def test_edits_are_taken_back_without_demonstrations(tiny_model, tokenizer, tmp_path):
    shown = tmp_path / "shown.json"
    shown.write_bytes(Path(SETTINGS["IKE"]["demonstrations"]).read_bytes())
    editor = make_method("IKE", small_model(tiny_model), tokenizer, demonstrations=str(shown))
    editor.edit(some_requests(2))
    editor.save_pretrained(tmp_path / "edits")
    shown.unlink()
    for taking_back in (lambda own: own.rollback(0), lambda own: own.retract([e.request.request_id for e in own.ledger.live()])):
        again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
        with pytest.raises(ConfigError, match="shown.json"):
            again.edit(some_requests(3)[2:])
        assert prompt_rewriter(again.model)("The capital of Norway is") != "The capital of Norway is"
        taking_back(again)
        assert prompt_rewriter(again.model)("The capital of Norway is") == "The capital of Norway is"


def test_names():
    assert methods.method_named("comeba-hk") is methods.ComebaHK
    assert methods.method_named("COMEBA without hooks") is methods.method_named("memit-seq") is methods.WithoutHooks
    assert methods.method_named("ft-l") is methods.method_named("FTL") is methods.FTL
    with pytest.raises(ConfigError, match="unknown method .HORSE.*MEMIT-seq"):
        methods.method_named("HORSE")
    with pytest.raises(ConfigError, match="norm_constraint"):
        FTConfig(layers=(1,), norm_constraint=-1)
    json.dumps(FTConfig(layers=(1,)).to_dict())


@pytest.mark.parametrize(
    "name, field, wrong",
    [
        ("GRACE", "radius", [0, -1.0, float("nan"), True, "1"]),
        ("GRACE", "warm", [1, None]),
        ("WISE", "mask_ratio", [0, 1.5, None]),
        ("WISE", "save_every", [0, 2.5, True]),
        ("MEMOIR", "overlap", [0, 1.1]),
        ("AlphaEdit", "refresh", [0, 1.5]),
        ("AlphaEdit", "preserve", [-1, float("inf")]),
        ("EMMET", "ridge", [-0.1, None]),
        ("FT", "norm_constraint", [0, "x"]),
        ("IKE", "demonstrations", [3]),
        ("UltraEdit", "whiten", [1, None, "yes"]),
        ("UltraEdit", "modules", [{"mlp": []}, {"mlp": [-1]}, {3: [1]}, "mlp"]),
    ],
)
def test_settings_out_of_range(name, field, wrong):
    kind = methods.method_named(name).config_class
    for value in wrong:
        with pytest.raises(ConfigError, match=field):
            kind(layers=(1,), **{field: value})
