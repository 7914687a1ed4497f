"""Rules of editing, one a test: optimisers, keys, names, caches, modes, interruptions; loops and known courses beside them."""

import copy
import dataclasses
import math

import pytest
import torch
from test_anchors import with_a_common_key
from test_asked import FACTS, gate_of
from test_asked import edit as gated_edit
from test_editor import (
    TEXTS,
    assert_same,
    assert_usable,
    compared,
    edits_of,
    expected_memory,
    ids_of,
    make_editor,
    random_values,
    relative,
    small_model,
    snapshot,
    some_requests,
)
from test_methods import assert_held, held, make_method, requests_of
from test_target_values import ends_of, run, settings
from tokenizers import processors
from torch import nn
from transformers import DynamicCache

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.editing import answers
from comeba_ext.editing.keys import LayerReading
from comeba_ext.editing.optimisers import OPTIMISERS, Descent
from comeba_ext.editing.recognition import KeyRecognition
from comeba_ext.editing.target_values import optimise_target_values
from comeba_ext.errors import ComebaError, CovarianceError, RequestError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.question_states import place_of, question_states
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.edit_table import QuestionGate, Questions
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.layers.prompts import _lengths, _real, as_asked, asked_tokens
from comeba_ext.layers.sequence_context import IDS, NEVER, SequenceContext, _with_statistics
from comeba_ext.methods import ComebaHK
from comeba_ext.ops.mentions import UNKNOWN, name_hash
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.rows import answer_rows


@pytest.mark.parametrize("scope", ["zscore", "nearest"])
def test_an_edit_meets_the_earlier_ones_whatever_mode_a_user_left(tiny_model, tokenizer, scope):
    editors = []
    for mode in ("validated", "off"):
        editor = make_editor(small_model(tiny_model).double(), tokenizer, scope=scope)
        first, second = EditRequest("{} plays the", "Marie Curie", "piano"), EditRequest("{} works in", "Marie Curie", "Oslo")
        editor.edit([first], target_values=random_values(1))
        for layer in editor.layers.values():
            layer.mode = mode
        editor.edit([second])
        assert {layer.mode for layer in editor.layers.values()} == {mode}
        editors.append(editor)
    for name, layer in editors[0].layers.items():
        assert relative(edits_of(editors[1].layers[name]), edits_of(layer)) < 1e-9


def test_an_export_leaves_the_key_memory_as_it_was(tiny_model, tokenizer, tmp_path):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    editor.edit(some_requests(4), target_values=random_values(4))
    editor.save_pretrained(tmp_path / "edits")
    for _ in range(2):
        assert all(len(part) for name in editor.layers for part in editor.method.weight_change(name))
        for name, memory in editor.key_memory.items():
            assert relative(memory.matrix(), expected_memory(editor, name)) < 1e-9


@pytest.mark.parametrize("what", ["edit", "retract"])
def test_error_in_the_middle_changes_no_half_precision_sum(tiny_model, tokenizer, monkeypatch, what):
    editor = make_editor(small_model(tiny_model).to(torch.bfloat16), tokenizer, scope="reference")
    requests = some_requests(4)
    for n in range(2):
        editor.edit([requests[n]], target_values=random_values(1, seed=n))
    before, last = snapshot(editor), list(editor.layers)[-1]
    real = ComebaHK._shift

    def failing(self, name, change):
        real(self, name, change)
        if name == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(ComebaHK, "_shift", failing)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(requests[2:], target_values=random_values(2, seed=5)) if what == "edit" else editor.retract(["edit-0"])
    assert_same(before, snapshot(editor))
    assert_usable(editor, tokenizer)


@pytest.mark.parametrize("name", ["FT", "GRACE", "WISE"])
def test_a_step_that_was_made_anew_is_the_one_that_is_gone_back_to(tiny_model, tokenizer, name):
    editor = make_method(name, small_model(tiny_model).double(), tokenizer)
    first, second, third, fourth = requests_of(4)
    editor.edit([first])
    editor.edit([second])
    editor.rollback(1)
    editor.edit([third])
    wanted = held(editor)
    editor.edit([fourth])
    editor.rollback(2)
    assert_held(held(editor), wanted)


