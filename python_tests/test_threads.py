"""Any number of threads read one model; an edit becomes visible between their passes, whole.

The oracle is the same work done alone: a pass by itself, the same edits on another copy of the model. Texts are tokenised
before: Hugging Face's fast tokenizers keep padding and truncation as state, so threads do not share one.
"""

import copy
import gc
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_editor import (
    assert_same,
    assert_usable,
    edits_of,
    ids_of,
    make_editor,
    random_values,
    small_model,
    snapshot,
    some_requests,
)

from comeba_ext.errors import ComebaError
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.layers.passes import Passes
from comeba_ext.layers.shards import Shards
from comeba_ext.layers.twin import twin_of
from comeba_ext.methods import ComebaHK

SCOPES = ("zscore", "reference", "nearest")
TEXTS = ("The capital of Norway is", "Marie Curie was born in Warsaw and worked in the field of physics", "Angola")
CLOSE = {"rtol": 0, "atol": 1e-4}  # where a tensor begins decides how BLAS sums


@pytest.fixture(params=SCOPES)
def edited(request, tiny_model, tokenizer):
    torch.set_num_threads(1)  # threads of ours, not torch's
    editor = make_editor(small_model(tiny_model, "gpt2"), tokenizer, scope=request.param)
    editor.edit(some_requests(4), random_values(4))
    return editor


def encoded(tokenizer, texts):
    rows = tokenizer(list(texts), return_tensors="pt", padding=True)
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


def answers(model, batch):
    """Logits at the last column, of texts padded on the right."""
    with torch.no_grad():
        return model(**batch).logits[:, -1].clone()


def test_passes_of_different_shapes_do_not_meet(edited, tokenizer):
    model = edited.model
    batches = [encoded(tokenizer, texts) for texts in (TEXTS[:1], TEXTS, TEXTS[1:], TEXTS * 2)]
    alone = [answers(model, batch) for batch in batches]

    def reads(n):
        return [torch.allclose(answers(model, batches[n]), alone[n], **CLOSE) for _ in range(60)]

    with ThreadPoolExecutor(len(batches)) as threads:
        found = list(threads.map(reads, range(len(batches))))
    assert all(map(all, found))


def test_generations_of_many_threads_equal_one(edited, tokenizer):
    def write(ids):
        out = edited.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        return out[0].tolist()

    prompts = [ids_of(edited.model, tokenizer, text) for text in TEXTS]
    alone = [write(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(write, prompts * 8)) == alone * 8


def test_readers_see_complete_states_while_another_thread_edits(edited, tokenizer):
    """Four threads read while a fifth edits, retracts and rolls back; every answer is one of the states' own."""
    other = make_editor(copy.deepcopy(_unedited(edited)), tokenizer, scope=edited.config.scope)
    other.edit(some_requests(4), random_values(4))

    def steps(editor):
        """Nine steps; after each one its answer."""
        more = some_requests(19)[4:]
        for n in range(0, 15, 3):
            editor.edit(more[n : n + 3], random_values(3, seed=n))
            yield
        editor.retract(editor.log[1]["request_ids"])
        yield
        editor.edit(more[:2])  # with target values of its own
        yield
        editor.rollback(2)
        yield
        editor.rollback(0)
        yield

    batch = encoded(tokenizer, [*TEXTS, *(request.text for request in some_requests(19))])
    states = [answers(other.model, batch)]
    states += [answers(other.model, batch) for _ in steps(other)]
    assert not any(torch.allclose(a, b, **CLOSE) for n, a in enumerate(states[:8]) for b in states[:n])

    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            found = answers(edited.model, batch)
            seen.append(next((n for n, state in enumerate(states) if torch.allclose(found, state, **CLOSE)), None))

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(4)]
        try:
            for number, _ in enumerate(steps(edited), 1):
                torch.testing.assert_close(answers(edited.model, batch), states[number], **CLOSE)
        finally:
            done.set()
    assert [reader.exception() for reader in readers] == [None] * 4
    assert None not in seen and len(set(seen)) > 2


