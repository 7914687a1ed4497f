"""Methods that are trained: MEND against literal formulas, episodes, and a training that is killed, diverges, or is of something else."""

import copy
import dataclasses
import json
import random
import threading
import zlib

import accelerate
import numpy as np
import pytest
import torch
from test_cli import output, run
from test_editor import ids_of, small_model, some_requests
from test_methods import assert_held, held, make_method, requests_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from comeba_ext import Editor, EditRequest, load_edits, testbed
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.experiments.table import cell
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.methods import method_named
from comeba_ext.methods.knowledge_editor import KnowledgeEditorConfig
from comeba_ext.methods.mend import MendConfig, Transform
from comeba_ext.methods.row_passes import LowerStates
from comeba_ext.methods.serac import MARK, Scope, SeracConfig, encode, features, stated
from comeba_ext.methods.settings import default_config
from comeba_ext.methods.trained import FILE, save_learner
from comeba_ext.storage import read_tensors, write_tensors
from comeba_ext.text.episodes import Episode, episodes_of
from comeba_ext.text.rows import answer_rows
from comeba_ext.training import TrainConfig, Trainer
from comeba_ext.training import trainer as training

pytestmark = pytest.mark.usefixtures("undrawn")
SETTINGS = {"layers": (1, 2), "edit_rate": 0.03, "rank": 6}


def mend(tiny_model, tokenizer, double=False, **changes):
    model = small_model(tiny_model)
    return Editor(model.double() if double else model, tokenizer, MendConfig(**(SETTINGS | changes)), method="MEND")


def nll(model, tokenizer, prompt, target):
    """Mean over the target's tokens, of a plain model."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {target}"))
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, whole[i]] for i in range(len(before), len(whole))) / (len(whole) - len(before))


def long_targets(count):
    """Of several tokens."""
    return [EditRequest(r.prompt, r.subject, f"{r.target_new}, the capital of Angola") for r in some_requests(count)]


# -- what is run again and again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_states_below_the_first_block_that_differs(tiny_model, tokenizer, family, monkeypatch):
    """As whole rows, padded beside others, also after blocks from it on have changed; no more is kept than there is room for."""
    model = tiny_model(family).double()
    session = make_method("MEND", model, tokenizer, layers=(1,)).session
    rows = answer_rows(tokenizer, [(r.text, r.target_new) for r in long_targets(3)] + [("Water is", "wet")])
    room = 8 * 32 * (len(rows[0].ids) + len(rows[1].ids))
    monkeypatch.setattr("comeba_ext.methods.row_passes.KEPT", room)
    lower = LowerStates(session, 1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in session.blocks[1].parameters():
                parameter.mul_(1.1)
            for found, expected in zip(lower.logits(rows), session.logits(rows), strict=True):
                assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert [tuple(row.ids) for row in rows[:2]] == list(lower.kept) and sum(state.nbytes for state in lower.kept.values()) == room


# -- MEND -----------------------------------------------------------------------------------------------------------


def test_mend_that_has_learned_nothing_is_a_gradient_step(tiny_model, tokenizer):
    """Batch after batch: of the sum of the requests' losses, at the weights as they are by then."""
    plain, model = small_model(tiny_model).double(), small_model(tiny_model).double()
    editor = make_method("MEND", model, tokenizer, **SETTINGS)
    requests = long_targets(5)
    for batch in (requests[:3], requests[3:]):
        editor.edit(batch)
        weights = [plain.transformer.h[n].mlp.c_proj.weight for n in (1, 2)]
        loss = sum(nll(plain, tokenizer, r.text, r.target_new) for r in batch)
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.03 * gradient
        for name, layer in editor.layers.items():
            written = plain.get_submodule(name).weight - layer.weight  # (d_in, d_out), as Conv1D holds it
            assert torch.allclose(layer.delta.mT, written, rtol=1e-4, atol=1e-6 * written.abs().max().item())


@pytest.mark.parametrize("name", ["MEND", "KE"])
def test_losses_are_those_of_the_model_that_answers(tiny_model, tokenizer, name):
    """Not of its training mode, in which some activations are dropped."""
    losses = [make_method(name, small_model(tiny_model).train(mode), tokenizer).edit(long_targets(2)).losses for mode in (True, False)]
    assert losses[0] == losses[1]


def test_the_network_is_its_equation():
    """Equation 3, a token at a time, in numpy; normalised by the mean and spread of what was noted."""
    torch.manual_seed(0)
    network = Transform(10, 2, 3)
    for parameter in network.parameters():
        parameter.data.normal_()
    seen = torch.randn(3, 7, 10) * 3 + 1
    for part in seen:
        network.note(1, part)
    z = torch.randn(5, 10)
    flat = seen.reshape(-1, 10).double().numpy()
    get = lambda tensor: tensor.detach().double().numpy()  # noqa: E731
    for token, found in zip(z, network(1, z), strict=True):
        x = (get(token) - flat.mean(0)) / flat.std(0, ddof=1)
        for n in range(2):
            inner = get(network.up[n]) @ (get(network.down[n]) @ x) + (get(network.bias) if n == 0 else 0)
            x = x + np.maximum(get(network.scale[n][1]) * inner + get(network.offset[n][1]), 0)
        assert np.allclose(get(found), x, atol=1e-4)
    for token, found in zip(z, Transform(10, 2, 3)(0, z), strict=True):
        assert torch.equal(found, token)  # the identity at the start


def test_mends_loss_is_that_of_the_edited_model(tiny_model, tokenizer):
    """c_edit times the NLL of the edits and of their other wordings, plus KL(edited ‖ unedited) behind unrelated prompts."""
    editor = mend(tiny_model, tokenizer)
    learner = editor.method.new_learner().eval()
    requests = long_targets(3)
    episodes = [Episode(r, f"Really, {r.text}", (f"Water {n} is", "wet and cold")) for n, r in enumerate(requests)]
    loss, parts = learner(episodes)
    plain = small_model(tiny_model)
    edited = copy.deepcopy(plain)
    weights = [edited.transformer.h[n].mlp.c_proj.weight for n in (1, 2)]
    gradients = torch.autograd.grad(sum(nll(edited, tokenizer, r.text, r.target_new) for r in requests), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.data -= 0.03 * gradient
    edit = [nll(edited, tokenizer, text, e.request.target_new) for e in episodes for text in (e.request.text, e.wording)]
    far = []
    for prompt, answer in (e.unrelated for e in episodes):
        before, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {answer}"))
        new, old = (m(torch.tensor([whole])).logits[0].log_softmax(-1) for m in (edited, plain))
        places = range(len(before) - 1, len(whole) - 1)
        far.append(sum(F.kl_div(new[i], old[i], reduction="sum", log_target=True) for i in places) / len(places))
    assert parts["edit"] == pytest.approx(sum(edit).item() / 6, rel=1e-4)
    assert parts["locality"] == pytest.approx(sum(far).item() / 3, rel=1e-3)
    assert loss.item() == pytest.approx(0.1 * parts["edit"] + parts["locality"], rel=1e-6)
    shares = learner.measure(episodes[0])
    assert set(shares) == {"loss", "reliability", "generality", "locality"} and all(0 <= shares[n] <= 1 for n in list(shares)[1:])


def test_mends_gradient_is_the_differences_quotient(tiny_model, tokenizer):
    learner = mend(tiny_model, tokenizer).method.new_learner().eval()
    with torch.no_grad():
        for parameter in learner.networks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    episodes = [Episode(r, r.text, ("Water is", "wet")) for r in long_targets(2)]
    learner(episodes)[0].backward()
    for parameter in (learner.rates, learner.networks[0].offset[0], learner.networks[0].up[1]):
        way = parameter.grad / parameter.grad.norm()
        assert parameter.grad.norm() > 0
        step, sides = 1e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * way)
                sides.append(learner(episodes)[0].item())
                parameter.sub_(sign * step * way)
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(parameter.grad.norm().item(), rel=0.05)