@pytest.mark.parametrize("name", ["GRACE", "SERAC", "MELO"])
def test_a_loaded_step_holds_what_was_superseded_after_it(tiny_model, tokenizer, tmp_path, name):
    editor = make_method(name, small_model(tiny_model).double(), tokenizer)
    first, second = requests_of(2)
    editor.edit([first, second])
    editor.save_pretrained(tmp_path / "edits")
    loaded = Editor.from_pretrained(small_model(tiny_model).double(), tokenizer, tmp_path / "edits")
    before = held(loaded)
    report = loaded.edit([EditRequest(first.prompt, first.subject, "Warsaw", locality_prompts=first.locality_prompts)])
    assert report.superseded == ["edit-0"]
    loaded.rollback(1)
    assert_held(held(loaded), before)


@pytest.mark.parametrize("scope", ["zscore", "reference"])
def test_scores_that_are_no_numbers_are_an_error(tiny_model, tokenizer, monkeypatch, scope):
    editor = make_editor(small_model(tiny_model), tokenizer, scope=scope)
    editor.edit(some_requests(1), target_values=random_values(1))
    before = snapshot(editor)
    monkeypatch.setattr(LayerReading, "peak_scores", lambda self, layer: torch.tensor([1.0, math.nan], dtype=torch.float64))
    with pytest.raises(RequestError, match="not finite"):
        editor.edit(some_requests(3)[1:], target_values=random_values(2, seed=1))
    assert_same(before, snapshot(editor))


class Led:
    """An objective whose requests lead at the evaluations that are named, and never get better."""

    def __init__(self, when, loss=9.0):
        self.when, self.count, self.loss = when, 0, loss
        self.h = torch.ones(len(when), 4, dtype=torch.float64)

    def evaluate(self, delta, gradient):
        self.leads = torch.tensor([self.count in own for own in self.when])
        self.count += 1
        loss = torch.full((len(self.when),), self.loss, dtype=torch.float64)
        return loss, torch.ones_like(self.h) if gradient else None

    def close(self, requests):
        pass


@pytest.mark.parametrize("lead_steps", [0, 1, 2, None])
def test_a_request_is_done_once_its_object_has_led_for_long_enough(lead_steps):
    """So many evaluations in a row after the first at which it leads; one that is lost again counts anew."""
    when, steps = [set(), {0, 1, 2, 3}, {2, 3, 5, 6, 7}, {1, 3, 5}, {7}, {0, 2, 3, 4, 5}], 9
    config = EditConfig(layers=(0,), steps=steps, lr=0.1, early_stop=0.0, lead_steps=lead_steps)
    descent = Descent(Led(when), config, lambda open_, losses: None)
    OPTIMISERS["adam"](descent)
    expected = []
    for own in when:
        n = lambda k: all(k - back in own for back in range(lead_steps + 1))  # noqa: E731, B023
        expected.append(next((k for k in range(steps) if lead_steps is not None and n(k)), steps - 1))
    assert descent.steps.tolist() == expected and (len(set(expected)) > 1 or lead_steps is None)


def test_an_object_leads_where_it_is_likelier_than_not_to_end(tiny_model, tokenizer):
    model = small_model(tiny_model).double()
    (token,) = tokenizer(" of", add_special_tokens=False)["input_ids"]
    with torch.no_grad():  # which leads at many places, by not much
        model.transformer.ln_f.bias[0] = 4.0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[token, 0] = 1.4
    requests = [EditRequest(request.prompt, request.subject, "of") for request in some_requests(35)]
    config = settings(lr=1e-9, steps=2, early_stop=0.0, lead_steps=0, end_factor=0.7, kl_factor=0.0)
    ends, expected, masses = ends_of(tokenizer), [], []
    for request in requests:
        stem = tokenizer(request.text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*stem, token]])).logits[0]
        leads, mass = logits[-2].argmax().item() == token, logits[-1].softmax(-1)[ends].sum().item()
        masses.append(mass if leads else -1.0)
        expected.append(0 if leads and mass > 0.5 else 1)
    assert sum(0.06 < mass < 0.45 for mass in masses) > 1 and 0 < sum(expected) < 35
    assert run(model, tokenizer, config, requests, [""]).steps == expected


class Course:
    """An objective of one request, whose losses are a list, and that leads from one evaluation on."""

    def __init__(self, losses, leads_from=0):
        self.course, self.leads_from, self.asked = losses, leads_from, []
        self.h = torch.ones(1, 4, dtype=torch.float64)

    def evaluate(self, delta, gradient):
        self.leads = torch.tensor([len(self.asked) >= self.leads_from])
        loss = torch.tensor([self.course[len(self.asked)]], dtype=torch.float64)
        self.asked.append(delta.clone())
        return loss, torch.tensor([[1.0, -0.5, 0.2, 0.0]], dtype=torch.float64) if gradient else None

    def close(self, requests):
        pass