def _unedited(editor):
    model = copy.deepcopy(editor.model)
    for name, layer in editor.layers.items():
        model.set_submodule(name, copy.deepcopy(layer.base_layer))
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def test_readers_see_nothing_of_a_search_for_target_values(edited, tokenizer):
    batch, done, seen = encoded(tokenizer, TEXTS), threading.Event(), []
    before, requests = answers(edited.model, batch), some_requests(6)[4:]
    expected = edited.target_values(requests)

    def read():
        while not done.is_set():
            seen.append(torch.allclose(answers(edited.model, batch), before, **CLOSE))

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        try:
            found = edited.target_values(requests)
        finally:
            done.set()
        for reader in readers:
            reader.result()
    assert len(seen) > 2 and all(seen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_what_a_step_worked_on_is_freed_with_it(edited):
    """Not whenever Python looks for objects that know each other: what they hold is a GPU's memory."""
    alive = lambda: sum(isinstance(own, HookedLinear) for own in gc.get_objects())  # noqa: E731
    gc.collect()
    before, requests = alive(), some_requests(10)[4:]
    gc.disable()
    try:
        edited.edit(requests[:2], random_values(2))
        edited.edit(requests[2:4])
        edited.target_values(requests[4:])
        edited.retract("edit-0")
        edited.rollback(1)
        assert alive() == before
    finally:
        gc.enable()


def test_closing_waits_for_passes(edited, tokenizer):
    inside, order = threading.Event(), []
    batch = encoded(tokenizer, TEXTS)

    def slow(*_):
        inside.set()
        order.append("pass" if not closing.wait(0.3) else "closed within a pass")

    closing = threading.Event()
    next(iter(edited.layers.values())).register_forward_pre_hook(slow)
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(answers, edited.model, batch)
        inside.wait(5)
        edited.close()
        closing.set()
        order.append("closed")
        reader.result()
    assert order == ["pass", "closed"]


def test_a_pass_that_was_interrupted_holds_up_nobody(edited, tokenizer):
    """Torch tells no hook of Ctrl-C. The thread lives on, and runs no other pass."""
    batch, over, interrupted = encoded(tokenizer, TEXTS), threading.Event(), threading.Event()

    def read():
        inner = next(iter(edited.layers.values())).register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                answers(edited.model, batch)
        finally:
            inner.remove()
        interrupted.set()
        over.wait(20)

    def stop(*_):
        raise KeyboardInterrupt

    reader = threading.Thread(target=read)
    reader.start()
    assert interrupted.wait(10)
    changer = threading.Thread(target=edited.retract, args=("edit-0",), daemon=True)
    changer.start()
    changer.join(5)
    over.set()
    assert not changer.is_alive() and edited.step == 2
    reader.join()


def test_disabled_is_this_threads_own(edited, tokenizer):
    model, batch = edited.model, encoded(tokenizer, [TEXTS[0], some_requests(4)[0].text])
    changed = answers(model, batch)
    with disabled(model), ThreadPoolExecutor(1) as threads:
        plain = answers(model, batch)
        assert torch.equal(threads.submit(answers, model, batch).result(), changed)
        assert {layer.mode for layer in edited.layers.values()} == {"off"}
    assert torch.equal(answers(model, batch), changed)
    assert torch.equal(plain, answers(_unedited(edited), batch)) and not torch.equal(plain, changed)


def test_two_threads_edit_one_after_the_other(edited, tokenizer):
    requests = some_requests(12)[4:]
    with ThreadPoolExecutor(2) as threads:
        parts = [threads.submit(edited.edit, requests[n : n + 4], random_values(4, seed=n)) for n in (0, 4)]
        ids = [name for part in parts for name in part.result().request_ids]
    assert len(set(ids)) == 8 and edited.step == 3
    assert [entry.step for entry in edited.ledger.live()] == [1] * 4 + [2] * 4 + [3] * 4


def test_an_interruption_while_a_step_is_taken_over_waits(edited, tokenizer, monkeypatch):
    """Half of the layers would hold the new state."""
    other = copy.deepcopy(snapshot(edited))
    take, count = HookedLinear.take_over, []

    def interrupted(self, *args):
        take(self, *args)
        count.append(signal.raise_signal(signal.SIGINT))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HookedLinear, "take_over", interrupted)
        edited.edit(some_requests(7)[4:], random_values(3, seed=1))
    assert len(count) == 2 and edited.step == 2 and len(edited.ledger) == 7
    assert_usable(edited, tokenizer)
    edited.rollback(1)
    for name, (edits, *_) in other["layers"].items():
        assert torch.allclose(edits_of(edited.layers[name]), edits, rtol=0, atol=1e-5 * edits.abs().max().item())


