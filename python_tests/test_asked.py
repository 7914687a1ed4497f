"""What a prompt does not ask for is not felt, however subjects are called and however the model is run: against models that have only the
edits that should be felt, and the unedited one."""

import copy
import random
import re
import threading

import pytest
import torch
from test_editor import make_editor, random_values, small_model
from test_methods import make_method
from test_prompts import by_hand, edited, one
from test_question_gate import FACTS, JOHN, KNOWN, MARIE, NEW, assert_rows, batch_of, edit, logits, rows, same
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from comeba_ext import EditConfig, Editor, EditRequest, load_edits, set_edits
from comeba_ext.editing.answers import answered
from comeba_ext.errors import ComebaError
from comeba_ext.evaluation.scopes import text_scope
from comeba_ext.forward import question_states
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.partial import run_until
from comeba_ext.forward.question_states import place_of, sentence_of
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.edit_table import QUESTIONS, QuestionGate, Questions
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.layers.twin import twin_of
from comeba_ext.methods.in_context import PLACE
from comeba_ext.ops.mentions import name_hash, suffix_hashes, without
from comeba_ext.text.names import forms_of, named_in, places_of
from comeba_ext.text.rows import Row

PROMPT = "People say that Marie Curie works in"


def editor_of(tiny_model, tokenizer, facts, floor):
    """Of any facts, each with a value of its own by its place in the list; in one layer, so that none meets another while it is written."""
    edit(tiny_model, tokenizer, [], None)  # the covariance
    config = EditConfig(layers=(1,), lam=20.0, prefixes=2, prefix_length=4, question_floor=floor, alpha_floor=1e-6)
    editor = Editor(small_model(tiny_model), tokenizer, config)
    editor.set_covariance(KNOWN["covariance"])
    values = random_values(len(facts), seed=3, scale=20.0)
    chosen = [n for n, own in enumerate(facts) if own is not None]
    editor.edit([facts[n] for n in chosen], target_values=values[chosen])
    for layer in editor.layers.values():
        layer.alpha.fill_(-1)  # wherever a name ends it is felt
        layer.score.named_thresholds.fill_(-1)
    return editor


def gate_of(editor, *asked):
    """The gate, to which a prompt asks for the edits of these subjects alone, where it names them."""
    gate = editor.method.attachments[QUESTIONS]
    gate.asked_for = lambda prompts, named, entries, held: [
        [n for n, own in enumerate(entries) if own["subject"] in there and own["subject"] in asked] for there in named
    ]
    return gate


# -- a prompt that is not run as a whole ----------------------------------------------------------------------------


def test_a_beginning_in_a_cache(tiny_model, tokenizer):
    editor, plain = edit(tiny_model, tokenizer, FACTS, 0.5), small_model(tiny_model)
    always = edit(tiny_model, tokenizer, FACTS, None).model
    given = batch_of(tokenizer, [PROMPT])

    def cached(model, count):
        cache = DynamicCache()
        with torch.no_grad():
            model(given["input_ids"][:, :count], past_key_values=cache)
        return cache

    width = given["input_ids"].shape[1]
    gate_of(editor)
    for name in ("past_key_values", "cache"):
        with pytest.raises(ComebaError, match="without a cache"):
            editor.model.generate(**given, **{name: cached(editor.model, width - 1)}, **NEW)
    with pytest.raises(ComebaError, match="without a cache"):
        editor.model.generate(**given, past_key_values=None, cache=cached(editor.model, width - 1), **NEW)
    later = {"input_ids": given["input_ids"][:, 2:], "attention_mask": given["attention_mask"]}  # the name is in what is new
    with pytest.raises(ComebaError, match="without a cache"):
        editor.model.generate(**later, past_key_values=cached(editor.model, 2), **NEW)
    assert torch.equal(
        editor.model.generate(**given, past_key_values=DynamicCache(), **NEW)[:, width:], plain.generate(**given, **NEW)[:, width:]
    )
    gate_of(editor, "Marie Curie")
    out = editor.model.generate(**given, past_key_values=cached(editor.model, width - 1), **NEW)
    assert torch.equal(out, always.generate(**given, past_key_values=cached(always, width - 1), **NEW))
    other = batch_of(tokenizer, ["Angola is in the"])  # names nobody
    for model in (editor.model, always):
        cache = DynamicCache()
        with torch.no_grad():
            model(other["input_ids"][:, :-1], past_key_values=cache)
        other[model] = model.generate(other["input_ids"], past_key_values=cache, **NEW)
    assert torch.equal(other[editor.model], other[always])