def test_mend_needs_an_editor_that_fits(tiny_model, tokenizer, tmp_path):
    requests = requests_of(2)
    bare = mend(tiny_model, tokenizer)
    with pytest.raises(ConfigError, match="comeba train MEND"):
        bare.edit(requests)
    assert bare.step == 0
    folder = make_method("MEND", small_model(tiny_model), tokenizer, **SETTINGS).config.editor
    assert default_config("MEND", small_model(tiny_model), editor=folder).rank == 6  # as it was trained
    for changes, words in (({"rank": 5}, "shape"), ({"layers": (1, 3)}, "was trained for other layers")):
        with pytest.raises(StorageError, match=words):
            mend(tiny_model, tokenizer, editor=folder, **changes).edit(requests)
    with pytest.raises(StorageError, match="another model"):
        Editor(small_model(tiny_model, seed=5), tokenizer, MendConfig(**SETTINGS, editor=folder), method="MEND").edit(requests)
    tensors, about = read_tensors(f"{folder}/{FILE}")
    write_tensors(tmp_path / FILE, {**tensors, "rates": tensors["rates"] * torch.nan}, about)
    with pytest.raises(StorageError, match="NaN"):
        mend(tiny_model, tokenizer, editor=str(tmp_path)).edit(requests)
    write_tensors(tmp_path / FILE, tensors, {**about, "method": "SERAC"})
    with pytest.raises(StorageError, match="no editor that was trained for MEND"):
        mend(tiny_model, tokenizer, editor=str(tmp_path)).edit(requests)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:200])
    with pytest.raises(StorageError, match="truncated"):
        mend(tiny_model, tokenizer, editor=str(tmp_path)).edit(requests)
    with pytest.raises(ConfigError, match="parts"):
        mend(tiny_model, tokenizer, parts=("mlp.nothing",))


@pytest.mark.parametrize("name", ["MEND", "KE"])
def test_the_users_generators_are_left_alone(tiny_model, tokenizer, monkeypatch, name):
    model = small_model(tiny_model, "llama")
    editor = Editor(model, tokenizer, default_config(name, model), method=name)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    before = torch.get_rng_state()
    first, again = (editor.method.new_learner().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and all(torch.equal(own, again[key]) for key, own in first.items())


def test_edits_are_taken_back_without_the_trained_editor(tiny_model, tokenizer, tmp_path):
    model = small_model(tiny_model)
    ids = ids_of(model, tokenizer)
    with torch.no_grad():
        before = model(ids).logits
    editor = make_method("MEND", model, tokenizer, **SETTINGS)
    editor.edit(requests_of(2))
    editor.save_pretrained(tmp_path / "edits")
    editor.close()
    manifest = json.loads((tmp_path / "edits" / "comeba_edits.json").read_text())
    manifest["settings"]["editor"] = str(tmp_path / "moved away")
    (tmp_path / "edits" / "comeba_edits.json").write_text(json.dumps(manifest))
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    with pytest.raises(StorageError, match="moved away"):
        again.edit(requests_of(3)[2:])
    again.rollback(0)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, before)


@pytest.mark.parametrize("name", ["MEND", "SERAC"])
def test_edits_go_on_with_the_editor_that_they_were_made_with(tiny_model, tokenizer, tmp_path, name):
    folder = tmp_path / "editor"
    folder.mkdir()

    def write(seed):
        learner = make_method(name, small_model(tiny_model), tokenizer, seed=seed).method.new_learner()
        save_learner(learner, folder / FILE, {"kind": "editor", "method": name})

    write(0)
    first = (folder / FILE).read_bytes()
    editor = make_method(name, small_model(tiny_model), tokenizer, editor=str(folder))
    editor.edit(requests_of(2))
    write(1)
    editor.edit(requests_of(3)[2:])  # with what it has read
    editor.save_pretrained(tmp_path / "edits")
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    for needing in (again.method.ready, lambda: again.edit(requests_of(4)[3:])):
        with pytest.raises(StorageError, match="another editor than these edits were made with"):
            needing()
    assert again.step == 2
    again.rollback(0)
    again.save_pretrained(tmp_path / "edits")
    (folder / FILE).write_bytes(first)
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    again.edit(requests_of(2))
    assert_held(held(again), held_after(tiny_model, tokenizer, name, folder))
    manifest = json.loads((tmp_path / "edits" / "comeba_edits.json").read_text())
    (tmp_path / "edits" / "comeba_edits.json").write_text(json.dumps({**manifest, "editor_digest": 3}))
    with pytest.raises(StorageError, match="damaged"):
        Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    del manifest["editor_digest"]  # as it was saved before it was kept
    (tmp_path / "edits" / "comeba_edits.json").write_text(json.dumps(manifest))
    Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits").edit(requests_of(2))


def held_after(tiny_model, tokenizer, name, folder):
    """What two edits come to."""
    editor = make_method(name, small_model(tiny_model), tokenizer, editor=str(folder))
    editor.edit(requests_of(2))
    return held(editor)


def test_parts_of_an_mlp(tiny_model, tokenizer):
    editor = make_method("MEND", small_model(tiny_model, "llama"), tokenizer, **SETTINGS, parts=("mlp.up_proj", "mlp.gate_proj"))
    assert len(editor.layers) == 6
    editor.edit(requests_of(2))
    assert all(layer.delta.any() for layer in editor.layers.values())


# -- KnowledgeEditor ------------------------------------------------------------------------------------------------


def ke(tiny_model, tokenizer, **changes):
    settings = KnowledgeEditorConfig(layers=(1, 2), hidden=8, condition=6, **changes)
    return Editor(small_model(tiny_model), tokenizer, settings, method="KE")