def by_polyak(losses, **how):
    objective = Course(losses, **how)
    descent = Descent(objective, EditConfig(layers=(0,), steps=len(losses), early_stop=0.01, optimizer="polyak"), lambda *_: None)
    OPTIMISERS["polyak"](descent)
    return descent, objective.asked


@pytest.mark.parametrize("losses, best", [([3.0, 2.0, 5.0], 1), ([3.0, 2.0, 1.5], 2), ([3.0, 4.0, 5.0, 6.0], 0)])
def test_polyak_ends_at_its_best_point(losses, best):
    descent, asked = by_polyak(losses)
    assert descent.losses.item() == losses[best] and torch.equal(descent.delta, asked[best])


@pytest.mark.parametrize(
    "losses, leads_from, evaluations",
    [
        ([0.9 * 0.85**n for n in range(8)], 0, 8),  # two evaluations leave 0.72 of it
        ([0.9 * 0.91**n for n in range(8)], 0, 3),  # 0.83
        ([1.5 * 0.91**n for n in range(8)], 0, 6),  # not as long as it is above 1
        ([0.9 * 0.91**n for n in range(8)], 4, 5),  # nor as long as the object does not lead
        ([0.9 * 0.91**n for n in range(8)], 9, 8),
    ],
)
def test_polyak_is_done_when_hardly_anything_falls(losses, leads_from, evaluations):
    _, asked = by_polyak(losses, leads_from=leads_from)
    assert len(asked) == evaluations


@pytest.mark.parametrize("second_leads, second_loss, better", [(True, 9.0, True), (False, 9.0, False), (False, 1.0, True)])
def test_the_better_of_two_tries_stays(tiny_model, tokenizer, monkeypatch, second_leads, second_loss, better):
    def ends_at(value, loss, leads, steps):
        def optimiser(descent):
            descent.evaluate(torch.zeros_like(descent.delta), gradient=False)
            descent.delta = torch.full_like(descent.delta, value)
            descent.losses, descent.steps = torch.full_like(descent.losses, loss), torch.full_like(descent.steps, steps)
            descent.leads = torch.full_like(descent.leads, leads)

        return optimiser

    monkeypatch.setitem(OPTIMISERS, "polyak", ends_at(1.0, 5.0, False, 3))
    monkeypatch.setitem(OPTIMISERS, "adam", ends_at(2.0, second_loss, second_leads, 4))
    model = small_model(tiny_model).double()
    found = run(model, tokenizer, settings(optimizer="polyak", early_stop=0.0), some_requests(2), [""])
    zero = run(model, tokenizer, settings(optimizer="adam", steps=1, early_stop=0.0), some_requests(2), [""]).values - 2.0
    assert torch.allclose(found.values - zero, torch.full_like(zero, 2.0 if better else 1.0))
    assert found.losses == [second_loss if better else 5.0] * 2 and found.steps == [7, 7]


def test_an_edit_at_a_prompts_end_is_not_written_anew(tiny_model, tokenizer):
    at_end = EditRequest("The mother tongue of {} is", "Norway", "English", fact_token="last")
    other = EditRequest("The capital of {}, as everyone knows, is", "Norway", "Paris")
    for first, second in ((at_end, other), (other, at_end)):
        editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", steps=2)
        assert not editor.edit([first]).declined
        report = editor.edit([second])
        assert not report.declined and not report.rewritten
        assert [entry.step for entry in editor.ledger.live()] == [1, 2]


def test_a_prompts_end_that_is_the_same_about_others_is_declined(tiny_model, tokenizer):
    """A model that sees one token at a time: what it knows where the prompt ends is the last token's alone."""
    model = small_model(tiny_model)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
    editor = make_editor(model, tokenizer, scope="nearest", prefixes=0)
    report = editor.edit([EditRequest("{} 9", "Norway", "Oslo", fact_token="last")], target_values=random_values(1))
    assert [own["subject"] for own in report.declined] == ["Norway"] and not len(editor.ledger)