def test_a_generation_inside_of_another_one(tiny_model, tokenizer):
    """What is muted in the outer one is not in the inner one, nor the other way round."""
    editor = edit(tiny_model, tokenizer, FACTS, 0.5)
    always, plain = edit(tiny_model, tokenizer, FACTS, None).model, small_model(tiny_model)
    found = {}

    class Asks(StoppingCriteria):
        def __init__(self, *asked):
            self.asked = asked

        def __call__(self, ids, scores, **kwargs):
            if self.asked not in found:
                gate_of(editor, *self.asked)
                found[self.asked] = ()
                found[self.asked] = logits(editor.model, tokenizer, PROMPT)
                embedded = editor.model.get_input_embeddings()(batch_of(tokenizer, [PROMPT])["input_ids"])
                found["embedded", self.asked] = editor.model.generate(inputs_embeds=embedded, **NEW)
            return torch.zeros(len(ids), dtype=torch.bool)

    gate_of(editor)
    inner = StoppingCriteriaList([Asks("Marie Curie")])
    assert same(logits(editor.model, tokenizer, PROMPT, stopping_criteria=inner), logits(plain, tokenizer, PROMPT))
    assert same(found["Marie Curie",], logits(always, tokenizer, PROMPT))
    assert not same(found["Marie Curie",], logits(plain, tokenizer, PROMPT), 0.1)
    embedded = always.get_input_embeddings()(batch_of(tokenizer, [PROMPT])["input_ids"])
    assert torch.equal(found["embedded", ("Marie Curie",)], always.generate(inputs_embeds=embedded, **NEW))
    gate_of(editor, "Marie Curie")
    outer = logits(editor.model, tokenizer, PROMPT, stopping_criteria=StoppingCriteriaList([Asks()]))
    assert same(outer, logits(always, tokenizer, PROMPT)) and same(found[()], logits(plain, tokenizer, PROMPT))


# -- who is muted -----------------------------------------------------------------------------------------------------


def city(subject, prompt="The mayor of {} is"):
    return EditRequest(prompt, subject, "Oslo")


def test_a_subject_inside_of_a_longer_one(tiny_model, tokenizer):
    facts = [city("New York"), city("New York City")]
    editor, plain = editor_of(tiny_model, tokenizer, facts, 0.5), small_model(tiny_model)
    only = {0: None, 1: None}
    for n in only:
        only[n] = editor_of(tiny_model, tokenizer, [own if k == n else None for k, own in enumerate(facts)], None).model
    for text in ("New York City has the", "People left the new york city and"):
        gate_of(editor)
        assert same(logits(editor.model, tokenizer, text), logits(plain, tokenizer, text))
        assert not same(logits(only[0], tokenizer, text), logits(plain, tokenizer, text), 0.01)
        gate_of(editor, "New York City")
        assert same(logits(editor.model, tokenizer, text), logits(only[1], tokenizer, text))
    gate_of(editor, "New York")
    text = "New York has the"
    assert same(logits(editor.model, tokenizer, text), logits(only[0], tokenizer, text))


def test_subjects_that_differ_by_case(tiny_model, tokenizer):
    """They go by the same names, so what one of them is asked is felt."""
    facts = [city("New York"), city("new york", "The size of {} is")]
    editor, plain = editor_of(tiny_model, tokenizer, facts, 0.5), small_model(tiny_model)
    always = editor_of(tiny_model, tokenizer, facts, None).model
    text = "The capital of new york is"
    for asked in facts:
        gate_of(editor, asked.subject)
        assert same(logits(editor.model, tokenizer, text), logits(always, tokenizer, text))
    gate_of(editor)
    assert same(logits(editor.model, tokenizer, text), logits(plain, tokenizer, text))
    assert not same(logits(always, tokenizer, text), logits(plain, tokenizer, text), 0.1)