@pytest.mark.parametrize("what", ["edit", "retract", "rollback"])
def test_an_interruption_before_changes_nothing(edited, tokenizer, monkeypatch, what):
    before = snapshot(edited)

    def then_interrupted(change):
        def interrupted(*args):
            change(*args)
            raise KeyboardInterrupt

        return interrupted

    for where, what_changes in ((ComebaHK, "_shift"), (Shards, "assign"), (Shards, "clear")):
        monkeypatch.setattr(where, what_changes, then_interrupted(getattr(where, what_changes)))
    with pytest.raises(KeyboardInterrupt):
        {
            "edit": lambda: edited.edit(some_requests(6)[4:], random_values(2)),
            "retract": lambda: edited.retract("edit-0"),
            "rollback": lambda: edited.rollback(0),
        }[what]()
    assert_same(before, snapshot(edited))
    assert_usable(edited, tokenizer)


def test_a_twin_shares_weights_and_nothing_else(edited, tokenizer):
    twin = twin_of(edited.model)
    batch = encoded(tokenizer, TEXTS)
    expected = answers(edited.model, batch)
    assert torch.equal(answers(twin, batch), expected)
    weights = dict(edited.model.named_parameters())
    assert all(p.data_ptr() == weights[name].data_ptr() for name, p in twin.named_parameters())
    assert not {id(m) for m in twin.modules()} & {id(m) for m in edited.model.modules()}
    assert all(p.requires_grad for p in weights.values())
    for module in twin.modules():
        module.register_forward_hook(lambda *_: pytest.fail("the model ran its twin's hook"))
        if isinstance(module, HookedLinear):
            module.delta.fill_(7.0)
            module.mode = "temporary"
    twin.train()
    assert torch.equal(answers(edited.model, batch), expected)


def test_a_change_waits_for_passes_and_they_for_it():
    passes, order = Passes(), []
    inside, changing = threading.Event(), threading.Event()

    def read():
        passes.begin()
        inside.set()
        changing.wait(5)
        order.append("read")
        passes.end()
        passes.begin()  # waits for the change that is under way by now
        order.append("read again")
        passes.end()

    reader = threading.Thread(target=read)
    reader.start()
    inside.wait(5)
    threading.Timer(0.1, changing.set).start()
    with passes.between():
        order.append("change")
        reader.join(0.1)
    reader.join(5)
    assert order == ["read", "change", "read again"]


def test_a_pass_that_was_cut_off_does_not_hold_up_changes():
    passes = Passes()
    reader = threading.Thread(target=passes.begin)
    reader.start()
    reader.join()
    passes.begin()  # of this thread, interrupted
    with passes.between():
        pass
    passes.begin()
    passes.end()
    with passes.between():
        pass


def test_a_closed_editor_says_so(edited, tokenizer):
    edited.close()
    for step in (lambda: edited.edit(some_requests(6)[4:], random_values(2)), lambda: edited.retract("edit-0"), lambda: edited.rollback(0)):
        with pytest.raises(ComebaError, match="closed"):
            step()


@pytest.mark.parametrize("size", [2.5, 0, -1, True, "3"])
def test_batches_of_a_whole_number(edited, size):
    with pytest.raises(ComebaError, match="batch_size"):
        edited.edit_all(some_requests(6)[4:], size)


def test_edits_under_no_grad(edited, tokenizer):
    with torch.no_grad():
        report = edited.edit(some_requests(6)[4:])
    assert len(report.losses) == 2 and edited.step == 2


def test_a_twin_of_a_model_whose_blocks_are_elsewhere(tiny_model, tokenizer, tmp_path):
    """Placed by accelerate, blocks on the CPU and on disk: edits as of the model in one place."""
    accelerate = pytest.importorskip("accelerate")
    values, deltas = random_values(3), []
    for offloaded in (False, True):
        model = small_model(tiny_model, "gpt2").double()
        if offloaded:
            places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
            places |= {f"transformer.h.{n}": "disk" if n in (1, 2) else "cpu" for n in range(4)}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        editor = make_editor(model, tokenizer)
        editor.edit(some_requests(3), values)
        deltas.append([edits_of(layer) for layer in editor.layers.values()])
        editor.edit(some_requests(4)[3:])
    for whole, placed in zip(*deltas, strict=True):
        assert whole.any() and torch.allclose(whole, placed, rtol=0, atol=1e-9)