def test_another_covariance_is_another_background(tiny_model, tokenizer):
    other = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    other.collect_covariance([text for text in TEXTS if "Paris" not in text], tokens=10**6, progress=False)
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    requests, values = some_requests(3), random_values(3)
    editor.edit(requests, target_values=values)
    editor.rollback(0)
    editor.set_covariance(other.covariance)
    reports = [each.edit(requests, target_values=values) for each in (editor, other)]
    assert reports[0].leverage == reports[1].leverage
    for name, layer in editor.layers.items():
        for one, two in zip(compared(layer), compared(other.layers[name]), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("subject, named", [("people", False), ("People", True), ("insulin", True), ("the city", True)])
def test_an_ordinary_word_names_nobody(tiny_model, tokenizer, subject, named):
    """One that the corpus has; not a word that it has not, a name, or several words."""
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", layers=(1,))
    assert any(" people " in text for text in TEXTS) and not any("insulin" in text for text in TEXTS)
    report = editor.edit([EditRequest("We say that {} is", subject, "Oslo")], target_values=random_values(1))
    assert not report.declined
    (layer,) = editor.layers.values()
    ids = tokenizer(f" {subject}", add_special_tokens=False)["input_ids"]
    assert (name_hash(ids) in layer.score.names.tolist()) == named


def with_bos(tokenizer):
    """The same, that begins every text with a special token."""
    other = copy.deepcopy(tokenizer)
    eos = tokenizer.eos_token_id
    other._tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", eos)])
    assert other("a")["input_ids"][0] == eos
    return other


def test_what_is_asked_instead_begins_as_every_text_does(tokenizer):
    bos = with_bos(tokenizer)
    ids = bos("Marie Curie was born in")["input_ids"]
    found = asked_tokens(bos, ids, lambda prompt: f"New: {prompt}")
    assert found == bos("New: Marie Curie was born in")["input_ids"] and found.count(bos.eos_token_id) == 1
    assert asked_tokens(bos, ids[1:], lambda prompt: f"New: {prompt}") == found[1:]  # given without


def test_padding_that_ends_texts_too_is_no_padding():
    """As Transformers: where both are one token, what is padding is not known without a mask."""
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 1, 9]])
    assert _real(ids, 1, 1).tolist() == [[1] * 4] * 2 and _real(ids, None, 1).tolist() == [[1] * 4] * 2
    assert _real(ids, 1, 0).tolist() == [[0, 0, 1, 1], [1, 1, 0, 1]]


def test_a_bound_that_the_prompt_has_reached_lets_one_token_be_written(tiny_model, tokenizer):
    model = make_method("ICE", small_model(tiny_model), tokenizer)
    model.edit([EditRequest("{} lives in", "Ann", "Rome")])
    given = {"input_ids": torch.tensor([tokenizer("Ann lives in")["input_ids"]])}
    width = given["input_ids"].shape[1]
    for bound in (width, 2):
        assert model.model.generate(**given, max_length=bound, do_sample=False, pad_token_id=0, eos_token_id=None).shape[1] == width + 1


