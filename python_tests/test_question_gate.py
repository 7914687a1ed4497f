"""COMEBA-HK's edits that are felt only where they are asked for (``question_floor``), against models that have only those edits."""

import copy
import json
import logging
import threading

import pytest
import torch
from test_editor import assert_same, make_editor, random_values, small_model, snapshot
from test_question_states import near_by_hand
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from comeba_ext import EditConfig, Editor, EditRequest, evaluate, load_edits, set_edits
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.evaluation.probabilities import counterfact_scores
from comeba_ext.evaluation.written import Writing
from comeba_ext.exporting import export_folder, export_merged
from comeba_ext.layers.attachment import attachments, disabled
from comeba_ext.layers.edit_table import QUESTIONS
from comeba_ext.layers.prompts import as_asked
from comeba_ext.ops import mentions

MARIE = EditRequest("{} was born in the city of", "Marie Curie", "Oslo")
JOHN = EditRequest("{} plays the", "John Lennon", "piano")
FACTS = [MARIE, JOHN]
PROMPTS = [
    "Marie Curie was born in the",
    "Marie Curie and",
    "Who is Marie Curie?",
    "It is Paris. Marie Curie speaks",
    "The field of Marie Curie is",
    "People say that Marie Curie works in",
    "Marie Curie plays the",
    "The mother tongue of Marie Curie is",
    "Angola. Where was Marie Curie born?",
]
KNOWN = {}  # of the tiny model, found once
NEW = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def edit(tiny_model, tokenizer, facts, floor):
    if "covariance" not in KNOWN:
        KNOWN["covariance"] = make_editor(small_model(tiny_model), tokenizer).covariance
    config = EditConfig(layers=(1, 2), lam=20.0, prefixes=2, prefix_length=4, question_floor=floor, alpha_floor=1e-6)
    editor = Editor(small_model(tiny_model), tokenizer, config)
    editor.set_covariance(KNOWN["covariance"])
    values = dict(zip((own.fact for own in FACTS), random_values(2, seed=3, scale=20.0), strict=True))
    if facts:
        editor.edit(facts, target_values=torch.stack([values[own.fact] for own in facts]))
    return editor


@pytest.fixture
def gated(tiny_model, tokenizer):
    """An edited model; five prompts about Marie Curie that her edit changes, those least like the edited one first; a floor between the
    second and the third."""
    if "prompts" not in KNOWN:
        plain, always = small_model(tiny_model), edit(tiny_model, tokenizer, FACTS, None).model
        prompts = [text for text in PROMPTS if not same(logits(plain, tokenizer, text), logits(always, tokenizer, text), 0.1)]
        near = sorted((near_by_hand(plain, tokenizer, text, MARIE), text) for text in prompts[:5])
        assert len(near) == 5 and near[2][0] - near[1][0] > 1e-3
        KNOWN["prompts"], KNOWN["floor"] = [text for _, text in near], float(near[1][0] + near[2][0]) / 2
    return edit(tiny_model, tokenizer, FACTS, KNOWN["floor"]), KNOWN["prompts"], KNOWN["floor"]


def batch_of(tokenizer, texts):
    tokenizer.padding_side, side = "left", tokenizer.padding_side
    found = tokenizer(texts, return_tensors="pt", padding=True)
    tokenizer.padding_side = side
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def logits(model, tokenizer, texts, **options):
    """What a model says at each of the tokens that it writes, and these."""
    texts = [texts] if isinstance(texts, str) else texts
    out = model.generate(**batch_of(tokenizer, texts), **{**NEW, **options}, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits, 1), out.sequences


def same(found, wanted, atol=1e-4):
    if found[0].shape != wanted[0].shape or not torch.equal(found[1], wanted[1]):
        return False
    return torch.allclose(found[0], wanted[0], atol=atol, rtol=1e-4)


# -- the hashes -----------------------------------------------------------------------------------------------------


def test_a_text_without_names():
    """A loop over tokens and names, with ids that are unknown among them."""
    ids = torch.randint(-1, 3, (3, 40), generator=torch.Generator().manual_seed(0))
    hashes, names = mentions.suffix_hashes(ids), [[[1, 2], [0]], [[2, 2, 0]], []]
    table = torch.tensor([[mentions.name_hash(own) for own in row] + [0] * (2 - len(row)) for row in names])
    found, gone = mentions.without(hashes, table), 0
    for b, row in enumerate(names):
        for t in range(40):
            ends = any(t + 1 >= len(own) and ids[b, t + 1 - len(own) : t + 1].tolist() == own for own in row)
            assert torch.equal(found[b, t], torch.zeros_like(hashes[b, t]) if ends else hashes[b, t])
            gone += ends
    assert gone > 10