def test_ke_is_its_equation(tiny_model, tokenizer):
    """ΔW = σ(η) · (softmax(α) βᵀ ⊙ ∇W + softmax(γ) δᵀ) of each request, on whole matrices, summed."""
    editor = make_method("KE", small_model(tiny_model), tokenizer, layers=(1, 2), hidden=8, condition=6, scale=0.5)
    learner, plain = editor.method.needed(), small_model(tiny_model)
    requests = long_targets(3)
    wanted = {n: 0 for n in (1, 2)}
    for request in requests:
        ids = torch.tensor([tokenizer(f"{request.text} {request.target_new}")["input_ids"]])
        _, (last, _) = learner.lstm(plain.transformer.wte(ids))
        read = torch.tanh(learner.condense[0](torch.cat([last[0, 0], last[1, 0]])))
        weights = [plain.transformer.h[n].mlp.c_proj.weight for n in (1, 2)]
        gradients = torch.autograd.grad(nll(plain, tokenizer, request.text, request.target_new), weights)
        for n, gradient, network in zip((1, 2), gradients, learner.conditioners, strict=True):
            d_in, d_out = gradient.shape  # as Conv1D holds it
            alpha, gamma, beta, delta, eta = network(read).split([d_out, d_out, d_in, d_in, 1])
            change = torch.outer(alpha.softmax(0), beta) * gradient.mT + torch.outer(gamma.softmax(0), delta)
            wanted[n] = wanted[n] + 0.5 * torch.sigmoid(eta) * change
    editor.edit(requests)
    for name, layer in editor.layers.items():
        own = wanted[int(name.split(".")[2])].detach()
        assert torch.allclose(layer.delta, own, rtol=1e-3, atol=1e-5 * own.abs().max().item())


def test_ke_whose_gate_is_shut_is_the_model_as_it_was(tiny_model, tokenizer, tmp_path):
    editor = ke(tiny_model, tokenizer)
    learner = editor.method.new_learner()
    with torch.no_grad():
        for network in learner.conditioners:
            network[2].bias[-1] = -1e4
    save_learner(learner, tmp_path / FILE, {"kind": "editor", "method": "KE"})
    shut = ke(tiny_model, tokenizer, editor=str(tmp_path))
    ids = ids_of(shut.model, tokenizer)
    with torch.no_grad():
        before = shut.model(ids).logits
        shut.edit(long_targets(2))
        assert torch.equal(shut.model(ids).logits, before)


def test_kes_multiplier_rises_while_unrelated_prompts_move_too_far(tiny_model, tokenizer):
    """The gradient is that of edit + λ (KL − margin) in the parameters, and minus (KL − margin) times softplus' in λ's."""
    for margin, sign in ((1e-6, -1), (1e6, 1)):
        learner = ke(tiny_model, tokenizer, margin=margin).method.new_learner().train()
        episodes = [Episode(r, r.text, ("Water is", "wet")) for r in long_targets(2)]
        _, parts = learner(episodes)
        learner(episodes)[0].backward()
        over = parts["locality"] - margin
        assert learner.multiplier.grad.item() == pytest.approx(-0.5 * over, rel=1e-4) and np.sign(learner.multiplier.grad.item()) == sign
        assert parts["loss"] == pytest.approx(parts["edit"] + np.log(2) * over, rel=1e-4)  # softplus(0) is ln 2


def test_ke_learns(tiny_model, tokenizer, tmp_path):
    editor, records = ke(tiny_model, tokenizer), requests_of(8)
    config = {"steps": 40, "validate_every": 10, "validations": 2, "lr": 3e-3}
    result = Trainer(editor, records[:6], records[6:], tmp_path, TrainConfig(**config)).run(progress=False)
    first = result["validations"][0]
    assert result["best"]["loss"] < first["loss"]


# -- SERAC ----------------------------------------------------------------------------------------------------------


def serac(tiny_model, tokenizer, family="gpt2", **changes):
    settings = SeracConfig(**({"layers": (1, 2), "rank": 2, "buckets": 4096, "width": 32} | changes))
    model = tiny_model("opt", num_hidden_layers=4) if family == "opt" else small_model(tiny_model, family)
    return Editor(model, tokenizer, settings, method="SERAC")


def trained_serac(tiny_model, tokenizer, folder, family="gpt2", **changes):
    """One whose counterfactual model differs from the model."""
    learner = serac(tiny_model, tokenizer, family, **changes).method.new_learner()
    with torch.no_grad():
        for up in learner.up:
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(1)))
    folder.mkdir(exist_ok=True)
    save_learner(learner, folder / FILE, {"kind": "editor", "method": "SERAC"})
    return serac(tiny_model, tokenizer, family, editor=str(folder), **changes)


def test_features_are_words_and_their_parts():
    assert features("Oslo", 10**9) == [
        zlib.crc32(t.encode()) % 10**9 for t in ("<oslo>", "<os", "osl", "slo", "lo>", "<osl", "oslo", "slo>", "<oslo", "oslo>")
    ]
    assert features("", 8) == [zlib.crc32(b"") % 8] and features("A b", 99) == features("a  B!", 99)
    table = torch.randn(7, 3)
    assert torch.allclose(encode("Oslo, Peru", table), torch.stack([table[n] for n in features("Oslo, Peru", 7)]).mean(0))


def test_an_exact_match_always_routes_and_far_prompts_do_not(tiny_model, tokenizer, tmp_path):
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e")
    requests = long_targets(3)
    ids = ids_of(editor.model, tokenizer)
    with torch.no_grad():
        plain = editor.model(ids).logits
    rewrite = prompt_rewriter(editor.model)
    assert rewrite(requests[0].text) == requests[0].text  # nothing is cached
    editor.edit(requests)
    for request in requests:
        assert rewrite(request.text) == f"{MARK} {request.text} {request.target_new}\nPrompt: {request.text}"
    assert rewrite("zzz qqq 123") == "zzz qqq 123"
    scope = editor.method.attachments["comeba_facts"]
    vectors = [encode(r.text, scope.table).double() for r in requests]
    query = encode("The capital of", scope.table).double()
    wanted = [np.exp(-float((query - own).square().sum())) for own in vectors]
    assert np.allclose(scope.probabilities("The capital of").double().numpy(), wanted, rtol=1e-4)
    with torch.no_grad():  # without the mark the model is what it was, bit for bit
        assert torch.equal(editor.model(ids).logits, plain)
    editor.retract(editor.ledger.live()[0].request.request_id)
    assert rewrite(requests[0].text) != f"{MARK} {requests[0].text} {requests[0].target_new}\nPrompt: {requests[0].text}"
    assert rewrite(requests[1].text).startswith(MARK)