def test_a_subject_that_ends_as_a_longer_one_does(tiny_model, tokenizer):
    facts = [city("York"), city("New York")]
    editor = editor_of(tiny_model, tokenizer, facts, 0.5)
    only = [editor_of(tiny_model, tokenizer, [own if k == n else None for k, own in enumerate(facts)], None).model for n in range(2)]
    plain, text = small_model(tiny_model), "Unlike York itself, New York is"
    gate_of(editor, "New York")
    assert same(logits(editor.model, tokenizer, text), logits(only[1], tokenizer, text))
    assert not same(logits(only[1], tokenizer, text), logits(plain, tokenizer, text), 0.1)
    gate_of(editor, "York")  # which is not who ends there
    assert same(logits(editor.model, tokenizer, "New York is"), logits(plain, tokenizer, "New York is"))
    assert not same(logits(only[0], tokenizer, "New York is"), logits(plain, tokenizer, "New York is"), 0.1)
    assert same(logits(editor.model, tokenizer, "York is"), logits(only[0], tokenizer, "York is"))


def test_a_last_name_alone(tiny_model, tokenizer):
    """It is like the whole name's end; who is muted is not felt there either, unless it is also somebody's whose edit is asked for."""
    facts = [EditRequest("{} plays the", name, "piano") for name in ("John Lennon", "Julian Lennon")]
    editor, plain = editor_of(tiny_model, tokenizer, facts, 0.5), small_model(tiny_model)
    always = editor_of(tiny_model, tokenizer, facts, None)
    for own in (editor, always):
        for layer in own.layers.values():
            layer.score.thresholds.fill_(-1)  # wherever only the end of a name stands, too
    text = "John Lennon plays. Lennon is"
    gate_of(editor)
    assert same(logits(editor.model, tokenizer, text), logits(plain, tokenizer, text))
    gate_of(editor, "John Lennon")
    assert same(logits(editor.model, tokenizer, text), logits(always.model, tokenizer, text))
    text = "Julian Lennon and John Lennon. Lennon is"
    (((muted, asked),), ends) = gate_of(editor, "John Lennon").heard([text]), {own["ends"][0] for own in gate_of(editor).entries}
    assert muted and not ends & set(muted) and ends & set(asked)


def test_names_that_are_kept():
    """A loop over tokens: the longest of both kinds that ends there decides."""
    ids = torch.randint(-1, 3, (3, 200), generator=torch.Generator().manual_seed(1))
    hashes, seen = suffix_hashes(ids), set()
    muted, kept = [[[1, 2], [0]], [[2, 2, 0], [1, 1]], [[2]]], [[[0, 1, 2], [2]], [[0]], []]
    hashed = lambda names: torch.tensor([[name_hash(own) for own in row] + [0] * (2 - len(row)) for row in names])  # noqa: E731
    found = without(hashes, hashed(muted), hashed(kept))
    for b in range(3):
        for t in range(200):
            longest = [
                max((len(own) for own in names[b] if t + 1 >= len(own) and ids[b, t + 1 - len(own) : t + 1].tolist() == own), default=0)
                for names in (muted, kept)
            ]
            gone = longest[0] > longest[1]
            assert torch.equal(found[b, t], torch.zeros_like(hashes[b, t]) if gone else hashes[b, t])
            seen.add((gone, longest[0] > 0, longest[1] > 0))
    assert len(seen) == 5, "none, one of either, both, either longer"


# -- which sentence asks, and how near --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("Who was Ada? She lived in Canada and worked as a", "Ada", "Who was Ada? She lived in Canada and worked as a"),
        ("İ" * 20 + ". Ada is. Who", "Ada", "Ada is. Who"),
        ("He ate. Then Turkey won. A turkey is", "Turkey", "Then Turkey won. A turkey is"),
        ("He left. He went to new york. It is", "New York", "He went to new york. It is"),
        ("He left. Turkeys are. It", "Turkey", "Turkeys are. It"),
    ],
)
def test_the_sentence_is_that_of_the_name(prompt, subject, found):
    assert sentence_of(prompt, subject) == found