# -- what generate does -----------------------------------------------------------------------------------------------


def test_an_edit_is_felt_where_it_is_asked_for(gated, tiny_model, tokenizer):
    editor, prompts, _ = gated
    plain, always = small_model(tiny_model), edit(tiny_model, tokenizer, FACTS, None).model
    for n, prompt in enumerate(prompts):
        unedited, edited, found = (logits(model, tokenizer, prompt) for model in (plain, always, editor.model))
        assert not same(unedited, edited, 0.1)
        assert same(found, edited if n >= 2 else unedited), prompt
    assert same(logits(editor.model, tokenizer, MARIE.text), logits(always, tokenizer, MARIE.text))
    # Whoever is not edited, and a text that nobody asks for, are as with any edits; so is a pass that nobody generates with.
    ids = batch_of(tokenizer, [prompts[0]])
    with torch.no_grad():
        assert torch.equal(editor.model(**ids).logits, always(**ids).logits)
    assert torch.equal(
        editor.model.generate(**batch_of(tokenizer, ["Angola is"]), **NEW), plain.generate(**batch_of(tokenizer, ["Angola is"]), **NEW)
    )
    with disabled(editor.model):
        assert same(logits(editor.model, tokenizer, prompts[-1]), logits(plain, tokenizer, prompts[-1]))


def test_of_two_subjects_the_one_that_is_asked_for(gated, tiny_model, tokenizer):
    """Muted is a subject, not the text: beside her, whoever is asked for is answered as by a model with only his edit."""
    editor, prompts, _ = gated
    only_john = edit(tiny_model, tokenizer, [JOHN], None).model
    text = f"{prompts[0]} {JOHN.text}"
    gate = editor.method.attachments[QUESTIONS]
    ((muted, _),) = gate.heard([text])
    marie, john = ({*own["names"], *own["ends"]} for own in gate.entries)
    assert set(muted) <= marie | john
    wanted = {
        (False, False): small_model(tiny_model),
        (True, False): only_john,
        (False, True): edit(tiny_model, tokenizer, [MARIE], None).model,
        (True, True): edit(tiny_model, tokenizer, FACTS, None).model,
    }
    seen = set()
    for marie_floor in (-1.0, 2.0):
        for john_floor in (-1.0, 2.0):
            gate.asked_for = lambda prompts, named, entries, held, m=marie_floor, j=john_floor: [
                [n for n, own in enumerate(entries) if own["subject"] in named[0] and (m if own["subject"] == "Marie Curie" else j) < 0]
            ]
            which = (john_floor < 0, marie_floor < 0)
            assert same(logits(editor.model, tokenizer, text), logits(wanted[which], tokenizer, text)), which
            seen.add(round(logits(wanted[which], tokenizer, text)[0].sum().item(), 3))
    assert len(seen) == 4, "each of the four models says something else"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_every_way_to_generate(gated, tiny_model, tokenizer, options):
    """In a batch, padded on the left, of prompts that ask and prompts that do not."""
    editor, prompts, _ = gated
    plain, always = small_model(tiny_model), edit(tiny_model, tokenizer, FACTS, None).model
    texts = [prompts[0], prompts[-1], "Angola is", prompts[1], JOHN.text]
    texts = texts[:1] if "prompt_lookup_num_tokens" in options else texts  # takes one at a time
    given = batch_of(tokenizer, texts)
    out = editor.model.generate(**given, **{**NEW, **options})
    each = len(out) // len(texts)
    for n, text in enumerate(texts):
        model = always if n in (1, 4) else plain
        alone = batch_of(tokenizer, [text])
        wanted = model.generate(**alone, **{**NEW, **options})
        assert torch.equal(out[n * each : (n + 1) * each, -4:], wanted[:, -4:]), text
    torch.manual_seed(0)
    drawn = editor.model.generate(**batch_of(tokenizer, [prompts[0]]), **{**NEW, "do_sample": True, "num_return_sequences": 3})
    torch.manual_seed(0)
    assert torch.equal(drawn, plain.generate(**batch_of(tokenizer, [prompts[0]]), **{**NEW, "do_sample": True, "num_return_sequences": 3}))