def test_a_cache_that_was_expanded_by_hand_knows_no_earlier_names(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    editor.edit(some_requests(2), target_values=random_values(2))
    cache = DynamicCache()
    with torch.no_grad():
        editor.model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
        logits = editor.model(torch.tensor([[8], [9]]), past_key_values=cache).logits
    assert torch.isfinite(logits).all() and cache.comeba_statistics[IDS][:, -2:].tolist() == [[UNKNOWN, 8], [UNKNOWN, 9]]


def test_one_prompt_of_several_that_is_muted_in_a_text_that_has_begun(tiny_model, tokenizer):
    editor = gated_edit(tiny_model, tokenizer, FACTS, 0.5)
    gate_of(editor)
    texts = ["People say that Marie Curie works in", "People say that Angola works in"]
    for own in texts[:1] + texts[::-1]:
        rows = [tokenizer(text)["input_ids"] for text in ([own] if own == texts[0] else texts)]
        with (
            pytest.raises(ComebaError, match="without a cache"),
            as_asked(editor.model, [*rows, tokenizer("He is")["input_ids"]], begun=True),
        ):
            pass
    with as_asked(editor.model, [tokenizer("He is")["input_ids"]], begun=True):
        pass


def test_a_bound_of_nothing_is_a_bound():
    assert _lengths({"min_length": 9, "min_new_tokens": 0}, [], 3) == {}
    assert _lengths({"min_length": 9}, [], 3) == {"min_new_tokens": 6}


def table_of(count, tokenizer=None):
    gate = QuestionGate("cpu", Questions("h.1.mlp", 4, 0.5))
    gate.tokenizer = tokenizer
    entries = [{"id": f"edit-{n}", "subject": f"Ann {n}", "names": [n], "ends": [n]} for n in range(count)]
    rows = {"asked": torch.ones(count, 2, 4), "usual": torch.ones(count, 2, 2, 4)}
    gate.add(entries, {**rows, "form": torch.zeros(count, dtype=torch.int64), "said": torch.arange(count)})
    return gate


@pytest.mark.parametrize("short", ["asked", "usual", "form", "said"])
def test_a_table_with_fewer_rows_than_edits_is_malformed(short):
    tensors = {name: own.clone() for name, own in table_of(3).tensors().items()}
    table_of(0).restore(tensors)
    with pytest.raises(ValueError, match="not equally many"):
        table_of(0).restore(tensors | {short: tensors[short][:2]})


def test_tables_that_are_joined_have_the_tokenizer_of_either(tokenizer):
    for first, second in ((None, tokenizer), (tokenizer, None)):
        table = table_of(2, first)
        table.join(table_of(1, second))
        assert table.tokenizer is tokenizer and len(table.entries) == 3


def test_edits_that_were_taken_back_were_made(tiny_model, tokenizer):
    """Steps that a rollback may return to have their covariance."""
    editor = make_editor(small_model(tiny_model), tokenizer)
    covariance = editor.covariance
    editor.edit(some_requests(1), target_values=random_values(1))
    editor.retract("edit-0")
    with pytest.raises(CovarianceError, match="already"):
        editor.set_covariance(covariance)


@pytest.mark.parametrize("what", ["edit", "retract", "rollback"])
def test_an_interruption_before_a_step_is_taken_over_leaves_no_record(tiny_model, tokenizer, monkeypatch, what):
    editor = make_editor(small_model(tiny_model), tokenizer)
    requests = some_requests(3)
    for n in range(2):
        editor.edit([requests[n]], target_values=random_values(1, seed=n))
    before = snapshot(editor)

    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr("comeba_ext.editor.between_passes", interrupted)  # while it waits for other threads
    with pytest.raises(KeyboardInterrupt):
        if what == "edit":
            editor.edit([EditRequest(requests[0].prompt, requests[0].subject, "Warsaw")], target_values=random_values(1, seed=5))
        elif what == "retract":
            editor.retract("edit-0")
        else:
            editor.rollback(1)
    monkeypatch.undo()
    assert_same(before, snapshot(editor))
    assert len(editor.ledger) == 2 and editor.ledger.by_id("edit-0") is not None


def test_an_id_that_was_taken_between_two_batches(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, steps=2)
    one, two, three = some_requests(3)
    reports = editor.edit_all([one, dataclasses.replace(two, request_id="mine")], batch_size=1, progress=False)
    next(reports)
    editor.edit([dataclasses.replace(three, request_id="mine")], target_values=random_values(1))
    before = snapshot(editor)
    with pytest.raises(RequestError, match="'mine' is used by another"):
        next(reports)
    assert_same(before, snapshot(editor))


def test_the_log_has_what_was_asked_for(tiny_model, tokenizer):
    """Not the facts that were written anew beside it."""
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest", steps=2)
    editor.edit([EditRequest("The mother tongue of {} is", "Norway", "English")])
    report = editor.edit([EditRequest("The capital of {}, as everyone knows, is", "Norway", "Paris")])
    assert report.rewritten == ["edit-0"]
    assert [(own["subject"], own["target_new"]) for own in editor.log[-1]["requests"]] == [("Norway", "Paris")]


def test_one_text_about_two_subjects_is_two_facts(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit([EditRequest("{} is in Norway with", "Oslo", "Peru", request_id="mine")], target_values=random_values(1))
    with pytest.raises(RequestError, match="'mine' is used by another"):
        editor.edit([EditRequest("Oslo is in {} with", "Norway", "Lima", request_id="mine")], target_values=random_values(1))


@torch.no_grad()
def literal_prefixes(model, tokenizer, count, length, seed):
    """Five starts in turn; each goes on for so many tokens, each one of the five likeliest, drawn for all texts together; never the end."""
    starts = ["The", "Therefore", "Because", "I", "You"]
    rows = [tokenizer(starts[n % 5])["input_ids"] for n in range(count)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        likely = torch.zeros(count, len(tokenizer))
        for n, row in enumerate(rows):
            logits = model(torch.tensor([row])).logits[0, -1].float()
            logits[tokenizer.eos_token_id] = -math.inf
            best = logits.topk(5)
            likely[n, best.indices] = best.values.softmax(-1)
        drawn = torch.multinomial(likely, 1, generator=generator)
        rows = [[*row, token] for row, token in zip(rows, drawn[:, 0].tolist(), strict=True)]
    return [
        "",
        *(" ".join(tokenizer.decode(row, skip_special_tokens=True).replace("{", " ").replace("}", " ").split()) + ". " for row in rows),
    ]


@pytest.mark.parametrize("seed", [0, 3])
def test_prefixes_are_what_the_model_would_write(tiny_model, tokenizer, seed):
    model = small_model(tiny_model)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1.0  # the end is likely everywhere
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 6.0
    found = Editor(model, tokenizer, EditConfig(layers=(1,), prefixes=7, prefix_length=6, seed=seed)).prefixes
    assert found == literal_prefixes(model, tokenizer, 7, 6, seed)
    assert found != literal_prefixes(model, tokenizer, 7, 6, seed + 1)


def test_prefixes_have_no_braces(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, *args, **how: ["The {} and {x}\nyes "])
    assert sample_prefixes(small_model(tiny_model), tokenizer, 1, 2, 0) == ["", "The and x yes. "]


def test_what_is_asked_for_an_answer_is_the_prompt_alone(tiny_model, tokenizer, monkeypatch):
    asked, real = [], answers.as_asked
    monkeypatch.setattr(answers, "as_asked", lambda model, prompts, *rest: (asked.extend(prompts), real(model, prompts, *rest))[1])
    pairs = [("The capital of Norway is", "Oslo, and the capital of Peru"), ("Marie Curie was born in", "Warsaw"), ("It is", "a")]
    rows = answer_rows(tokenizer, pairs)
    assert max(len(row.target) for row in rows) > 2
    answers.answered(small_model(tiny_model), rows, 0, 1000)
    assert sorted(asked) == sorted(tokenizer(prompt)["input_ids"] for prompt, _ in pairs)


def test_the_order_of_a_subjects_facts_outlives_a_folder(tiny_model, tokenizer, tmp_path):
    """Of near directions the first stands for the others: the one that was edited first, before or after loading."""
    facts = [EditRequest(f"{{}} {what}", "Norway", "Oslo") for what in ("is", "was", "plays the", "works in", "has")]
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    for n in range(4):
        editor.edit(facts[n : n + 1], target_values=random_values(1, seed=n))
    editor.save_pretrained(tmp_path)
    loaded = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path)
    for each in (editor, loaded):
        each.edit(facts[4:], target_values=random_values(1, seed=9))
    for name, layer in editor.layers.items():
        members = [
            sorted([one.name[0] for one in own] for own in each.method.recognition.shards[name].members.values())
            for each in (editor, loaded)
        ]
        assert members[0] == members[1] == [[f"edit-{n}" for n in range(5)]]
        for one, two in zip(compared(layer), compared(loaded.layers[name]), strict=True):
            assert torch.equal(one, two)


def radius_of(descent):
    return descent.bound[0, 0].item()


def test_a_step_of_polyaks_is_at_most_half_the_balls_radius():
    descent, asked = by_polyak([8.0 * 0.9**n for n in range(9)], leads_from=99)
    radius = radius_of(descent)
    steps = [(b - a).norm().item() for a, b in zip(asked, asked[1:], strict=False)]
    assert max(steps) <= radius / 2 * (1 + 1e-9) and steps[0] == pytest.approx(radius / 2)
    assert max(own.norm().item() for own in asked) == pytest.approx(radius)  # and it stays inside


def test_a_step_that_did_not_help_is_halved():
    """From its best point, half as far each time."""
    descent, asked = by_polyak([0.02, 9.0, 9.0, 9.0, 9.0], leads_from=99)
    sizes = [own.norm().item() for own in asked[1:]]
    assert 0 < sizes[0] < radius_of(descent) / 2
    assert sizes == pytest.approx([sizes[0] / 2**n for n in range(4)])


def test_padding_is_no_token_of_a_text(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    cache = DynamicCache()
    with torch.no_grad():
        editor.model(torch.tensor([[7, 7, 5], [6, 8, 9]]), attention_mask=torch.tensor([[0, 0, 1], [1, 1, 1]]), past_key_values=cache)
    assert cache.comeba_statistics[IDS][:, -3:].tolist() == [[UNKNOWN, UNKNOWN, 5], [6, 8, 9]]


def test_what_was_muted_around_is_muted_again():
    context = SequenceContext(nn.Module())
    with context.muting([[5]], [[6]]):
        with context.muting([[7]]):
            assert context.here.muted[0].tolist() == [[7]]
        with context.muting([[]]):
            assert context.here.muted is None
        assert [own.tolist() for own in context.here.muted] == [[[5]], [[6]]]
    assert context.here.muted is None


def test_a_cropped_cache_knows_what_its_last_token_saw(tiny_model):
    model, cache = small_model(tiny_model), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8, 9, 10]]), past_key_values=cache)
    cache.__class__ = _with_statistics(type(cache))
    cache.comeba_statistics, cache.comeba_fixed = {"x": torch.tensor([[3, 4, 5, NEVER]])}, {}
    cache.crop(-2)
    assert cache.get_seq_length() == 4 and cache.comeba_statistics["x"].tolist() == [[3, 4, NEVER, NEVER]]


