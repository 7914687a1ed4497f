"""What a prompt asks, told by the model's own states; edits in the prompt that are read only where they are asked for."""

import threading

import numpy as np
import pytest
import torch
from test_editor import small_model
from test_methods import make_method
from test_prompts import NEW, one
from test_training import trained_serac

from comeba_ext import EditRequest, load_edits, set_edits
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.question_states import USUAL, VIEWS, Asked, nearness, place_of, question_states, sentence_of
from comeba_ext.layers.prompts import prompt_readers, prompt_rewriter
from comeba_ext.methods.in_context import PLACE
from comeba_ext.methods.serac import MARK

FACTS = [EditRequest("{} lives in", "Ann", "Rome"), EditRequest("{} plays the", "Ann", "drums"), EditRequest("{} lives in", "Bob", "Oslo")]
PROMPTS = ["Ann lives in", "Where does Ann live? ", "Bob", "It rained. Bob then plays the"]


def literal(model, place, tokenizer, prompts):
    """One prompt a pass, the module's input read by a hook of our own."""
    module, found = dict(model.named_modules())[place], []
    for prompt in prompts:
        for view in VIEWS:
            seen = []
            handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(torch.tensor([tokenizer(view.replace("{}", prompt.rstrip()))["input_ids"]]))
            handle.remove()
            found.append(seen[0].reshape(-1, seen[0].shape[-1])[-1].double().numpy())
    return np.stack(found).reshape(len(prompts), len(VIEWS), -1)


def full_name(model):
    architecture = Architecture.of(model)
    return f"{architecture.decoder}.{place_of(model, architecture)[0]}"


def near_by_hand(model, tokenizer, prompt, request):
    """The cosines of what is left of both prompts' last sentences' states without the mean of the others', in float64; two questions are
    0.2 too near."""
    place = full_name(model)
    states = {}
    for text in (request.text, prompt):
        usual = USUAL[1 if text.endswith("?") else 0]
        others = literal(model, place, tokenizer, [own.replace("{}", request.subject) for own in usual])
        states[text] = literal(model, place, tokenizer, [text.split(". ")[-1]])[0] - others.mean(0)
    pairs = zip(states[request.text], states[prompt], strict=True)
    both = request.text.endswith("?") and prompt.endswith("?")
    return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]) - (0.2 if both else 0)


def test_states_are_the_mlps_inputs_at_the_last_token(tiny_model, tokenizer):
    model = small_model(tiny_model)
    architecture = Architecture.of(model)
    place, width = place_of(model, architecture)
    assert place == f"h.{int(0.9 * model.config.n_layer)}.mlp" and width == model.config.n_embd
    states = question_states(model.transformer, place, tokenizer, PROMPTS)
    assert states.shape == (len(PROMPTS), len(VIEWS), width) and states.dtype == torch.float32
    wanted = literal(model, full_name(model), tokenizer, PROMPTS)
    assert np.abs(states.double().numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
    long = "Bob " * (model.config.n_positions - 4) + "lives in"  # and no room for the second view
    assert torch.isfinite(question_states(model.transformer, place, tokenizer, [long])).all()
    asked, usual, state = torch.randn(5, 2, 7), torch.randn(5, 2, 2, 7), torch.randn(2, 7)
    forms = [0, 1, 1, 0, 1]
    for form, prompt in enumerate(("Ann is", "Who is Ann? ")):
        for n, value in enumerate(nearness(prompt, state, Asked(asked, usual, torch.tensor(forms)))):
            a, b = asked[n].double().numpy(), (state - usual[n, form]).double().numpy()
            cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
            assert value.item() == pytest.approx(np.mean(cosines) - (0.2 if form and forms[n] else 0), abs=1e-6)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Ann lives in", "Ann lives in"),
        ("It rained. Then Ann lives in", "Then Ann lives in"),
        ("Ann is here! Where does Ann live? Tell me", "Where does Ann live? Tell me"),
        ("One line\nAnn. She", "Ann. She"),
        ("A text. Without her", "A text. Without her"),
        ("", ""),
    ],
)
def test_the_sentence_that_names_a_subject_last(prompt, found):
    assert sentence_of(prompt, "Ann") == found