def test_a_question_meets_one_state_of_the_edits(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Whatever another thread does to the edits once it was begun."""
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e")
    requests = long_targets(3)
    told = [f"{MARK} {r.text} {r.target_new}\nPrompt: {r.text}" for r in requests]
    rewrite, candidates = prompt_rewriter(editor.model), Scope.candidates

    def asked(prompt, meanwhile):
        def disturbed(self, text, *held):
            if threading.current_thread() is threading.main_thread():
                other = threading.Thread(target=meanwhile)
                other.start()
                other.join()
            return candidates(self, text, *held)

        with monkeypatch.context() as patch:
            patch.setattr(Scope, "candidates", disturbed)
            return rewrite(prompt)

    assert asked(requests[0].text, lambda: editor.edit(requests)) == requests[0].text and editor.step == 1
    ids = [entry.request.request_id for entry in editor.ledger.live()]
    assert asked(requests[2].text, lambda: editor.retract(ids[0])) == told[2] and len(editor.ledger) == 2
    assert rewrite(requests[0].text) != told[0] and rewrite(requests[2].text) == told[2]
    assert asked(requests[1].text, lambda: editor.rollback(0)) == told[1] and rewrite(requests[1].text) == requests[1].text
    # As any buffers: they are copied, moved and loaded.
    editor.edit(requests)
    (scope,) = [own for own in copy.deepcopy(editor.model).to(torch.float64).modules() if isinstance(own, Scope)]
    assert scope.rewrite(requests[1].text) == told[1] and scope.keys.dtype == torch.float32
    fresh = Scope(0.5, scope.table.shape[1])
    fresh.load_state_dict(scope.state_dict())
    assert fresh.rewrite(requests[1].text) == told[1]


def test_named_scope_is_the_subjects_name(tiny_model, tokenizer, tmp_path):
    """Whatever is asked; of several edits of a subject the nearest one, and nobody else's."""
    requests = long_targets(3)
    one = requests[1]
    reworded = f"Whoever speaks of {one.subject} says"
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e", named=True, threshold=1.0)
    editor.edit(requests)
    rewrite = prompt_rewriter(editor.model)
    assert rewrite(one.text) == f"{MARK} {one.text} {one.target_new}\nPrompt: {one.text}"
    table = editor.method.attachments["comeba_facts"].table
    same = [r for r in requests if r.subject == one.subject]
    near = min(same, key=lambda r: (encode(r.text, table) - encode(reworded, table)).square().sum().item())
    assert len(same) == 2 and rewrite(reworded) == f"{MARK} {near.text} {near.target_new}\nPrompt: {reworded}"
    nameless = one.text.replace(one.subject, "Nobody")
    assert rewrite(nameless) == nameless
    editor.save_pretrained(tmp_path / "edits")
    assert prompt_rewriter(load_edits(small_model(tiny_model), tmp_path / "edits"))(reworded) == rewrite(reworded)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_behind_the_mark_the_model_has_its_lora(tiny_model, tokenizer, tmp_path, family):
    """Against weights that hold the LoRA, for the tokens behind the mark; in one pass, in cached steps, and beside other rows."""
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e", family)
    editor.edit(long_targets(2))
    model, mark = editor.model, tokenizer(MARK)["input_ids"]
    tail, other = (
        tokenizer(" the capital of Norway is Oslo")["input_ids"],
        tokenizer("Danielle Darrieux speaks French and lives")["input_ids"],
    )
    seen = {}
    layer = next(iter(editor.method.layers.values()))
    layer.register_forward_hook(lambda module, args, output: seen.__setitem__("x", (args[0], output)))
    with torch.no_grad():
        row = torch.tensor([mark + tail])
        whole = model(row).logits
        x, output = seen["x"]
        x, output = x.reshape(1, row.shape[1], -1), output.reshape(1, row.shape[1], -1)
        base = layer.base_layer(x.reshape(-1, x.shape[-1])).reshape(output.shape)
        change = layer.scale * torch.einsum("bsi,ri,ro->bso", x, layer.down, layer.up)
        first = len(mark) - 1
        assert torch.equal(output[:, :first], base[:, :first])
        assert torch.allclose(output[:, first:], (base + change)[:, first:], atol=1e-5) and change.abs().max() > 1e-3
        cache, parts = None, []
        for piece in (row[:, :3], row[:, 3 : len(mark) + 1], row[:, len(mark) + 1 : -1], row[:, -1:]):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
        pad = row.shape[1] - len(other)
        both = torch.cat([row, torch.tensor([other + [0] * pad])])
        mask = torch.tensor([[1] * row.shape[1], [1] * len(other) + [0] * pad])
        together = model(both, attention_mask=mask).logits
        assert torch.allclose(together[:1], whole, atol=1e-4)
        alone = model(torch.tensor([other])).logits
        with editor.disabled():
            unedited = model(torch.tensor([other])).logits
        assert torch.equal(alone, unedited) and torch.allclose(together[1:, : len(other)], alone, atol=1e-4)


def sentencepiece(texts):
    """As Mistral's: only a text's first word has a space of its own, and a new line is a byte."""
    texts = [part for text in texts for part in text.split("\n")]
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    letters = sorted({*"".join(texts), "▁"})
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=letters, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def byte_level(texts):
    """As GPT-2's: a word and the space before it are one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


TURNS = ("{}", "[INST] {} [/INST]", "<|im|>user\n{}<|end|>", "<|user|>\n\n{}", "USER: {}")


@pytest.mark.parametrize("made", [sentencepiece, byte_level])
def test_the_mark_is_known_wherever_a_chat_has_it(tiny_model, tmp_path, made):
    """By the first token that the counterfactual layer changes, against the characters that the tokens stand for."""
    own = made([turn.format(f"{MARK} Ann is in Rome") for turn in TURNS] * 20)
    editor = trained_serac(tiny_model, own, tmp_path / "e")
    editor.edit([EditRequest("{} is in", "Ann", "Rome")])
    layer, seen = next(iter(editor.method.layers.values())), {}
    layer.register_forward_hook(lambda module, args, output: seen.update(change=output - module.base_layer(args[0])))
    ways = set()
    for turn in TURNS:
        text = turn.format(f"{MARK} Ann is in Rome")
        encoded = own(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        end = text.index(MARK) + len(MARK)
        (last,) = [n for n, (a, b) in enumerate(places) if a < end <= b]
        start = next(n for n, (a, b) in enumerate(places) if b > text.index(MARK))
        ways.add(tuple(ids[start : last + 1]))
        with torch.no_grad():
            editor.model(torch.tensor([ids]))
            changed = seen["change"][0].ne(0).any(-1).tolist()
            assert changed == [n >= last for n in range(len(ids))]
            editor.model(torch.tensor([own(text.replace(MARK, "<edit>"), add_special_tokens=False)["input_ids"]]))
        assert not seen["change"].any()
    assert len(ways) == 2  # or one hash would do
    # Edits of before, which know one form, are used, and gone on with.
    for layer in editor.method.layers.values():
        layer.mark = layer.mark[:1].clone()
    editor.save_pretrained(tmp_path / "edits")
    model = load_edits(small_model(tiny_model), tmp_path / "edits")
    ids = torch.tensor([own(f"{MARK} Ann is in Rome", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, editor.model(ids).logits, atol=1e-5)
    again = Editor.from_pretrained(small_model(tiny_model), own, tmp_path / "edits")
    again.edit([EditRequest("{} is in", "Bob", "Oslo")])
    assert all(len(own.mark) > 1 for own in again.method.layers.values())


@pytest.mark.parametrize("static", [False, True])
def test_a_mark_that_is_taken_back_is_forgotten(tiny_model, tokenizer, tmp_path, static):
    """A cache that is cropped knows of a mark before its new end, and of none behind it; as the kept tokens in one pass."""
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e", "llama")
    editor.edit(long_targets(1))
    model, mark = editor.model, tokenizer(MARK)["input_ids"]
    words, more = (tokenizer(text)["input_ids"] for text in ("Danielle Darrieux speaks French", " the capital of Norway is Oslo"))
    for before, draft, gone, after in (
        (words, mark + more[:2], len(mark) + 2, more),  # all of the draft
        (words, mark + more[:2], 3, more),  # the last token of the mark, too
        (words, mark + more[:2], 3, mark[-1:] + more),  # which comes again
        (words, mark + more[:2], 2, more),  # the draft but the mark
        (mark + words, more[:3], 2, more),
    ):
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
        with torch.no_grad():
            model(torch.tensor([before]), past_key_values=cache)
            model(torch.tensor([draft]), past_key_values=cache)
            cache.crop(-gone)
            parts = [model(torch.tensor([own]), past_key_values=cache).logits for own in (after[:2], after[2:])]
            whole = model(torch.tensor([before + draft[:-gone] + after]), use_cache=False).logits
            assert torch.allclose(torch.cat(parts, 1), whole[:, -len(after) :], atol=1e-4)
            with editor.disabled():
                unedited = model(torch.tensor([before + draft[:-gone] + after]), use_cache=False).logits
        marked = any((before + draft[:-gone] + after)[n:][: len(mark)] == mark for n in range(40))
        assert marked == ((whole - unedited).abs().max() > 1e-2)


def test_seracs_loss(tiny_model, tokenizer):
    """Binary cross-entropy of exp(−‖q − k‖²), pair by pair, plus the counterfactual model's NLL behind the edit's text."""
    editor = serac(tiny_model, tokenizer)
    learner = editor.method.new_learner()
    episodes = [Episode(r, f"Really, {r.text}", (f"Water {n} is", "wet")) for n, r in enumerate(long_targets(2))]
    _, parts = learner(episodes)
    vector = lambda text: torch.stack([learner.table[n] for n in features(text, 4096)]).mean(0)  # noqa: E731
    p = lambda one, other: torch.exp(-(vector(one) - vector(other)).square().sum())  # noqa: E731
    near = [-p(e.request.text, e.wording).log() for e in episodes]
    one, other = (e.request.text for e in episodes)
    pairs = [(a, e.unrelated[0]) for a in (one, other) for e in episodes] + [(one, other), (other, one)]
    far = [-(1 - p(*pair)).log() for pair in pairs]
    assert parts["scope"] == pytest.approx((sum(near) / 2 + sum(far) / 6).item(), rel=1e-4)
    plain, total = small_model(tiny_model), 0
    for e in episodes:  # the LoRA is zero yet
        for text in (e.request.text, e.wording):
            total += nll(plain, tokenizer, stated(f"{e.request.text} {e.request.target_new}", text), e.request.target_new)
    assert parts["edit"] == pytest.approx(total.item() / 4, rel=1e-4)
    away = Episode(episodes[0].request, episodes[0].wording, ("zzz qqq 123", None))
    assert p(one, "zzz qqq 123") < 0.5  # not in scope: the model's own answer
    assert learner.measure(away)["locality"] == 1.0


def test_a_named_scope_learns_what_else_is_asked(tiny_model, tokenizer):
    """The loss has the KL from the model to the counterfactual one, token by token, behind an edit of the same subject."""
    learner = serac(tiny_model, tokenizer, named=True).method.new_learner()
    beside = [("Norway speaks", "of Lima and"), None, ("Peru is in the city of", "Paris")]
    episodes = [Episode(r, r.text, ("Water is", "wet"), own) for r, own in zip(long_targets(3), beside, strict=True)]
    plain = small_model(tiny_model).double()

    def said(prompt, answer):
        ids, asked = (tokenizer(text)["input_ids"] for text in (f"{prompt} {answer}", prompt))
        with torch.no_grad():
            return plain(torch.tensor([ids])).logits[0, len(asked) - 1 : -1].softmax(-1)

    total, tokens = 0.0, 0
    for e in (episodes[0], episodes[2]):
        behind = f"{MARK} {e.request.text} {e.request.target_new}\nPrompt: {e.beside[0]}"
        for before, after in zip(said(*e.beside), said(behind, e.beside[1]), strict=True):
            total, tokens = total + (before * (before / after).log()).sum().item(), tokens + 1
    loss, parts = learner(episodes)
    assert parts["beside"] == pytest.approx(total / tokens, rel=1e-3) and total > 1e-3
    assert parts["loss"] == pytest.approx(parts["scope"] + parts["edit"] + parts["beside"], rel=1e-6)
    loss.backward()
    assert learner.up[0].grad.abs().max() > 0
    assert "beside" not in learner([episodes[1]])[1]
    assert "beside" not in serac(tiny_model, tokenizer).method.new_learner()(episodes)[1]  # as published


def test_serac_learns_on_the_command_line(tmp_path):
    """Scope from letters, and answers behind the edit's text, on the embedded model in a few steps."""
    folder, edits = tmp_path / "serac", tmp_path / "edits"
    config = tmp_path / "c.yaml"
    config.write_text("layers: [0, 1, 2, 3, 4]\nparts: [self_attn.v_proj]\n")
    given = ("--steps", 24, "--validate-every", 12, "--limit", 80, "--config", config)
    result = output("train", "SERAC", "testbed", "--out", folder, *given)
    first, last = result["validations"]
    assert last["loss"] < first["loss"] and last["locality"] >= 0.8
    fact = testbed.facts()[0]
    asked = ("--prompt", fact.prompt, "--subject", fact.subject, "--target", fact.target_new)
    run("edit", "testbed", *asked, "--method", "SERAC", "--editor", folder, "--out", edits)  # it need not be answered yet
    shown = output("generate", "testbed", "zzz qqq", "--edits", edits)["generations"][0]
    assert shown["text"] == shown["unedited"]


# -- episodes -------------------------------------------------------------------------------------------------------


def test_episodes():
    own = EditRequest(
        "{} is in", "Oslo", "Peru", rephrase_prompts=("Where is Oslo?", "Oslo lies in"), locality_prompts=(("Water is", "wet"),)
    )
    bare = EditRequest("{} is in", "Lima", "Chad")
    drawn = [episodes_of([own, bare], [0, 1], random.Random(n)) for n in range(20)]
    assert {e.wording for pair in drawn for e in pair[:1]} == {"Where is Oslo?", "Oslo lies in"}
    assert all(pair[1].wording == "Lima is in" and pair[1].unrelated == ("Water is", "wet") for pair in drawn)  # another one's
    assert drawn[3] == episodes_of([own, bare], [0, 1], random.Random(3))
    with pytest.raises(RequestError, match="locality prompt"):
        episodes_of([bare], [0], random.Random(0))


def test_what_else_is_asked_about_a_subject():
    """Another request's prompt with this subject, never one that may ask for the same."""
    apart = {"locality_prompts": (("Water is", "wet"),)}
    requests = [
        EditRequest("{} is in", "Oslo", "Peru", ground_truth="Norway", **apart),
        EditRequest("{} lies in", "Lima", "Chad", ground_truth="Peru", **apart),  # the first one's object
        EditRequest("{} is in", "Bonn", "Mali", **apart),  # its prompt
        EditRequest("The mayor of {} is", "Rome", "Ann", **apart),
        EditRequest("{} is known for its", "Kiev", "opera", **apart),
    ]
    wanted = {("The mayor of Oslo is", "Ann"), ("Oslo is known for its", "opera")}
    drawn = [episodes_of(requests, [0], random.Random(n))[0] for n in range(20)]
    assert drawn[0].beside in wanted and len({e.beside for e in drawn}) == 1  # by the record: nothing else's draw is moved
    wordings = [dataclasses.replace(requests[0], rephrase_prompts=(f"Where is Oslo, {n}?",)) for n in range(20)]
    assert {episodes_of([own, *requests[1:]], [0], random.Random(0))[0].beside for own in wordings} == wanted
    assert episodes_of(requests[:1], [0], random.Random(0))[0].beside is None


# -- training -------------------------------------------------------------------------------------------------------

COST = ("seconds", "peak_memory", "bytes")  # the file names the first two, in as many digits as they have
SHORT = {"steps": 6, "validate_every": 3, "validations": 2, "save_every": 2, "accumulate": 2, "lr": 1e-3}


def trainer(tiny_model, tokenizer, out, seed=0, **changes):
    editor = mend(tiny_model, tokenizer)
    records = requests_of(8)
    return Trainer(editor, records[:6], records[6:], out, TrainConfig(**(SHORT | {"seed": seed} | changes)))


def tensors_of(folder, name):
    return read_tensors(folder / name)[0]


def without_cost(value):
    return json.loads(json.dumps(value), object_hook=lambda d: {k: v for k, v in d.items() if k not in COST})


def assert_same_files(folder, other):
    """The editor and the checkpoint, to the bit, and what is said of them."""
    for name in (FILE, "last.safetensors"):
        (one, about), (two, told) = (read_tensors(own / name) for own in (folder, other))
        assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)
        assert without_cost(about) == without_cost(told)