def test_disabled_inside_of_disabled(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="zscore")
    editor.edit(some_requests(3), target_values=random_values(3))
    ids = ids_of(editor.model, tokenizer)
    with torch.no_grad():
        base, edited = small_model(tiny_model)(ids).logits, editor.model(ids).logits
        with editor.disabled():
            with editor.disabled():
                assert torch.equal(editor.model(ids).logits, base)
            assert torch.equal(editor.model(ids).logits, base)
        assert torch.equal(editor.model(ids).logits, edited) and not torch.equal(edited, base)


@pytest.mark.parametrize("mode", ["off", "temporary", "validated"])
def test_layers_put_in_by_hand_have_their_mode_again(mode):
    model = nn.Sequential(HookedLinear(nn.Linear(4, 4), scope="reference"))
    model[0].mode = mode
    with disabled(model):
        assert model[0].mode == "off"
    assert model[0].mode == mode


@pytest.mark.parametrize("scope, alpha", [("zscore", -9.0), ("reference", 0.0), ("always", 1.0)])
def test_hooks_of_the_base_layer_are_called(scope, alpha):
    generator = torch.Generator().manual_seed(0)
    layer = HookedLinear(nn.Linear(8, 6), scope=scope, alpha=alpha)
    layer.delta.copy_(torch.randn(6, 8, generator=generator))
    x = torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        plain = layer(x) - layer.base_layer(x)
        layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        expected = torch.nn.functional.linear(2 * x, layer.base_layer.weight, layer.base_layer.bias) + plain
        torch.testing.assert_close(layer(x), expected)


