"""Named sets of edits on one model: one at a time, together, none; what cannot be together is refused and changes nothing."""

import copy
import pickle

import pytest
import torch

from comeba_ext import EditConfig, Editor, EditRequest, active_edits, edit_sets, load_edits, set_edits, testbed, unload_edits
from comeba_ext.errors import ArchitectureError, ComebaError, StorageError
from comeba_ext.layers.attachment import attachments, base_state, disabled
from comeba_ext.layers.prompts import prompt_rewriter

FACTS = testbed.facts()
# name: method, its settings, the facts it edits
TWO, SHORT = {"layers": [1, 2], "prefixes": 1}, {"steps": 2, "prefixes": 0}
SETS = {
    "one": ("COMEBA-HK", TWO, FACTS[:2]),
    "two": ("COMEBA-HK", TWO, FACTS[2:4]),
    "again": ("COMEBA-HK", TWO | SHORT, [EditRequest("{} was made by", FACTS[0].subject, FACTS[1].target_new)]),
    "reference": ("COMEBA-HK", TWO | SHORT | {"scope": "reference"}, FACTS[4:5]),
    "memit": ("MEMIT", TWO | SHORT, FACTS[5:6]),
    "memit2": ("MEMIT", TWO | SHORT, FACTS[6:7]),
    "grace": ("GRACE", {}, FACTS[7:8]),
    "ice": ("ICE", {}, FACTS[16:18]),
    "ice2": ("ICE", {}, [*FACTS[18:20], EditRequest("{} was made by", FACTS[16].subject, FACTS[1].target_new)]),
    "ice3": ("ICE", {}, FACTS[16:17]),
    "two facts": ("ICE", {"facts": 2}, FACTS[20:21]),
    "melo": ("MELO", {"steps": 1}, FACTS[21:22]),
    "melo2": ("MELO", {"steps": 1}, FACTS[22:23]),
}
TEXTS = [f"{fact.text} {fact.target_new}" for fact in FACTS[:9]]


@pytest.fixture(scope="module")
def base():
    return testbed.load()


@pytest.fixture(scope="module")
def covariance(base):
    editor = Editor(copy.deepcopy(base[0]), base[1], EditConfig.for_model(base[0], layers=TWO["layers"]))
    editor.collect_covariance(testbed.texts(), tokens=3_000, progress=False)
    return editor.covariance


@pytest.fixture(scope="module")
def folder_of(base, covariance, tmp_path_factory):
    """Function that makes a set's folder when it is first asked for."""
    from comeba_ext.methods import default_config

    root = tmp_path_factory.mktemp("sets")

    def make(name, inference_only=False):
        folder = root / f"{name}{' for use' * inference_only}"
        if not folder.exists():
            method, changes, facts = SETS[name]
            model = copy.deepcopy(base[0])
            editor = Editor(model, base[1], default_config(method, model, **changes), method=method)
            editor.set_covariance(covariance)
            editor.edit(facts)
            editor.save_pretrained(folder, inference_only=inference_only)
        return folder

    return make


@pytest.fixture
def model(base):
    return copy.deepcopy(base[0])


@pytest.fixture(scope="module")
def logits_of(base):
    def run(model, texts=TEXTS):
        with torch.no_grad():
            return [model(torch.tensor([base[1](text)["input_ids"]])).logits for text in texts]

    return run


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def answered(model, tokenizer, fact):
    prompt = (prompt_rewriter(model) or str)(fact.text)
    ids, target = tokenizer(prompt)["input_ids"], tokenizer(f" {fact.target_new}")["input_ids"]
    with torch.no_grad():
        found = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].argmax(-1)
    return found.tolist() == target


@pytest.mark.parametrize("name", ["one", "reference", "memit", "grace", "ice"])
def test_one_set_on_is_the_model_with_these_edits(base, model, folder_of, logits_of, name):
    expected = logits_of(load_edits(copy.deepcopy(base[0]), folder_of(name)))
    assert load_edits(model, folder_of("two"), name="other") is model
    assert load_edits(model, folder_of(name), name=name) is model
    assert active_edits(model) == [name] and same(logits_of(model), expected)
    with disabled(model):
        assert same(logits_of(model), logits_of(base[0]))
    set_edits(model, "other")
    assert active_edits(model) == ["other"]
    set_edits(model, [name])
    assert same(logits_of(model), expected)
    set_edits(model, [])
    assert active_edits(model) == [] and list(edit_sets(model)) == ["other", name]
    assert not attachments(model) and "save_pretrained" not in vars(model)
    assert same(logits_of(model), logits_of(base[0]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base[0].state_dict().values(), strict=True))