def test_a_compiled_pass(gated, tokenizer):
    editor, prompts, _ = gated
    torch._dynamo.reset()
    compiled, ids = torch.compile(editor.model, backend="eager"), batch_of(tokenizer, [prompts[0]])
    gate = editor.method.attachments[QUESTIONS]
    ((muted, _),) = gate.heard(prompts[:1])
    for names in ([muted], [[]], [muted]):
        with gate.context.muting(names), torch.no_grad():
            assert torch.equal(compiled(**ids).logits, editor.model(**ids).logits)
    with gate.context.muting([muted]), torch.no_grad():
        plain = compiled(**ids).logits
    with disabled(editor.model), torch.no_grad():
        assert torch.equal(plain, editor.model(**ids).logits)


def test_in_this_thread_and_this_call_only(gated, tiny_model, tokenizer):
    editor, prompts, _ = gated
    always = edit(tiny_model, tokenizer, FACTS, None).model
    wanted = {
        text: (always if n >= 2 else small_model(tiny_model)).generate(**batch_of(tokenizer, [text]), **NEW)
        for n, text in enumerate(prompts)
    }
    wrong = []

    def ask(texts):
        for _ in range(8):
            for text in texts:
                if not torch.equal(editor.model.generate(**batch_of(own, [text]), **NEW), wanted[text]):
                    wrong.append(text)

    own = copy.deepcopy(tokenizer)
    threads = [threading.Thread(target=ask, args=(part,)) for part in (prompts[:2], prompts[2:], prompts[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

    class Fails(StoppingCriteria):
        def __call__(self, *args, **kwargs):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        editor.model.generate(**batch_of(tokenizer, [prompts[0]]), **NEW, stopping_criteria=StoppingCriteriaList([Fails()]))
    with torch.no_grad():
        ids = batch_of(tokenizer, [prompts[0]])
        assert torch.equal(editor.model(**ids).logits, always(**ids).logits)


def test_evaluate_asks_as_a_user_does(gated, tiny_model, tokenizer):
    editor, prompts, _ = gated
    record = EditRequest(MARIE.prompt, MARIE.subject, "Oslo", locality_prompts=tuple((text, None) for text in prompts[:2]))
    writing = Writing(answer_tokens=4)
    found = evaluate(editor.model, tokenizer, [record], writing=writing, generate=False)
    assert found.locality_written == found.locality == 1.0
    with_all = evaluate(edit(tiny_model, tokenizer, FACTS, None).model, tokenizer, [record], writing=writing, generate=False)
    assert with_all.locality_written < 1.0 and found.reliability == with_all.reliability
    # A pass over texts behind prompts, padded on the right, as it scores them.
    rows = [tokenizer(text)["input_ids"] for text in (prompts[0], prompts[-1], prompts[1])]
    length = max(map(len, rows)) + 2
    ids = torch.tensor([row + [5] * 2 + [0] * (length - 2 - len(row)) for row in rows])
    mask = torch.tensor([[1] * (len(row) + 2) + [0] * (length - 2 - len(row)) for row in rows])
    always = edit(tiny_model, tokenizer, FACTS, None).model
    with torch.no_grad():
        with as_asked(editor.model, rows):
            told = editor.model(input_ids=ids, attention_mask=mask).logits
        for n, model in enumerate((small_model(tiny_model), always, small_model(tiny_model))):
            wanted = model(input_ids=ids[n : n + 1], attention_mask=mask[n : n + 1]).logits[0]
            assert torch.allclose(told[n][: len(rows[n]) + 2], wanted[: len(rows[n]) + 2], atol=1e-4, rtol=1e-4)
    record = EditRequest(MARIE.prompt, MARIE.subject, "Oslo", "Warsaw", locality_prompts=((prompts[0], "Lima"),))
    scores = [
        counterfact_scores(model, tokenizer, [record]).neighborhood_magnitude for model in (editor.model, small_model(tiny_model), always)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) != pytest.approx(scores[2], abs=1e-4)


def test_without_a_tokenizer_it_says_so(gated, tiny_model, tokenizer, tmp_path, caplog):
    editor, prompts, _ = gated
    editor.save_pretrained(tmp_path / "edits", inference_only=True)
    loaded = load_edits(small_model(tiny_model), tmp_path / "edits")
    always = edit(tiny_model, tokenizer, FACTS, None).model
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert same(logits(loaded, tokenizer, prompts[0]), logits(always, tokenizer, prompts[0]))
    assert caplog.text.count("give load_edits the tokenizer") == 1
    with pytest.raises(ComebaError, match="give load_edits the tokenizer"):
        evaluate(loaded, tokenizer, [MARIE])
    assert 'load_edits(model, "path/to/this/folder", tokenizer=tokenizer)' in (tmp_path / "edits" / "README.md").read_text()
    embedded = loaded.get_input_embeddings()(batch_of(tokenizer, [prompts[0]])["input_ids"])
    told = load_edits(small_model(tiny_model), tmp_path / "edits", tokenizer=tokenizer)
    assert torch.equal(told.generate(inputs_embeds=embedded, **NEW), always.generate(inputs_embeds=embedded, **NEW))  # no text to read


# -- what is edited, taken back and saved ---------------------------------------------------------------------------


def rows(editor):
    gate = editor.method.attachments[QUESTIONS]
    found = {}
    for n, own in enumerate(gate.entries):
        found.setdefault(own["id"], [own["subject"]]).extend(row[n].clone() for row in gate.rows().values())
    return found


def assert_rows(found, wanted):
    assert set(found) == set(wanted)
    for key, own in wanted.items():
        assert found[key][0] == own[0]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[key][1:], own[1:], strict=True))


def test_it_follows_the_edits(gated, tiny_model, tokenizer):
    editor, _, _ = gated
    assert list(editor.layers) == [name for name in editor.method.attachments if name != QUESTIONS]
    first = rows(editor)
    assert [own[0] for own in first.values()] == ["Marie Curie", "John Lennon"]
    again = EditRequest(MARIE.prompt, MARIE.subject, "Lima")
    editor.edit([again, EditRequest("The capital of {} is", "Norway", "Lima")], target_values=random_values(2, seed=5))
    second = rows(editor)
    assert len(second) == 3 and len(set(second) & set(first)) == 1
    editor.retract(editor.ledger.live()[0].request.request_id)
    assert len(rows(editor)) == 2
    editor.edit([EditRequest("{} is", "Angola", "Oslo", fact_token="last")], target_values=random_values(1, seed=6))
    assert len(rows(editor)) == 2, "it is edited where it is asked for"
    asked = ("Where is {} located?", "The place of {} is")
    editor.edit([EditRequest("{} is located in", "Peru", "Oslo", wordings=asked)], target_values=random_values(1, seed=7))
    gate, texts = editor.method.attachments[QUESTIONS], ["Peru is located in", "Where is Peru located?", "The place of Peru is"]
    gate.questions = gate.questions._replace(floor=0.79)  # of a question asked again: 1 less what two questions are too near
    assert len(gate.entries) == 2 + 3 and not any(own.muted for own in gate.heard(texts)) and gate.heard(["Peru is"])[0].muted
    floor = editor.config.question_floor
    gate.questions = gate.questions._replace(floor=floor)
    editor.rollback(2)
    assert_rows(rows(editor), second)
    editor.rollback(1)
    assert_rows(rows(editor), first)
    editor.rollback(0)
    assert not rows(editor)


def test_an_error_leaves_it_as_it_was(gated, tokenizer, monkeypatch):
    editor, _, _ = gated
    before, held = snapshot(editor), rows(editor)
    monkeypatch.setattr(type(editor.method), "_add", lambda *args: (_ for _ in ()).throw(RuntimeError("in the middle")))
    with pytest.raises(RuntimeError, match="in the middle"):
        editor.edit([EditRequest("The capital of {} is", "Norway", "Lima")], target_values=random_values(1))
    assert_same(before, snapshot(editor))
    assert_rows(rows(editor), held)


def test_saved_loaded_and_edited_on(gated, tiny_model, tokenizer, tmp_path):
    editor, prompts, floor = gated
    wanted = [logits(editor.model, tokenizer, prompt) for prompt in prompts]
    editor.save_pretrained(tmp_path / "edits")
    loaded = load_edits(small_model(tiny_model), tmp_path / "edits", tokenizer=tokenizer)
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    for model in (loaded, again.model):
        assert all(same(logits(model, tokenizer, prompt), own) for prompt, own in zip(prompts, wanted, strict=True))
    assert again.config.question_floor == floor
    assert all(torch.equal(a, b) for key, own in rows(editor).items() for a, b in zip(own[1:], rows(again)[key][1:], strict=True))
    again.edit([EditRequest("The capital of {} is", "Norway", "Lima")], target_values=random_values(1, seed=5))
    assert len(rows(again)) == 3
    again.rollback(1)
    assert_rows(rows(again), rows(editor))
    other = edit(tiny_model, tokenizer, [], floor)
    other.edit([EditRequest("The capital of {} is", "Norway", "Lima")], target_values=random_values(1, seed=5))
    other.save_pretrained(tmp_path / "other")
    both = small_model(tiny_model)
    for name in ("edits", "other"):
        load_edits(both, tmp_path / name, name=name, tokenizer=tokenizer)
    set_edits(both, ["edits", "other"])
    assert len(attachments(both)[QUESTIONS].entries) == 3
    assert all(same(logits(both, tokenizer, prompt), own) for prompt, own in zip(prompts, wanted, strict=True))


def test_an_export_says_that_it_does_without(gated, tiny_model, tokenizer, tmp_path):
    editor, prompts, _ = gated
    editor.save_pretrained(tmp_path / "edits")
    plain = edit(tiny_model, tokenizer, FACTS, None)
    plain.save_pretrained(tmp_path / "plain")
    found = export_folder(small_model(tiny_model), tokenizer, tmp_path / "edits", tmp_path / "folder")
    assert any("question_floor is not in the folder" in note for note in found.notes)
    assert list(editor.layers) == found.layers
    export_merged(small_model(tiny_model), tokenizer, tmp_path / "edits", tmp_path / "merged")
    export_merged(small_model(tiny_model), tokenizer, tmp_path / "plain", tmp_path / "merged_plain")
    merged, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "merged_plain"))
    assert same(logits(merged, tokenizer, prompts[0]), logits(wanted, tokenizer, prompts[0]))