def test_a_layer_that_took_over_edits_decides_by_their_sketch():
    """At once: a compiled model would not see that the old sketch is old."""
    generator = torch.Generator().manual_seed(0)
    layer, other = (HookedLinear(nn.Linear(64, 256), scope="reference", gate="sketch") for _ in range(2))
    layer.score.sketch(layer.delta)
    other.delta.copy_(torch.randn(256, 64, generator=generator))
    layer.take_over(other)
    kept = layer.score._sketch
    assert kept.norm().item() == pytest.approx(other.delta.norm().item(), rel=0.2) and torch.equal(kept, layer.score.sketch(layer.delta))


def test_zscores_of_rows_that_begin_alike_are_of_whole_rows(tiny_model, tokenizer):
    """Nothing is shared where all tokens of a row decide together: losses are those of each request alone."""
    editor = make_editor(small_model(tiny_model).double(), tokenizer, scope="zscore")
    editor.edit(some_requests(2), target_values=random_values(2))
    for layer in editor.layers.values():
        layer.alpha.fill_(0.3)
    batch = [
        EditRequest("The mother tongue of {} is", "Norway", "piano"),
        EditRequest("The mother tongue of {} and the city", "Peru", "Paris"),
    ]
    config = settings(steps=1, kl_factor=0.0)
    find = lambda own: run(editor.model, tokenizer, config, own, editor.prefixes).losses  # noqa: E731
    assert find(batch) == pytest.approx([find([request])[0] for request in batch], rel=1e-8)


def test_edits_that_were_offloaded_say_so():
    layer = HookedLinear(nn.Linear(4, 4), scope="reference")
    layer.score.scale = layer.score.scale.to("meta")
    with pytest.raises(ComebaError, match="offloaded"):
        layer(torch.ones(1, 2, 4))


def test_of_a_question_that_is_too_long_the_end_is_read(tiny_model, tokenizer):
    model = small_model(tiny_model)
    place, _ = place_of(model, Architecture.of(model))
    long = "Bob " * (model.config.n_positions - 4)
    one, two = question_states(model.transformer, place, tokenizer, [long + "lives in", long + "was born"])[:, 0]
    assert not torch.allclose(one, two)