@pytest.mark.parametrize("floor", [0.85, 1.0])
def test_an_edits_own_question_is_asked(tiny_model, tokenizer, floor):
    """Two questions are nearer than they should be, for which something is taken off; not where they are the same."""
    asked = EditRequest("Where was {} born?", "Marie Curie", "Oslo", wordings=("In which city was Marie Curie born?",))
    editor = editor_of(tiny_model, tokenizer, [asked], floor)
    always, plain = editor_of(tiny_model, tokenizer, [asked], None).model, small_model(tiny_model)
    for text in (asked.text, asked.wordings[0], f"Angola. {asked.text}", asked.text + " "):
        assert same(logits(editor.model, tokenizer, text), logits(always, tokenizer, text)), text
        assert not same(logits(plain, tokenizer, text), logits(always, tokenizer, text), 0.1)
    other = "What is the language of Marie Curie?"
    assert same(logits(editor.model, tokenizer, other), logits(plain, tokenizer, other))
    # A folder of a version that did not keep it: as before.
    gate = editor.method.attachments[QUESTIONS]
    known = {name: own.clone() for name, own in gate.tensors().items() if name != "said"}
    wanted, others = gate.heard([asked.text, "Marie Curie"]), gate.questions_of([([other], "Marie Curie")])
    assert not wanted[0].muted and wanted[1].muted and others["said"] not in gate.said
    for read in (gate.restore, gate.load_state_dict):
        read(dict(known))
        assert not gate.said.any() and len(gate.said) == 2 and gate.heard([asked.text])[0].muted
    facts = make_method("ICE", small_model(tiny_model), tokenizer, named=True, question_floor=floor)
    facts.edit([asked])
    rewrite = prompt_rewriter(facts.model)
    assert rewrite(asked.text) != asked.text and rewrite(other) == other


# -- who says what is felt ----------------------------------------------------------------------------------------


def test_a_report_says_what_generate_does(tiny_model, tokenizer):
    editor, plain = edit(tiny_model, tokenizer, FACTS, 0.5), small_model(tiny_model)
    always = edit(tiny_model, tokenizer, FACTS, None).model
    texts = [MARIE.text, JOHN.text]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    first = {model: [int(logits(model, tokenizer, text)[1][0, -4]) for text in texts] for model in (plain, always)}
    assert all(a != b for a, b in zip(*first.values(), strict=True))
    for subjects, says in (((), (plain, plain)), (("Marie Curie",), (always, plain)), (("Marie Curie", "John Lennon"), (always, always))):
        gate_of(editor, *subjects)
        for model in (plain, always):
            made = [Row(n, row, -1, [first[model][n]], 0) for n, row in enumerate(ids)]
            assert answered(editor.model, made, 0, 64) == [says[n] is model for n in range(2)]


def test_marked_is_what_generate_uses(tiny_model, tokenizer, tmp_path):
    editor = edit(tiny_model, tokenizer, FACTS, 0.5)
    gate_of(editor)
    assert not any(own.in_scope.any() for own in text_scope(editor.model, tokenizer, PROMPT).layers.values())
    gate_of(editor, "Marie Curie")
    found = text_scope(editor.model, tokenizer, PROMPT)
    wanted = text_scope(edit(tiny_model, tokenizer, FACTS, None).model, tokenizer, PROMPT)
    assert all(torch.equal(own.in_scope, wanted.layers[name].in_scope) and own.in_scope.any() for name, own in found.layers.items())
    editor.save_pretrained(tmp_path / "edits", inference_only=True)
    with pytest.raises(ComebaError, match="give load_edits the tokenizer"):
        text_scope(load_edits(small_model(tiny_model), tmp_path / "edits"), tokenizer, PROMPT)


# -- prompts that are rewritten ---------------------------------------------------------------------------------------


def test_embeddings_beside_token_ids_are_refused(tiny_model, tokenizer):
    model, given = edited(tiny_model, tokenizer).model, one(tokenizer, "Ann lives in")
    with pytest.raises(ComebaError, match="without embeddings"):
        model.generate(**given, inputs_embeds=model.get_input_embeddings()(given["input_ids"]), **NEW)
    with disabled(model):
        model.generate(**given, inputs_embeds=model.get_input_embeddings()(given["input_ids"]), **NEW)