def test_records_that_contradict_each_other_can_both_be_learned_from(tiny_model, tokenizer, tmp_path):
    """Files of thousands of real records hold some facts twice."""
    records = requests_of(4)
    again = dataclasses.replace(records[0], target_new=records[1].target_new, request_id="again")
    assert again.target_new != records[0].target_new
    config = TrainConfig(**(SHORT | {"steps": 1}))
    result = Trainer(mend(tiny_model, tokenizer), [records[0], again], records[2:], tmp_path, config).run(progress=False)
    assert result["steps"] == 1


def test_time_ends_a_training_which_more_time_goes_on_with(tiny_model, tokenizer, tmp_path):
    short = trainer(tiny_model, tokenizer, tmp_path, minutes=1e-6).run(progress=False)
    assert short["steps"] == 1 and [own["step"] for own in short["validations"]] == [1]  # ended with a validation
    assert short["peak_memory"] > 1e6 and short["machine"]["cores"] >= 1
    assert trainer(tiny_model, tokenizer, tmp_path, minutes=60).run(progress=False)["steps"] == 6
    with pytest.raises(ConfigError, match="minutes"):
        TrainConfig(minutes=0)


def test_a_training_whose_time_is_up_is_only_read(tiny_model, tokenizer, tmp_path):
    results = [trainer(tiny_model, tokenizer, tmp_path, steps=50, minutes=1e-6).run(progress=False) for _ in range(3)]
    assert all(without_cost(own) == without_cost(results[0]) for own in results)
    assert results[0]["seconds"] == results[2]["seconds"] and results[0]["steps"] == len(results[0]["validations"]) == 1