def test_a_state_dict_of_other_edits(gated, tiny_model, tokenizer):
    """It is read in place; what was known of the edits before must not stay."""
    editor, _, floor = gated
    others = [EditRequest(MARIE.prompt, "Mary Carie", "Oslo"), JOHN]
    other = edit(tiny_model, tokenizer, [], floor)
    other.edit(others, target_values=random_values(2, seed=3, scale=20.0))
    gate = editor.method.attachments[QUESTIONS]
    assert gate.entries[0]["subject"] == "Marie Curie"
    gate.load_state_dict(other.method.attachments[QUESTIONS].state_dict())
    assert gate.entries == other.method.attachments[QUESTIONS].entries and gate.entries[0]["subject"] == "Mary Carie"
    gate.hold(packed=gate.packed.clone())
    same_length = json.dumps([{**own, "subject": own["subject"][::-1]} for own in gate.entries]).encode()
    assert gate.entries and len(same_length) == len(gate.packed)
    gate.packed.copy_(torch.frombuffer(bytearray(same_length), dtype=torch.uint8))
    assert gate.entries[1]["subject"] == "nonneL nhoJ"


@pytest.mark.parametrize("floor", [2, -1.5, "high", True, float("nan")])
def test_floors_that_are_none(tiny_model, tokenizer, floor):
    with pytest.raises(ConfigError, match="question_floor must be null or a number from -1 to 1"):
        make_editor(small_model(tiny_model), tokenizer, scope="nearest", question_floor=floor)


def test_who_cannot_tell_questions(tiny_model, tokenizer):
    model = small_model(tiny_model)
    with pytest.raises(ConfigError, match="question_floor: the score 'zscore' knows no subjects"):
        make_editor(model, tokenizer, scope="zscore", question_floor=0.1)
    from test_methods import make_method

    for name in ("ROME", "GRACE", "MEMIT-seq"):
        with pytest.raises(ConfigError, match=f"question_floor: {name} does not tell"):
            make_method(name, model, tokenizer, question_floor=0.1)
    assert not attachments(model)


def test_memory_that_edits_may_take_counts_it(gated):
    gate = gated[0].method.attachments[QUESTIONS]
    assert gate.nbytes_with(0) == sum(own.numel() * own.element_size() for own in (gate.asked, gate.usual, gate.form, gate.said))
    assert gate.nbytes_with(2) == 2 * gate.nbytes_with(0)