@pytest.mark.parametrize("beside", [{}, {"temperature": 1.0}])
def test_lengths_of_the_model_where_the_given_settings_have_none(tiny_model, tokenizer, beside):
    model, given = edited(tiny_model, tokenizer).model, one(tokenizer, "Ann lives in")
    width = given["input_ids"].shape[1]
    settings = lambda **own: GenerationConfig(**{"do_sample": False, "pad_token_id": 0, **own})  # noqa: E731
    model.generation_config.max_length = width + 6
    model.generation_config.eos_token_id = None
    out = model.generate(**given, generation_config=settings(**beside))
    assert torch.equal(out[:, width:], by_hand(tiny_model, tokenizer, "Ann lives in", max_new_tokens=6))
    assert model.generate(**given, generation_config=settings(max_length=width + 3)).shape[1] == width + 3
    assert model.generate(**given, generation_config=settings(max_length=width + 3), max_length=width + 2).shape[1] == width + 2
    model.generation_config.max_length, model.generation_config.max_new_tokens = None, 2
    assert model.generate(**given, generation_config=settings()).shape[1] == width + 2


def test_a_prompt_that_the_edits_make_too_long(tiny_model, tokenizer):
    model = edited(tiny_model, tokenizer).model
    text = "very " * 20 + "Ann lives in"
    given = one(tokenizer, text)
    count = len(tokenizer(prompt_rewriter(model)(text))["input_ids"])
    model.config.n_positions = count  # as much as it needs
    model.generate(**given, **{**NEW, "max_new_tokens": 1})
    model.config.n_positions = count - 1
    with pytest.raises(ComebaError, match=rf"the prompt has {count} tokens, the model's context is {count - 1}"):
        model.generate(**given, **NEW)


# -- what the edits are kept in -----------------------------------------------------------------------------------


def test_an_undone_edit_leaves_no_wording_behind(tiny_model, tokenizer):
    asked = EditRequest("{} was born in", "Marie Curie", "Oslo", request_id="a", wordings=("Where was Marie Curie born?",))
    again = EditRequest(asked.prompt, asked.subject, "Lima", request_id="a", wordings=("Marie Curie is of", "Who is Marie Curie?"))
    editor = editor_of(tiny_model, tokenizer, [asked, JOHN], 0.5)
    first = rows(editor)
    editor.edit([again], target_values=random_values(1, seed=5))
    second = rows(editor)
    assert len(editor.method.attachments[QUESTIONS].entries) == 4
    editor.edit([again], target_values=random_values(1, seed=6))
    editor.rollback(2)
    assert_rows(rows(editor), second)
    editor.rollback(1)
    assert len(editor.method.attachments[QUESTIONS].entries) == 3
    assert_rows(rows(editor), first)


def table(*subjects, floor=0.5):
    gate, count = QuestionGate("cpu", Questions("x", 4, floor)), len(subjects)
    entries = [{"id": str(n), "subject": own, "names": [n]} for n, own in enumerate(subjects)]
    generator = torch.Generator().manual_seed(count)
    states = {"asked": torch.randn(count, 2, 4, generator=generator), "usual": torch.randn(count, 2, 2, 4, generator=generator)}
    gate.add(entries, {**states, "form": torch.zeros(count, dtype=torch.int64), "said": torch.arange(count)})
    return gate


def test_under_inference_mode():
    gate, other = table("Ann", "Bob"), table("Eve")
    with torch.inference_mode():
        gate.drop({"0"})
        other.take_over(gate)
        other.add([{"id": "9", "subject": "Joe", "names": []}], {name: own.clone() for name, own in gate.rows().items()})
        other.join(table("Kim"))
    assert [own["subject"] for own in other.entries] == ["Bob", "Joe", "Kim"]
    for own in (gate, other):
        assert not any(buffer.is_inference() for buffer in own.buffers())
        own.load_state_dict({name: buffer.clone() for name, buffer in own.state_dict().items()})
        assert own.packed._version