def test_fewer_steps_or_less_time_than_it_has_had(tiny_model, tokenizer, tmp_path):
    """It ends where it is, with a validation."""
    for fewer in ({"steps": 2}, {"minutes": 1e-6}):
        folder = tmp_path / str(*fewer)
        killed = trainer(tiny_model, tokenizer, folder, validate_every=20, steps=10)
        step = killed._step
        killed._step = lambda *args, step=step: step(*args) if args[-1] < 4 else 1 / 0
        with pytest.raises(ZeroDivisionError):
            killed.run(progress=False)
        result = trainer(tiny_model, tokenizer, folder, **({"validate_every": 20, "steps": 10} | fewer)).run(progress=False)
        assert result["steps"] == 4 and [own["step"] for own in result["validations"]] == [4] and (folder / FILE).exists()
        assert trainer(tiny_model, tokenizer, folder, validate_every=20, steps=10).run(progress=False)["steps"] == 10


def test_what_a_training_took_stands_in_the_table(tiny_model, tokenizer, tmp_path):
    result = trainer(tiny_model, tokenizer, tmp_path).run(progress=False)
    model = small_model(tiny_model)
    config = default_config("MEND", model, editor=str(tmp_path))
    known = method_named("MEND").preparation(config)
    assert known == {f"training_{name}": result[name] for name in ("seconds", "steps", "peak_memory", "bytes")}
    assert known["training_bytes"] == (tmp_path / FILE).stat().st_size
    assert f"{known['training_bytes'] / 1e6:.1f}" == cell(known, "training_bytes")
    (tmp_path / "train.json").write_text("{")
    assert method_named("MEND").preparation(config) == {} == method_named("ROME").preparation(default_config("ROME", model))