def test_sets_whose_keys_do_not_meet(base, model, folder_of, logits_of):
    """Every fact is answered to the bit as by its own set alone, and what neither edits as by the base."""
    one = logits_of(load_edits(copy.deepcopy(base[0]), folder_of("one")))
    two = logits_of(load_edits(copy.deepcopy(base[0]), folder_of("two")))
    plain = logits_of(base[0])
    for name in ("one", "two"):
        load_edits(model, folder_of(name), name=name)
    for order in (["one", "two"], ["two", "one"]):
        set_edits(model, order)
        assert active_edits(model) == order
        assert same(logits_of(model), one[:2] + two[2:4] + plain[4:])
        assert not same(logits_of(model)[:4], plain[:4])
        assert all(answered(model, base[1], fact) for fact in FACTS[:4])
    with disabled(model):
        assert same(logits_of(model), plain)
    batch = base[1](TEXTS[:4], return_tensors="pt", padding=True)
    rows = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row, mask, expected in zip(rows, batch["attention_mask"].bool(), one[:2] + two[2:4], strict=True):
        torch.testing.assert_close(row[mask], expected[0], rtol=0, atol=1e-3)
    plain_state = base[0].state_dict()
    found = base_state(model, model.state_dict())
    assert found.keys() == plain_state.keys() and all(torch.equal(found[name], plain_state[name]) for name in found)


def test_decoding_with_two_sets(base, model, folder_of):
    """What was answered above in one pass is written with a cache, too."""
    for name in ("one", "two"):
        load_edits(model, folder_of(name), name=name)
    set_edits(model, ["one", "two"])
    for fact in (FACTS[0], FACTS[3]):
        ids = torch.tensor([base[1](fact.text)["input_ids"]])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert base[1].decode(new).strip().startswith(fact.target_new)