@pytest.fixture
def asked(tiny_model, tokenizer):
    """An edited model whose floor lies between two prompts' nearness to its first fact, these prompts, and the floor."""
    model = small_model(tiny_model)
    prompts = ["Ann lives near", "Ann and", "Ann was", "He saw Ann lives", "Why is Ann?"]
    near = sorted((near_by_hand(model, tokenizer, text, FACTS[0]), text) for text in prompts)
    floor = float(near[1][0] + near[2][0]) / 2
    assert near[2][0] - near[1][0] > 1e-3 and floor < 1
    editor = make_method("ICE", model, tokenizer, named=True, question_floor=floor)
    editor.edit(FACTS[:1])
    return editor, [text for _, text in near], floor


def test_a_fact_is_read_where_it_is_asked_for(asked, tiny_model, tokenizer):
    editor, prompts, _ = asked
    rewrite = prompt_rewriter(editor.model)
    assert rewrite("Ann lives in") == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    for n, prompt in enumerate(prompts):
        assert (rewrite(prompt) != prompt) == (n >= 2), prompt
        alone = torch.equal(
            editor.model.generate(**one(tokenizer, prompt), **NEW), small_model(tiny_model).generate(**one(tokenizer, prompt), **NEW)
        )
        assert alone or n >= 2
    assert rewrite("Bob lives in") == "Bob lives in"
    held = editor.method.attachments[PLACE]
    near = near_by_hand(small_model(tiny_model), tokenizer, prompts[0], FACTS[0])
    states = held.states([prompts[0]])[0]
    assert nearness(prompts[0], states, Asked(held.asked, held.usual, held.form)).item() == pytest.approx(near, abs=1e-4)


def test_of_two_facts_about_a_subject_the_one_that_is_asked_for(tiny_model, tokenizer):
    model = small_model(tiny_model)
    other = near_by_hand(model, tokenizer, FACTS[1].text, FACTS[0])
    editor = make_method("ICE", model, tokenizer, named=True, facts=2, question_floor=min(float(other) + 0.05, 1.0))
    editor.edit(FACTS[:2])
    rewrite = prompt_rewriter(model)
    assert rewrite(FACTS[0].text) == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    editor.edit(FACTS[2:])
    before = rewrite(FACTS[1].text)
    assert "drums" in before and "Rome" not in before
    held = editor.method.attachments[PLACE]
    assert len(held.asked) == len(held.usual) == len(held.entries) == 3
    rows = held.asked.clone()
    editor.retract([held.entries[0]["id"]])
    assert torch.equal(held.asked, rows[1:]) and [own["fact"] for own in held.entries] == ["Ann plays the drums", "Bob lives in Oslo"]
    editor.rollback(2)
    assert torch.equal(held.asked, rows)
    editor.rollback(0)
    assert held.asked.shape == (0, *rows.shape[1:]) and rewrite(FACTS[0].text) == FACTS[0].text


def test_other_edits_of_the_model_change_nothing_of_what_is_asked(asked, tiny_model, tokenizer, tmp_path):
    """States are the unedited model's, also where its weights are edited beside."""
    editor, _, _ = asked
    expected = editor.method.attachments[PLACE].states(PROMPTS)
    editor.save_pretrained(tmp_path / "facts")
    weights = make_method("FT", small_model(tiny_model), tokenizer, layers=[1], steps=20)
    weights.edit(FACTS[2:])
    weights.save_pretrained(tmp_path / "weights")
    model = small_model(tiny_model)
    for name in ("facts", "weights"):
        load_edits(model, tmp_path / name, name=name, tokenizer=tokenizer)
    set_edits(model, ["facts", "weights"])
    (held,) = prompt_readers(model)
    assert torch.equal(held.states(PROMPTS), expected)
    edited = question_states(model.transformer, held.questions.place, tokenizer, PROMPTS)
    assert not torch.allclose(edited, expected, rtol=1e-3)