@pytest.mark.drawn
@pytest.mark.parametrize("moment", [1, 3, 4, 5])
def test_a_killed_training_ends_with_the_same_bits(tiny_model, tokenizer, tmp_path, moment, monkeypatch):
    whole = trainer(tiny_model, tokenizer, tmp_path / "whole").run(progress=False)
    killed = trainer(tiny_model, tokenizer, tmp_path / "killed")
    step = killed._step

    def interrupted(accelerator, learner, optimiser, number):
        if number == moment:
            raise KeyboardInterrupt
        return step(accelerator, learner, optimiser, number)

    monkeypatch.setattr(killed, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        killed.run(progress=False)
    assert not (tmp_path / "killed" / "train.json").exists()
    result = trainer(tiny_model, tokenizer, tmp_path / "killed").run(progress=False)
    assert without_cost(result) == without_cost(whole)
    for own, name in ((result, "killed"), (whole, "whole")):
        assert own["bytes"] == (tmp_path / name / FILE).stat().st_size
    assert_same_files(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed" / "curve.png").stat().st_size > 5000
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 8
    again = trainer(tiny_model, tokenizer, tmp_path / "whole").run(progress=False)  # complete: only read
    assert without_cost(again) == without_cost(whole)
    longer = trainer(tiny_model, tokenizer, tmp_path / "whole", steps=9).run(progress=False)
    assert longer["steps"] == 9 and len(longer["validations"]) == 3


@pytest.mark.parametrize("save_every", [50, 2])
def test_a_training_killed_at_any_write_ends_with_the_same_bits(tiny_model, tokenizer, tmp_path, monkeypatch, save_every):
    """Validated before it is first saved, or saved first."""
    changes = {"save_every": save_every, "steps": 4, "validate_every": 2 if save_every > 2 else 3, "accumulate": 1}
    whole = trainer(tiny_model, tokenizer, tmp_path / "whole", **changes).run(progress=False)
    writers = {name: getattr(training, name) for name in ("write_text", "write_tensors", "save_learner")}
    left = iter(())

    def killed_at(writer):
        def write(*args):
            if next(left, None) is None:
                raise KeyboardInterrupt
            writer(*args)

        return write

    for name, writer in writers.items():
        monkeypatch.setattr(training, name, killed_at(writer))
    for number in range(100):
        left = iter(range(number))
        try:
            trainer(tiny_model, tokenizer, tmp_path / f"{number}", **changes).run(progress=False)
            break
        except KeyboardInterrupt:
            left = iter(range(100))
            result = trainer(tiny_model, tokenizer, tmp_path / f"{number}", **changes).run(progress=False)
        assert without_cost(result) == without_cost(whole)
        assert_same_files(tmp_path / "whole", tmp_path / f"{number}")
    assert number >= 6  # log, checkpoint and editor, then log and checkpoint, then what it gave


def test_a_training_whose_best_editor_is_gone(tiny_model, tokenizer, tmp_path):
    """Where a later step's checkpoint is there, it cannot be made again."""
    changes = {"steps": 6, "validate_every": 4, "save_every": 5}
    killed = trainer(tiny_model, tokenizer, tmp_path, **changes)
    step = killed._step
    killed._step = lambda *args: step(*args) if args[-1] < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        killed.run(progress=False)
    (tmp_path / FILE).unlink()
    with pytest.raises(StorageError, match="no longer holds the best editor, of step 4"):
        trainer(tiny_model, tokenizer, tmp_path, **changes).run(progress=False)


def test_it_learns_and_the_best_is_kept(tiny_model, tokenizer, tmp_path):
    first = trainer(tiny_model, tokenizer, tmp_path / "a", steps=1, validate_every=1, lr=1e-6).run(progress=False)
    result = trainer(tiny_model, tokenizer, tmp_path / "b", steps=60, validate_every=10, lr=3e-3).run(progress=False)
    assert result["best"]["loss"] < 0.8 * first["best"]["loss"]
    assert result["best"]["loss"] == min(own["loss"] for own in result["validations"])
    about = read_tensors(tmp_path / "b" / FILE)[1]
    assert about["validation"]["step"] == result["best"]["step"] and about["method"] == "MEND"


def test_it_ends_when_nothing_gets_better(tiny_model, tokenizer, tmp_path, monkeypatch):
    run_ = trainer(tiny_model, tokenizer, tmp_path, steps=60, validate_every=1, patience=3)
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 0.5])
    monkeypatch.setattr(run_, "_validate", lambda: {"loss": next(losses), "reliability": 0.0, "generality": 0.0, "locality": 0.0})
    result = run_.run(progress=False)
    assert result["steps"] == 5 and result["best"]["step"] == 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(tiny_model, tokenizer, tmp_path, monkeypatch):
    run_ = trainer(tiny_model, tokenizer, tmp_path, validate_every=1)
    forward, calls = run_.learner.forward, []

    def diverging(episodes):
        calls.append(1)
        loss, parts = forward(episodes)
        return (loss * torch.nan if len(calls) > 4 else loss), parts

    monkeypatch.setattr(run_.learner, "forward", diverging)
    with pytest.raises(ComebaError, match="nan at step 3"):
        run_.run(progress=False)
    assert all(own.isfinite().all() for own in tensors_of(tmp_path, FILE).values())
    editor = mend(tiny_model, tokenizer, editor=str(tmp_path))
    editor.edit(requests_of(1))


def test_a_folder_of_something_else(tiny_model, tokenizer, tmp_path):
    trainer(tiny_model, tokenizer, tmp_path / "a").run(progress=False)
    with pytest.raises(StorageError, match="training differ"):
        trainer(tiny_model, tokenizer, tmp_path / "a", seed=1).run(progress=False)
    (tmp_path / "a" / "last.safetensors").unlink()
    with pytest.raises(StorageError, match="has not made"):
        trainer(tiny_model, tokenizer, tmp_path / "a").run(progress=False)


def test_what_cannot_be_trained(tiny_model, tokenizer, tmp_path):
    records = requests_of(3)
    with pytest.raises(ConfigError, match="edits as it is"):
        Trainer(make_method("FT", small_model(tiny_model), tokenizer), records, records, tmp_path)
    with pytest.raises(RequestError, match="0 records"):
        Trainer(mend(tiny_model, tokenizer), [], records, tmp_path)
    edited = make_method("MEND", small_model(tiny_model), tokenizer, **SETTINGS)
    edited.edit(records)
    with pytest.raises(RequestError, match="edited already"):
        Trainer(edited, records, records, tmp_path)
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"mixed_precision": "int8"}, {"edits": True}):
        with pytest.raises(ConfigError):
            TrainConfig(**wrong)
    assert not list(tmp_path.iterdir())