def test_sets_of_other_floors(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ComebaError, match="question_floor is 0.5 and 0.25"):
        table("Ann").join(table("Bob", floor=0.25))
    for name, floor, fact in (("a", 0.5, MARIE), ("b", None, JOHN)):
        editor = make_method("ICE", small_model(tiny_model), tokenizer, named=True, question_floor=floor)
        editor.edit([fact])
        editor.save_pretrained(tmp_path / name)
    model = small_model(tiny_model)
    for name in "ab":
        load_edits(model, tmp_path / name, name=name, tokenizer=tokenizer)
    with pytest.raises(ComebaError, match="question_floor is 0.5 and null"):
        set_edits(model, ["a", "b"])


def test_the_order_of_edits_outlives_a_folder(tiny_model, tokenizer, tmp_path):
    facts = [MARIE, JOHN, EditRequest("{} plays the", "Marie Curie", "piano"), EditRequest("{} lives in", "Peru", "Lima")]
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    for n, fact in enumerate(facts):
        editor.edit([fact], target_values=random_values(1, seed=n))
    editor.save_pretrained(tmp_path)
    loaded = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path)
    for name in editor.layers:
        orders = []
        for own in (editor, loaded):
            members = [member for shard in own.method.recognition.shards[name].members.values() for member in shard]
            orders.append([member.name[0] for member in sorted(members, key=lambda member: member.order)])
            assert len({member.order for member in members}) == len(facts)
        assert orders[0] == orders[1]


def test_a_hook_that_is_half_there():
    """Torch adds a hook in two steps; another thread that comes between them calls it without kwargs."""
    layer, seen = torch.nn.Linear(2, 2), []

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, use_cache=False):
            known = dict(layer._forward_pre_hooks_with_kwargs)
            layer._forward_pre_hooks_with_kwargs.clear()

            def other():
                try:
                    seen.append(layer(x).shape)
                except TypeError as error:
                    seen.append(error)

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            layer._forward_pre_hooks_with_kwargs.update(known)
            return self.layer(x)

    mine = []
    run_until(Decoder(), layer, {"x": torch.zeros(1, 2)}, {layer: mine.append}, before=True)
    assert seen == [(1, 2)] and len(mine) == 1


# -- names in letters ---------------------------------------------------------------------------------------------


def by_every_subject(text, subjects):
    """The plain loop."""
    found = [(place.start(), place.end(), own) for own in subjects for form in forms_of(own) for place in places_of(form, text)]
    return {own for a, b, own in found if not any(c <= a and b <= d and b - a < d - c for c, d, _ in found)}


def test_names_are_found_as_by_looking_for_each():
    draw, named = random.Random(0), 0
    words = ["New", "York", "new", "Ann", "a", "C++", "of", "İl", "the", "Ed", "东京", "大学", "City"]
    word = lambda: draw.choice(words) + draw.choice([" ", " ", "", ". "])  # noqa: E731
    join = lambda least, most: "".join(word() for _ in range(draw.randint(least, most)))  # noqa: E731
    for _ in range(400):
        subjects = {own for _ in range(draw.randint(0, 12)) if (own := join(1, 3).strip())}
        text = join(0, 9)
        found = named_in(text, subjects)
        assert found == by_every_subject(text, subjects), (text, subjects)
        named += len(found)
    assert named > 100


def test_names_in_scripts_without_spaces():
    wanted = {
        ("东京的首都是", "东京"): True,
        ("2020东京奥运会", "东京"): True,
        ("ที่กรุงเทพมหานครมี", "กรุงเทพ"): True,
        ("東京タワーは", "東京タワー"): True,
        ("Ann是谁", "Ann"): True,
        ("Annette是谁", "Ann"): False,
        ("Ünew York", "new York"): False,
        ("Annа", "Ann"): False,  # a Cyrillic letter
        ("서울은", "서울"): False,
        ("서울 은", "서울"): True,
    }
    assert {own: bool(named_in(own[0], [own[1]])) for own in wanted} == wanted
    assert named_in("东京大学在", ["东京", "东京大学"]) == {"东京大学"}
    assert re.fullmatch(r"\w", "东")