def test_saved_loaded_and_beside_others(asked, tiny_model, tokenizer, tmp_path):
    editor, prompts, floor = asked
    expected = [prompt_rewriter(editor.model)(prompt) for prompt in prompts]
    editor.save_pretrained(tmp_path / "a")
    loaded = load_edits(small_model(tiny_model), tmp_path / "a", tokenizer=tokenizer)
    assert [prompt_rewriter(loaded)(prompt) for prompt in prompts] == expected
    other = make_method("ICE", small_model(tiny_model), tokenizer, named=True, question_floor=floor)
    other.edit(FACTS[2:])
    other.save_pretrained(tmp_path / "b")
    both = small_model(tiny_model)
    for name in "ab":
        load_edits(both, tmp_path / name, name=name, tokenizer=tokenizer)
    set_edits(both, ["a", "b"])
    rewrite = prompt_rewriter(both)
    assert [rewrite(prompt) for prompt in prompts] == expected and "Oslo" in rewrite("Bob lives in")
    without = load_edits(small_model(tiny_model), tmp_path / "a")
    assert prompt_rewriter(without)("Eve plays") == "Eve plays"  # names nobody: nothing to ask
    with pytest.raises(ComebaError, match="give load_edits the tokenizer"):
        prompt_rewriter(without)("Ann lives in")
    held = editor.method.attachments[PLACE]
    with pytest.raises(ValueError, match="the table.s edits and asked and usual and form and said are not equally many"):
        held.restore({**held.own_buffers(), "asked": held.asked[:0]})


@pytest.mark.parametrize("floor", [2, -1.5, "high", True, float("nan")])
def test_floors_that_are_none(tiny_model, tokenizer, floor):
    with pytest.raises(ConfigError, match="question_floor must be null or a number from -1 to 1, got"):
        make_method("ICE", small_model(tiny_model), tokenizer, named=True, question_floor=floor)


def test_a_floor_needs_names(tiny_model, tokenizer):
    with pytest.raises(ConfigError, match="needs named"):
        make_method("ICE", small_model(tiny_model), tokenizer, question_floor=0.1)


def test_other_threads_go_on_while_a_prompt_is_read(asked, tiny_model, tokenizer):
    """The pass that reads a prompt stops halfway; those of other threads must not."""
    editor, _, _ = asked
    held, model = editor.method.attachments[PLACE], editor.model
    expected_states, given = held.states(PROMPTS), one(tokenizer, "Eve plays the")
    expected = small_model(tiny_model).generate(**given, **{**NEW, "max_new_tokens": 20})
    wrong, done = [], threading.Event()

    def generate():
        while not done.is_set():
            try:
                if not torch.equal(model.generate(**given, **{**NEW, "max_new_tokens": 20}), expected):
                    wrong.append("another text")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert torch.allclose(held.states(PROMPTS), expected_states)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]


def test_a_reader_behind_questions(tiny_model, tokenizer, tmp_path):
    """SERAC keeps its own rows beside, and takes them out together."""
    editor = trained_serac(tiny_model, tokenizer, tmp_path / "e", named=True, question_floor=-1.0)
    editor.edit(FACTS)
    scope, rewrite = editor.method.attachments[PLACE], prompt_rewriter(editor.model)
    keys, usual = scope.keys.clone(), scope.usual.clone()
    assert len(keys) == len(usual) == len(scope.asked) == 3
    assert rewrite("Ann lives in") == f"{MARK} Ann lives in Rome\nPrompt: Ann lives in"
    editor.retract(scope.entries[1]["id"])
    kept = [editor.method.kept[step][0] for step in (1, 2)]
    table, keys_name = f"{PLACE}.table", f"{PLACE}.keys"
    assert kept[0][table] is kept[1][table] and len(kept[0][keys_name]) == 3 and len(kept[1][keys_name]) == 2  # what stays is kept once
    assert torch.equal(scope.keys, keys[[0, 2]]) and torch.equal(scope.usual, usual[[0, 2]])
    editor.save_pretrained(tmp_path / "edits")
    loaded = load_edits(small_model(tiny_model), tmp_path / "edits", tokenizer=tokenizer)
    assert prompt_rewriter(loaded)("Bob lives in") == rewrite("Bob lives in") != "Bob lives in"
    scope.questions = scope.questions._replace(floor=1.0)
    assert rewrite("Bob lives near") == "Bob lives near"  # no nearer than that