def test_each_training_chooses_its_precision(tiny_model, tokenizer, tmp_path):
    """In one process, beside an Accelerator of somebody else's, which keeps what was chosen for it."""
    theirs = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    with theirs.accumulate():  # whose accumulation is not done yet
        assert not theirs.sync_gradients
        losses = []
        for number, precision in enumerate(("no", "bf16", "no")):
            trainer(tiny_model, tokenizer, tmp_path / f"{number}", steps=2, mixed_precision=precision).run(progress=False)
            losses.append([json.loads(line)["loss"] for line in (tmp_path / f"{number}" / "log.jsonl").read_text().splitlines()])
        assert losses[0] == losses[2] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
        assert losses[0][0] != losses[0][1]  # it has learned
        assert theirs.gradient_accumulation_steps == 3 and theirs.mixed_precision == "no" and not theirs.sync_gradients


def test_the_learner_stays_on_the_models_device(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Whatever accelerate takes for this process's."""
    monkeypatch.setattr(accelerate.Accelerator, "device", torch.device("meta"))
    run_ = trainer(tiny_model, tokenizer, tmp_path, steps=1)
    assert run_.run(progress=False)["steps"] == 1
    assert {own.device.type for own in run_.learner.parameters()} == {"cpu"}


def test_a_killed_training_in_half_precision_scales_its_losses_on(tiny_model, tokenizer, tmp_path, monkeypatch):
    """On a scaler that torch has for the CPU: the first scales are too large, and their steps are left out."""

    class Scaling(accelerate.Accelerator):
        def __init__(self, **given):
            super().__init__(**given)
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-11, growth_interval=2)

    monkeypatch.setattr(accelerate, "Accelerator", Scaling)
    with pytest.raises(ConfigError, match="fp16 is for GPUs"):
        trainer(tiny_model, tokenizer, tmp_path / "cpu", mixed_precision="fp16")

    def made(folder):
        made = trainer(tiny_model, tokenizer, folder, steps=8, lr=1e-2)
        object.__setattr__(made.config, "mixed_precision", "fp16")
        return made

    made(tmp_path / "whole").run(progress=False)
    killed = made(tmp_path / "killed")
    step = killed._step
    killed._step = lambda *args: step(*args) if args[-1] < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        killed.run(progress=False)
    tensors, about = read_tensors(tmp_path / "killed" / "last.safetensors")
    taken = {int(own) for name, own in tensors.items() if name.endswith(".step")}
    assert about["step"] == 4 and about["scaler"]["scale"] < 2.0**40 and max(taken) < 4
    made(tmp_path / "killed").run(progress=False)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


def test_files_to_learn_from_take_turns(tmp_path):
    facts = [fact.to_record() for fact in testbed.facts()[1000:1006]]
    files = {"a": facts[:3], "b": [facts[3], {"prompt": "nobody"}, facts[4]], "c": facts[5:]}
    for name, records in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "all.json").write_text(json.dumps([facts[n] for n in (0, 3, 5, 1, 4, 2)]))
    several = [argument for name in files for argument in ("--train", tmp_path / f"{name}.json")]
    given = ("--steps", 1, "--validate-every", 1, "--accumulate", 1)
    found = output("train", "MEND", "testbed", "--out", tmp_path / "several", *given, *several)
    assert found["data"] == output("train", "MEND", "testbed", "--out", tmp_path / "one", *given, "--train", tmp_path / "all.json")["data"]
    assert (found["records"]["read"], found["records"]["used"]) == (7, 6)
    (skipped,) = found["records"]["skipped"]
    assert skipped["file"] == str(tmp_path / "b.json") and skipped["index"] == 1
    (tmp_path / "val.json").write_text(json.dumps([facts[0], {"prompt": "nobody"}]))
    counts = output("train", "MEND", "testbed", "--out", tmp_path / "val", *given, *several, "--val", tmp_path / "val.json")["records"]
    assert (counts["read"], counts["used"]) == (9, 6)
    assert [skip["reason"] for skip in counts["skipped"] if skip["index"] == 0] == ["--val holds the same fact"]
    assert len(counts["skipped"]) == 3


@pytest.mark.drawn
def test_from_the_command_line(tmp_path):
    """Minutes with its defaults; here a few steps, after which single edits work already (the embedded model was made to be edited)."""
    folder, edits = tmp_path / "mend", tmp_path / "edits"
    result = output("train", "MEND", "testbed", "--out", folder, "--steps", 12, "--validate-every", 6, "--limit", 60)
    assert result["steps"] == 12 and result["records"]["used"] == 60 and (folder / "curve.png").exists()
    assert result["best"]["reliability"] >= 0.8
    fact = testbed.facts()[0]
    given = ("--prompt", fact.prompt, "--subject", fact.subject, "--target", fact.target_new)
    done = output("edit", "testbed", *given, "--method", "MEND", "--editor", folder, "--out", edits)
    assert done["answered"] == 1 and done["config"]["editor"] == str(folder)
    written = output("generate", "testbed", fact.text, "--edits", edits, "--max-new-tokens", 4)["generations"][0]
    assert fact.target_new in written["text"] and fact.target_new not in written["unedited"]
    for arguments, words in (
        (("edit", "testbed", *given, "--method", "MEND"), "comeba train MEND"),
        (("edit", "testbed", *given, "--method", "ROME", "--editor", folder), "edits as it is"),
        (("train", "ROME", "testbed"), "is not trained"),
        (("train", "MEND", "testbed", "--lr", "0"), "lr must be"),
    ):
        wrong = run(*arguments, "--out", tmp_path / "other", "--json")
        assert wrong.exit_code == 1 and words in json.loads(wrong.stdout)["error"], wrong.stdout
        assert not (tmp_path / "other").exists()
    before = {file: file.read_bytes() for file in edits.rglob("*") if file.is_file()}
    wrong = run("edit", "testbed", *given, "--resume", "--editor", tmp_path / "another", "--out", edits, "--json")
    assert wrong.exit_code == 1 and f"--editor {folder}, not {tmp_path / 'another'}" in json.loads(wrong.stdout)["error"]
    assert {file: file.read_bytes() for file in edits.rglob("*") if file.is_file()} == before
    again = output("edit", "testbed", *given, "--resume", "--editor", folder / ".." / "mend", "--out", edits)
    assert again["edits"] == 0 and again["earlier_edits"] == 1
    tensors, about = read_tensors(folder / FILE)
    write_tensors(folder / FILE, {**tensors, "rates": 2 * tensors["rates"]}, about)
    before = {file: file.read_bytes() for file in edits.rglob("*") if file.is_file()}
    other = testbed.facts()[1]
    more = ("--prompt", other.prompt, "--subject", other.subject, "--target", other.target_new)
    wrong = run("edit", "testbed", *more, "--resume", "--out", edits, "--json")
    assert wrong.exit_code == 1 and "another editor than these edits were made with" in json.loads(wrong.stdout)["error"]
    assert {file: file.read_bytes() for file in edits.rglob("*") if file.is_file()} == before