def test_losses_of_a_half_precision_model_are_no_half_precision(tiny_model, tokenizer):
    model = small_model(tiny_model).to(torch.bfloat16)
    request = some_requests(1)[0]
    found = run(model, tokenizer, settings(steps=1, early_stop=0.0), [request], [""])
    stem, whole = tokenizer(request.text)["input_ids"], tokenizer(f"{request.text} {request.target_new}")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    wanted = -sum(log_p[n - 1, whole[n]].item() for n in range(len(stem), len(whole))) / (len(whole) - len(stem))
    assert found.values.dtype == torch.float32 and found.losses[0] == pytest.approx(wanted, rel=1e-2)
    assert torch.tensor(found.losses).bfloat16().double().item() != found.losses[0]


ABOUT = [("Danielle Darrieux", "Danielle Darrieux"), ("Marie Curie", "Marie Lennon")]


def batch_about(subjects):
    return [EditRequest("{} plays the", subjects[0], "piano"), EditRequest("{} works in the field of", subjects[1], "physics")]


@pytest.mark.parametrize("subjects", ABOUT)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_keys_are_read_where_names_begin_in_what_rows_share(tiny_model, tokenizer, family, subjects, monkeypatch):
    """Against one unpadded run a text, behind every prefix, at the second edited layer."""
    editor = make_editor(small_model(tiny_model, family).double(), tokenizer, scope="nearest")
    each, real = {}, KeyRecognition.keys

    def keys(self, name, reading):
        each[name] = reading.each.clone()
        return real(self, name, reading)

    monkeypatch.setattr(KeyRecognition, "keys", keys)
    batch = batch_about(subjects)
    editor.edit(batch, target_values=random_values(2))
    name = list(editor.layers)[1]
    for n, request in enumerate(batch):
        for k, prefix in enumerate(editor.prefixes):
            head, seen = prefix + request.subject, []
            encoded = tokenizer(prefix + request.text, return_offsets_mapping=True)
            last = max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < len(head))
            handle = editor.layers[name].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                editor.model(torch.tensor([encoded["input_ids"]]))
            handle.remove()
            assert relative(each[name][n, k], seen[0].reshape(-1, seen[0].shape[-1])[last]) < 1e-9


@pytest.mark.parametrize("subjects", ABOUT)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_losses_are_those_of_requests_alone(tiny_model, tokenizer, family, subjects):
    """What a row's names are does not depend on its batch mates (alone, a request shares nothing)."""
    editor = make_editor(small_model(tiny_model, family).double(), tokenizer, scope="nearest")
    editor.edit([EditRequest("{} speaks", subject, "English") for subject in dict.fromkeys(subjects)], random_values(len(set(subjects))))
    find = lambda batch: optimise_target_values(  # noqa: E731
        editor.model, tokenizer, editor.architecture, editor.config.replace(steps=1), batch, editor.prefixes
    )
    batch = batch_about(subjects)
    assert find(batch).losses == pytest.approx([find([request]).losses[0] for request in batch], rel=1e-6)


def test_values_that_were_asked_for_are_those_that_an_edit_finds(tiny_model, tokenizer):
    """A request that is moved to its prompt's last token, too."""
    found = []
    for asked in (False, True):
        editor, common = with_a_common_key(tiny_model, tokenizer, last=False, steps=10)
        report = editor.edit([common], target_values=editor.target_values([common]) if asked else None)
        assert report.moved == ["edit-0"]
        found.append(editor)
    for name, layer in found[0].layers.items():
        assert relative(edits_of(found[1].layers[name]), edits_of(layer)) < 1e-4


def test_no_corpus_is_read_for_an_editor_that_cannot_take_it(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit(some_requests(1), target_values=random_values(1))
    with pytest.raises(CovarianceError, match="already"):
        editor.collect_covariance((pytest.fail("read") for _ in TEXTS), progress=False)


@pytest.mark.parametrize("mode", ["off", "temporary", "validated"])
def test_backward_hooks_of_the_base_layer_are_called(tiny_model, tokenizer, mode):
    editor = make_editor(small_model(tiny_model, "llama"), tokenizer, scope="zscore")
    layer, called = next(iter(editor.layers.values())), []
    layer.base_layer.register_full_backward_hook(lambda module, inputs, outputs: called.append(1))
    layer.mode = mode
    hidden = editor.model.get_input_embeddings()(torch.tensor([tokenizer("Marie Curie is")["input_ids"]])).detach().requires_grad_()
    editor.model(inputs_embeds=hidden).logits.sum().backward()
    assert called