def test_deltas_of_sets_add_up(base, model, folder_of, logits_of):
    """Methods without hooks: the same as base weights to which both deltas were added."""
    for name in ("memit", "memit2"):
        load_edits(model, folder_of(name), name=name)
    set_edits(model, ["memit", "memit2"])
    merged = copy.deepcopy(base[0])
    for name in ("memit", "memit2"):
        for where, layer in attachments(load_edits(copy.deepcopy(base[0]), folder_of(name))).items():
            with torch.no_grad():
                merged.get_submodule(where).weight += layer.delta
    for found, expected in zip(logits_of(model), logits_of(merged), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert not same(logits_of(model)[:1], logits_of(base[0])[:1])


def test_sets_of_different_methods(base, model, folder_of):
    names = ["one", "two", "grace"]
    for name in names:
        load_edits(model, folder_of(name), name=name)
    set_edits(model, names)
    assert all(answered(model, base[1], fact) for name in names for fact in SETS[name][2])


def test_facts_in_the_context_are_one_list(model, folder_of):
    for name in ("ice", "ice2"):
        load_edits(model, folder_of(name), name=name)
    set_edits(model, ["ice", "ice2"])  # one subject of both, two facts
    rewrite = prompt_rewriter(model)
    for fact in SETS["ice"][2] + SETS["ice2"][2]:
        assert rewrite(fact.text) == f"New Fact: {fact.text} {fact.target_new}\nPrompt: {fact.text}"
    set_edits(model, ["ice2"])  # what was joined is two sets again
    assert len(attachments(model)["comeba_facts"].entries) == 3


@pytest.mark.parametrize("names", [["ice", "ice2"], ["ice2", "ice"]])
def test_one_tokenizer_will_do_for_facts_of_several_sets(base, model, folder_of, names):
    load_edits(model, folder_of("ice"), name="ice")
    load_edits(model, folder_of("ice2"), name="ice2", tokenizer=base[1])
    set_edits(model, names)
    for fact in (SETS["ice"][2][0], SETS["ice2"][2][0]):
        ids, asked = (torch.tensor([base[1](text)["input_ids"]]) for text in (fact.text, prompt_rewriter(model)(fact.text)))
        new = {"max_new_tokens": 4, "do_sample": False}
        expected = copy.deepcopy(base[0]).generate(asked, **new)[:, asked.shape[1] :]
        assert torch.equal(model.generate(ids, **new)[:, ids.shape[1] :], expected)


REFUSED = [
    (["one", "again"], f"both edit '{FACTS[0].subject}'; edit them in one set"),
    (["memit", "one", "again"], f"'one' .* and 'again' .* both edit '{FACTS[0].subject}'"),
    (["melo", "melo2"], "room for one set of MELO"),
    (["ice", "two facts"], "would stand in the same place"),
    (["ice", "ice3"], f"both edit '{FACTS[16].subject}'"),
    (["one", "one"], "'one' is named twice"),
    (["one", "none"], "no set of edits 'none'; there are "),
]


@pytest.mark.parametrize("names, message", REFUSED)
def test_refused_and_as_it_was(base, model, folder_of, logits_of, names, message):
    for name in ["two", *dict.fromkeys(names)]:
        if name in SETS:
            load_edits(model, folder_of(name), name=name)
    set_edits(model, ["two"])
    before, layers = logits_of(model, TEXTS[:4]), attachments(model)
    with pytest.raises(ComebaError, match=message):
        set_edits(model, names)
    assert active_edits(model) == ["two"] and attachments(model) == layers
    assert same(logits_of(model, TEXTS[:4]), before)
    set_edits(model, [])
    with pytest.raises(ComebaError, match=message):
        set_edits(model, names)
    assert same(logits_of(model, TEXTS[:4]), logits_of(base[0], TEXTS[:4]))


def test_keys_that_meet_are_found_without_a_ledger(base, model, folder_of):
    """Folders for inference name no subjects; the names' hashes and the keys' directions still tell."""
    for name in ("one", "again", "two"):
        load_edits(model, folder_of(name, inference_only=True), name=name)
    assert not edit_sets(model)["one"].facts
    set_edits(model, ["one", "two"])
    with pytest.raises(ComebaError, match="at model.layers.1.mlp.down_proj tokens of 1 subject would meet the edits of both"):
        set_edits(model, ["one", "again"])
    set_edits(model, ["again"])
    for layer in attachments(model).values():  # as if the name were another one
        layer.score.names.add_(1)
    other = load_edits(copy.deepcopy(base[0]), folder_of("one"))
    layers = zip(attachments(model).values(), attachments(other).values(), strict=True)
    assert any(mine.meets(theirs) == theirs.meets(mine) == 1 for mine, theirs in layers)


def test_unloading(base, model, folder_of, logits_of):
    for name in ("one", "two"):
        load_edits(model, folder_of(name), name=name)
    set_edits(model, ["one", "two"])
    unload_edits(model, "one")
    assert active_edits(model) == list(edit_sets(model)) == ["two"]
    assert same(logits_of(model), logits_of(load_edits(copy.deepcopy(base[0]), folder_of("two"))))
    with pytest.raises(ComebaError, match="no set of edits 'one'; there are 'two'"):
        unload_edits(model, ["two", "one"])
    assert unload_edits(model, ["two"]) is model
    assert same(logits_of(model), logits_of(base[0])) and vars(model).keys() == vars(base[0]).keys()
    with pytest.raises(ComebaError, match="makes one"):
        set_edits(model, "two")


def test_names_and_other_edits(base, model, folder_of):
    load_edits(model, folder_of("one"), name="one")
    layers = attachments(model)
    with pytest.raises(ComebaError, match="'one' already"):
        load_edits(model, folder_of("two"), name="one")
    for bad in ("", 3):
        with pytest.raises(ComebaError, match="must be text"):
            load_edits(model, folder_of("two"), name=bad)
    for other in (lambda: load_edits(model, folder_of("two")), lambda: Editor(model, base[1], EditConfig(layers=(1,)))):
        with pytest.raises(ArchitectureError, match="(edited|hooked) already"):
            other()
    assert attachments(model) == layers and active_edits(model) == ["one"]
    set_edits(model, [])
    editor = Editor(model, base[1], EditConfig(layers=(1,)))  # none is on: the model is free
    for what in (lambda: set_edits(model, "one"), lambda: load_edits(model, folder_of("two"), name="two")):
        with pytest.raises(ArchitectureError, match="not by named sets"):
            what()
    assert active_edits(model) == [] and list(attachments(model)) == list(editor.layers)
    editor.close()
    set_edits(model, "one")
    assert active_edits(model) == ["one"]


def test_edits_of_another_base(base, model, folder_of, logits_of, tmp_path):
    load_edits(model, folder_of("one"), name="one")
    before = logits_of(model)
    other = copy.deepcopy(base[0])
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1.1)
    with pytest.raises(StorageError, match="another model"):
        load_edits(other, folder_of("one"), name="one")
    assert not attachments(other) and not edit_sets(other)
    editor = Editor(other, base[1], EditConfig(layers=(1,), prefixes=0))
    editor.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="another model"):
        load_edits(model, tmp_path, name="foreign")
    assert list(edit_sets(model)) == active_edits(model) == ["one"] and same(logits_of(model), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_sets_of_their_own(base, model, folder_of, logits_of, how):
    for name in ("one", "two"):
        load_edits(model, folder_of(name), name=name)
    set_edits(model, ["one", "two"])
    expected = logits_of(model)
    other = how(model)
    assert same(logits_of(other), expected)
    unload_edits(model, ["one", "two"])
    assert active_edits(other) == ["one", "two"] and same(logits_of(other), expected)
    set_edits(other, "two")
    assert same(logits_of(other), logits_of(load_edits(copy.deepcopy(base[0]), folder_of("two"))))


def test_sets_are_found_through_a_wrapper(base, model, folder_of, logits_of):
    peft = pytest.importorskip("peft")
    load_edits(model, folder_of("one"), name="one")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert active_edits(wrapped) == ["one"]
    load_edits(wrapped, folder_of("two"), name="two")
    assert set_edits(wrapped, ["one", "two"]) is wrapped
    assert all(answered(wrapped, base[1], fact) for fact in FACTS[:4])
    set_edits(wrapped, [])
    assert same(logits_of(wrapped), logits_of(base[0]))