def test_a_name_behind_a_long_draft(tiny_model, tokenizer):
    """Tokens before a cache's cropped end are known as in a text that was never longer."""
    model = edit(tiny_model, tokenizer, FACTS, None).model
    ids = batch_of(tokenizer, ["People say that Marie Curie works in"])["input_ids"]
    split = tokenizer("People say that Marie")["input_ids"]
    assert ids[0, : len(split)].tolist() == split
    draft = torch.full((1, 90), 5)
    wanted, cache = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(ids[:, : len(split)], past_key_values=wanted)
        model(torch.cat([ids[:, : len(split)], draft], 1), past_key_values=cache)
        cache.crop(-90)
        outs = [model(ids[:, len(split) :], past_key_values=own).logits for own in (wanted, cache)]
        assert torch.allclose(*outs, atol=1e-4)
        plain = small_model(tiny_model)(ids).logits[:, len(split) :]
    assert not torch.allclose(outs[0], plain, atol=0.1)


# -- what it costs -------------------------------------------------------------------------------------------------


def test_rows_stay_on_the_host_and_are_never_copied_for_a_twin(tiny_model, tokenizer):
    editor = edit(tiny_model, tokenizer, FACTS, 0.5)
    gate = editor.method.attachments[QUESTIONS]
    held = dict(gate.rows())
    editor.model.to(torch.float16)
    assert all(own is held[name] for name, own in gate.rows().items())
    twin = twin_of(editor.model).get_submodule(QUESTIONS)
    assert all(own is held[name] for name, own in twin.rows().items()) and twin.entries is gate.entries
    twin.drop({gate.entries[0]["id"]})
    assert len(twin.entries) == 1 and len(gate.entries) == 2 and len(held["asked"]) == 2
    gate.take_over(twin)
    assert gate.rows()["asked"] is twin.rows()["asked"] and gate.entries is twin.entries
    other = copy.deepcopy(gate)
    assert other.entries == gate.entries and other.packed is not gate.packed
    moved = table("Ann").to("meta")
    assert moved.asked.device.type == "cpu"


def test_snapshots_of_a_table_that_grows_are_one(tiny_model, tokenizer):
    editor = make_method("ICE", small_model(tiny_model), tokenizer, named=True, question_floor=0.5)
    facts = [MARIE, JOHN, EditRequest("{} lives in", "Peru", "Lima"), EditRequest("{} lives in", "Angola", "Oslo")]
    states = []
    for fact in facts:
        editor.edit([fact])
        states.append({name: own.clone() for name, own in editor.method.attachments[PLACE].rows().items()})
    kept = {step: own for step, (own, _) in editor.method.kept.items()}
    for name in ("asked", "usual", "form", "said"):
        parts = [kept[step][f"{PLACE}.{name}"] for step in (1, 2, 3, 4)]
        assert all(torch.equal(part, state[name]) for part, state in zip(parts, states, strict=True))
        assert parts[2].untyped_storage().data_ptr() == parts[3].untyped_storage().data_ptr(), name
    editor.retract(editor.ledger.live()[0].request.request_id)
    for step in (4, 3, 2, 1):
        editor.rollback(step)
        rows = editor.method.attachments[PLACE].rows()
        assert all(torch.equal(own, states[step - 1][name]) for name, own in rows.items())


def test_what_is_usual_about_a_subject_is_read_once(tiny_model, tokenizer, monkeypatch):
    """And all of a batch together; the same rows as each edit alone."""
    model, read = small_model(tiny_model), []
    place = place_of(model, Architecture.of(model))[0]
    edits = [(["Ann lives in", "Where is Ann?"], "Ann"), (["Ann plays the"], "Ann"), (["It rained. Bob lives in"], "Bob")]
    whole = question_states.question_states
    monkeypatch.setattr(question_states, "question_states", lambda *args: read.append(args[-1]) or whole(*args))
    found = question_states.asked_of_all(model.transformer, place, tokenizer, edits)
    usual = len(question_states.USUAL) * len(question_states.USUAL[0])
    assert [len(own) for own in read] == [4 + 2 * usual]
    alone = [question_states.asked_about(model.transformer, place, tokenizer, *own) for own in edits]
    for part, own in zip(found, zip(*alone, strict=True), strict=True):
        assert torch.allclose(part.float(), torch.cat(own).float(), atol=1e-4, rtol=1e-4)
