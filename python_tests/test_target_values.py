"""Batched target values against one request at a time: full forward passes, autograd and torch.optim.Adam."""

import random

import pytest
import torch
from test_editor import edits_of
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from comeba_ext import EditConfig, Editor
from comeba_ext.editing import target_values as module
from comeba_ext.editing.target_values import optimise_target_values
from comeba_ext.errors import RequestError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.cached_suffix import Suffix
from comeba_ext.text.ends import end_tokens
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import essence_rows, target_rows

SMALL = {"gpt2": {"n_layer": 4, "n_inner": 48}, "gptj": {"n_layer": 4, "n_inner": 48}, "llama": {"num_hidden_layers": 4}}
BLOCKS = {"gpt2": "transformer.h", "gptj": "transformer.h", "llama": "model.layers"}
# GPT-J attends, and Llama norms, in float32 whatever the dtype of the model.
TOLERANCE = {"gpt2": 1e-8, "gptj": 1e-5, "llama": 1e-5}
REQUESTS = [
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("{} works in the field of", "Marie Curie", "the piano and the guitar"),
    EditRequest("The capital of {}, as everyone knows, is", "Peru", "Paris"),
    EditRequest("{} is located in", "Angola", "Oslo, Norway"),
    EditRequest("People say that {} plays the", "Toko Yasuda", "Lima"),
]
PREFIXES = ["", "The city of Paris. ", "Who built it? "]


def settings(**changes):
    basic = {
        "layers": (1, 2),
        "lam": 20.0,
        "steps": 8,
        "lr": 0.3,
        "kl_factor": 0.5,
        "weight_decay": 2.0,
        "clamp": 0.9,
        "early_stop": 2.0,
        "prefixes": 0,
    }
    return EditConfig(**(basic | changes))


def edited_model(tiny_model, tokenizer, family, **changes):
    """A float64 model with three edits whose validated hooks act on the texts of ``REQUESTS``."""
    model = tiny_model(family, **SMALL[family]).double()
    editor = Editor(model, tokenizer, settings(**changes))
    words = " ".join(r.text for r in REQUESTS).split()
    draw = random.Random(0)
    editor.collect_covariance([" ".join(draw.choices(words, k=12)) for _ in range(60)], tokens=10**6, progress=False)
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 5
    edits = [EditRequest(r.prompt, r.subject, "Warsaw") for r in REQUESTS[:3]]
    editor.edit(edits, target_values=values)
    assert all(edits_of(layer).any() and layer.mode == "validated" for layer in editor.layers.values())
    return model, editor


def run(model, tokenizer, config, requests=REQUESTS, prefixes=PREFIXES):
    return optimise_target_values(model, tokenizer, Architecture.of(model), config, requests, prefixes)


class OneRequest:
    """DESIGN's objective for a single request, one unpadded text a forward pass of the whole model."""

    def __init__(self, model, tokenizer, family, config, request):
        self.model, self.config = model, config
        before, after = request.prompt.split("{}")
        self.texts = []  # token ids, subject's last position, target token ids
        for prefix in PREFIXES:
            head = prefix + before + request.subject
            stem = tokenizer(head + after)["input_ids"]
            whole = tokenizer(head + after + " " + request.target_new)["input_ids"]
            assert whole[: len(stem)] == stem
            # Without the target's last token, as it would count in the z-scores of the edits already made, unless it is asked what
            # comes behind it.
            self.texts.append(
                (whole if config.end_factor else whole[:-1], self._last(tokenizer, head + after, len(head)), whole[len(stem) :])
            )
        self.ends = ends_of(tokenizer)
        essence = f"{request.subject} is a"
        self.essence = tokenizer(essence)["input_ids"], self._last(tokenizer, essence, len(request.subject))
        self.block = model.get_submodule(f"{BLOCKS[family]}.{config.value_layer}")
        seen = []
        handle = self.block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            model(torch.tensor([self.texts[0][0]]))
        handle.remove()
        self.h = seen[0].reshape(-1, 32)[self.texts[0][1]]
        self.before = self._log_p(*self.essence, torch.zeros_like(self.h)).detach()[self.essence[1]]

    @staticmethod
    def _last(tokenizer, text, end):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return max(i for i, (a, b) in enumerate(offsets) if a < end)

    def _log_p(self, ids, last, delta):
        def add(m, args, out):
            hidden = out[0] if isinstance(out, tuple) else out
            rows = torch.zeros(hidden.shape[-2], 1, dtype=hidden.dtype)
            rows[last] = 1
            hidden = hidden + rows * delta
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = self.block.register_forward_hook(add)
        try:
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    def loss(self, delta):
        nll = 0.0
        for ids, last, target in self.texts:
            log_p = self._log_p(ids, last, delta)
            first = len(ids) + 1 - len(target)
            if self.config.end_factor:
                first -= 1
                nll = nll - self.config.end_factor * log_p[-1].exp()[self.ends].sum().log()
            nll = nll - sum(log_p[first + i - 1, t] for i, t in enumerate(target)) / len(target)
        now = self._log_p(*self.essence, delta)[self.essence[1]]
        kl = (now.exp() * (now - self.before)).sum()
        decay = delta.norm() / self.h.norm() ** 2
        return nll / len(self.texts) + self.config.kl_factor * kl + self.config.weight_decay * decay

    def solve(self):
        config, norm = self.config, self.h.norm()
        lr = config.lr * (norm.item() / 32**0.5 if config.lr_unit == "hidden_rms" else 1)
        delta = torch.zeros_like(self.h, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=lr)
        steps = clamped = 0
        for number in range(config.steps):
            loss = self.loss(delta)
            if loss.item() < config.early_stop or number == config.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
            with torch.no_grad():
                if delta.norm() > config.clamp * norm:
                    clamped += 1
                    delta.mul_(config.clamp * norm / delta.norm())
        return (self.h + delta).detach(), loss.item(), steps, clamped


def ends_of(tokenizer):
    """Tokens behind which the word before them is over, by what each writes behind a letter."""
    letter = tokenizer("x", add_special_tokens=False)["input_ids"]
    found = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([*letter, token], clean_up_tokenization_spaces=False)[1:]
        over = text[:1].isspace() or (text.strip('.,;:!?)]}"”»…。，、；：！？」』）') == "" and text != "")
        if over or token in tokenizer.all_special_ids:
            found.append(token)
    return found


def test_what_ends_an_object(tokenizer):
    assert end_tokens(tokenizer) == ends_of(tokenizer)
    assert len(tokenizer) / 10 < len(end_tokens(tokenizer)) < len(tokenizer) * 0.9
    words = ["x", "▁of", "teen", "▁the", "\n", ".", ",\n", "-", "'s", ".com", "…", "。", "」", "2", "</s>"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="x"))
    core.decoder = decoders.Metaspace()
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert [words[n] for n in end_tokens(other)] == ["▁of", "▁the", "\n", ".", ",\n", "…", "。", "」", "</s>"]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize(("lr_unit", "end_factor"), [("absolute", 0.0), ("hidden_rms", 0.0), ("hidden_rms", 0.7)])
def test_agrees_with_one_request_at_a_time(tiny_model, tokenizer, family, lr_unit, end_factor):
    model, _ = edited_model(tiny_model, tokenizer, family)
    config = settings(lr_unit=lr_unit, lr=0.3, clamp=0.2, end_factor=end_factor)
    problems = [OneRequest(model, tokenizer, family, config, request) for request in REQUESTS]
    with torch.no_grad():  # an early stop between the requests' first losses: some stop soon, some never
        losses = sorted(p.loss(torch.zeros(32, dtype=torch.float64)).item() for p in problems)
    config = settings(lr_unit=lr_unit, lr=0.3, clamp=0.2, early_stop=(losses[0] + losses[1]) / 2, end_factor=end_factor)
    for problem in problems:
        problem.config = config
    expected = [problem.solve() for problem in problems]
    assert len({steps for _, _, steps, _ in expected}) > 1  # not all stop at once
    assert any(clamped for *_, clamped in expected)
    found = run(model, tokenizer, config)
    assert found.steps == [steps for _, _, steps, _ in expected]
    for value, loss, (wanted, wanted_loss, _, _) in zip(found.values, found.losses, expected, strict=True):
        assert ((value - wanted).norm() / wanted.norm()).item() < TOLERANCE[family]
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE[family])


@pytest.mark.parametrize("part", ["kl_factor", "weight_decay"])
def test_every_term_counts(tiny_model, tokenizer, part):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    with_it = run(model, tokenizer, settings(early_stop=0.0)).values
    without = run(model, tokenizer, settings(early_stop=0.0, **{part: 0.0})).values
    assert ((with_it - without).norm() / without.norm()).item() > 1e-3


def test_groups_and_order_do_not_matter(tiny_model, tokenizer, monkeypatch):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    whole = run(model, tokenizer, settings())
    sizes = []
    real = module._Objective

    def counted(suffix, config, by_request, *args):
        sizes.append(len(by_request))
        return real(suffix, config, by_request, *args)

    monkeypatch.setattr(module, "_Objective", counted)
    for max_tokens, groups in ((1, 5), (300, None), (4096, 1)):
        sizes.clear()
        order = [3, 0, 4, 2, 1]
        found = run(model, tokenizer, settings(max_tokens=max_tokens), [REQUESTS[i] for i in order])
        assert sum(sizes) == 5 and (len(sizes) == groups if groups else 1 < len(sizes) < 5)
        assert torch.allclose(found.values, whole.values[order], rtol=1e-9, atol=1e-9)
        assert found.steps == [whole.steps[i] for i in order]
        assert found.losses == pytest.approx([whole.losses[i] for i in order], rel=1e-9)


def test_what_cannot_end_is_found_without(monkeypatch):
    """An end that no model writes: values are those of the objective without it, and the object leads."""
    from comeba_ext import testbed

    model, tokenizer = testbed.load()
    requests = testbed.facts()[:4]
    without = EditConfig.for_model(model, optimizer="polyak", prefixes=0)
    expected = run(model, tokenizer, without, requests, [""])
    monkeypatch.setattr(module, "end_tokens", lambda tokenizer: [tokenizer.bos_token_id or 0])
    found = run(model, tokenizer, without.replace(end_factor=0.25), requests, [""])
    assert torch.allclose(found.values, expected.values, rtol=0, atol=1e-4)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    assert all(more > less for more, less in zip(found.steps, expected.steps, strict=True))  # those of the tries before count


def test_facts_of_one_subject_share_a_delta(tiny_model, tokenizer):
    """Their loss is the mean over all their rows."""
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    requests = [
        EditRequest("The mother tongue of {} is", "Peru", "English"),
        REQUESTS[1],
        EditRequest("{} is located in", "Peru", "Oslo, Norway"),
    ]
    config = settings(early_stop=0.0, steps=4, weight_decay=0.0, kl_factor=0.0)
    rows, essence = target_rows(tokenizer, requests, PREFIXES), essence_rows(tokenizer, requests)
    of = lambda *numbers: [row for row in rows if row.request in numbers]  # noqa: E731
    delta = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(own):
        suffix = Suffix(model, Architecture.of(model), 2, 0, 4096)
        suffix.prepare(rows + essence)
        objective = module._Objective(suffix, config, [own])
        objective.evaluate(torch.zeros_like(objective.h), False)
        return objective.evaluate(delta, False)[0].item()

    apart = [loss([*of(n), essence[n]]) for n in (0, 2)]
    assert loss([*of(0, 2), essence[0]]) == pytest.approx(sum(apart) / 2, rel=1e-9) and abs(apart[0] - apart[1]) > 0.1


def test_what_facts_of_one_subject_add_is_the_same_unless_they_contradict():
    from comeba_ext import testbed

    model, tokenizer = testbed.load()
    fact, other = testbed.facts()[:2]
    again = EditRequest(fact.rephrase_prompts[0], fact.subject, fact.target_new)
    contrary = EditRequest(fact.prompt, fact.subject, fact.ground_truth)
    config, seen = EditConfig.for_model(model, optimizer="polyak", prefixes=0), []
    block = model.get_submodule(f"model.layers.{config.value_layer}")
    handle = block.register_forward_hook(lambda m, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))

    def added(requests, values):
        for request, value in zip(requests, values, strict=True):
            with torch.no_grad():
                model(torch.tensor([tokenizer(request.text)["input_ids"]]))
            last = OneRequest._last(tokenizer, request.text, request.place)
            yield value - seen[-1][last]

    for third, shared in ((again, True), (contrary, False)):
        requests = [fact, other, third]
        found = optimise_target_values(model, tokenizer, Architecture.of(model), config, requests, [""], together=[[0, 2], [1]])
        alone = [run(model, tokenizer, config, [request], [""]).values[0] for request in requests]
        first, _, last = added(requests, found.values)
        assert torch.allclose(found.values[1], alone[1], rtol=0, atol=1e-4)
        assert torch.allclose(first, last, rtol=0, atol=1e-4) == shared
        assert all(torch.allclose(found.values[n], alone[n], rtol=0, atol=1e-4) != shared for n in (0, 2))
        assert max(found.losses) < config.early_stop
    handle.remove()


def test_what_polyak_misses_is_tried_with_adam(monkeypatch):
    """Only that, from zero; the other requests keep what they have."""
    from comeba_ext import testbed

    model, tokenizer = testbed.load()
    config, requests = EditConfig.for_model(model, steps=2, optimizer="polyak", early_stop=0.001), testbed.facts()[:10]
    adam = run(model, tokenizer, config.replace(optimizer="adam"), requests)
    with monkeypatch.context() as patch:
        patch.setitem(module.OPTIMISERS, "adam", lambda path: None)  # a second try that finds nothing
        polyak = run(model, tokenizer, config, requests)
    found = run(model, tokenizer, config, requests)
    again = [n for n in range(10) if found.steps[n] == 2]
    assert 0 < len(again) < 10 and set(polyak.steps) == {1}
    for n in range(10):
        kept = torch.allclose(found.values[n], polyak.values[n], rtol=0, atol=1e-5)
        if n not in again:
            assert kept
        elif not kept:
            assert torch.allclose(found.values[n], adam.values[n], rtol=0, atol=1e-5)
            assert found.losses[n] == pytest.approx(adam.losses[n], rel=1e-4)


def test_gradient_against_finite_differences(tiny_model, tokenizer):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    rows = target_rows(tokenizer, REQUESTS[:2], PREFIXES)
    essence = essence_rows(tokenizer, REQUESTS[:2])
    by_request = [[*(row for row in rows if row.request == n), essence[n]] for n in range(2)]
    suffix = Suffix(model, Architecture.of(model), 2, 0, 4096)
    suffix.prepare(rows + essence)
    objective = module._Objective(suffix, settings(), by_request)
    objective.evaluate(torch.zeros_like(objective.h), False)
    delta = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, gradient = objective.evaluate(delta, True)
    generator = torch.Generator().manual_seed(1)
    for n in range(2):
        for _ in range(3):
            way = torch.zeros_like(delta)
            way[n] = torch.randn(32, generator=generator, dtype=torch.float64)
            up, down = (objective.evaluate(delta + s * 1e-5 * way, False)[0] for s in (1, -1))
            slope = (up - down) / 2e-5
            assert slope[n].item() == pytest.approx((gradient * way).sum().item(), rel=1e-5, abs=1e-8)
            assert slope[1 - n].item() == pytest.approx(0, abs=1e-8)  # requests never meet


def test_number_of_evaluations_and_steps(tiny_model, tokenizer, monkeypatch):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    evaluations = []
    real = module.Descent.evaluate
    monkeypatch.setattr(module.Descent, "evaluate", lambda *a, **k: evaluations.append(int(a[0].open.sum())) or real(*a, **k))
    found = run(model, tokenizer, settings(steps=4, early_stop=0.0))
    assert evaluations == [5] * 4 and found.steps == [3] * 5
    evaluations.clear()
    one = run(model, tokenizer, settings(steps=1, early_stop=0.0))  # evaluated, never moved
    assert evaluations == [5] and one.steps == [0] * 5
    evaluations.clear()
    soon = run(model, tokenizer, settings(steps=4, early_stop=1e9))  # below the bound before the first step
    assert evaluations == [5] and soon.steps == [0] * 5
    assert torch.equal(soon.values, one.values)
    assert not torch.equal(found.values, one.values)


def test_values_stay_in_the_clamp_ball(tiny_model, tokenizer):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    h = run(model, tokenizer, settings(steps=1)).values
    found = run(model, tokenizer, settings(early_stop=0.0, clamp=0.1, lr=1.0)).values
    share = (found - h).norm(dim=-1) / h.norm(dim=-1)
    assert torch.allclose(share, torch.full_like(share, 0.1), rtol=1e-9)


def test_nothing_is_left_behind(tiny_model, tokenizer):
    """Blocks run again after an optimisation, and after one that was interrupted."""
    model, editor = edited_model(tiny_model, tokenizer, "gpt2")
    ids = torch.tensor([tokenizer(REQUESTS[0].text)["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
    run(model, tokenizer, settings(steps=2))
    handle = model.transformer.h[3].register_forward_hook(lambda m, a, o: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, settings(steps=2))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(block) for block in model.transformer.h)
    assert torch.equal(editor.target_values(REQUESTS), editor.target_values(REQUESTS))


def test_not_a_number_is_an_error(tiny_model, tokenizer):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for steps in (1, 3):
        with pytest.raises(RequestError, match="not finite"):
            run(model, tokenizer, settings(steps=steps))


def test_context_length(tiny_model, tokenizer):
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    with pytest.raises(RequestError, match="context"):
        run(model, tokenizer, settings(), [EditRequest("Lima " * 150 + "{} is", "Peru", "x")])


def test_products_in_bfloat16(tiny_model, tokenizer):
    """Close to float32, and the model is as before, weights, dtypes and methods."""
    model = tiny_model("gpt2", **SMALL["gpt2"])
    ids = torch.tensor([tokenizer(REQUESTS[0].text)["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
    exact = run(model, tokenizer, settings(early_stop=0.0, steps=20))
    half = run(model, tokenizer, settings(early_stop=0.0, steps=20, compute_dtype="bfloat16"))
    assert half.values.dtype == torch.float32 and not torch.equal(half.values, exact.values)
    assert half.losses == pytest.approx(exact.losses, rel=0.05, abs=0.05)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_interrupted_edits_leave_the_last_complete_batch(tiny_model, tokenizer, monkeypatch):
    model = tiny_model("gpt2", **SMALL["gpt2"])
    editor = Editor(model, tokenizer, settings(steps=4, early_stop=0.0))
    editor.collect_covariance([r.text for r in REQUESTS] * 9, tokens=10**6, progress=False)
    real, calls = module.Descent.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 6:  # in the second batch's optimisation
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module.Descent, "evaluate", interrupted)
    states = []
    with pytest.raises(KeyboardInterrupt):
        for _ in editor.edit_all(REQUESTS, batch_size=2, progress=False):
            states.append({name: edits_of(layer) for name, layer in editor.layers.items()})
    assert editor.step == len(states) == 1 and len(editor.ledger) == 2
    for name, layer in editor.layers.items():
        assert layer.mode == "validated" and torch.equal(edits_of(layer), states[0][name]) and states[0][name].any()
    assert all("forward" not in vars(m) for m in model.modules())
    assert [len(r.request_ids) for r in editor.edit_all(REQUESTS[2:], batch_size=2, progress=False)] == [2, 1]


def test_polyak_returns_what_its_losses_say(tiny_model, tokenizer):
    """The losses reported are those of the values returned, also of requests that went back to their best point."""
    model, _ = edited_model(tiny_model, tokenizer, "gpt2")
    h = run(model, tokenizer, settings(steps=1)).values
    for steps in (2, 6):
        short = settings(optimizer="polyak", steps=steps, early_stop=0.0, clamp=3.0, kl_factor=0.01)
        found = run(model, tokenizer, short)
        problems = [OneRequest(model, tokenizer, "gpt2", short, request) for request in REQUESTS]
        for problem, value, start, loss in zip(problems, found.values, h, found.losses, strict=True):
            assert problem.loss(value - start).item() == pytest.approx(loss, rel=1e-6)
            assert (value - start).norm() <= short.clamp * start.norm() * (1 + 1e-9)
        alone = run(model, tokenizer, short.replace(max_tokens=1))
        assert torch.allclose(alone.values, found.values, rtol=1e-9, atol=1e-9)


def test_polyak_needs_fewer_steps():
    from comeba_ext import testbed

    model, tokenizer = testbed.load()
    config = EditConfig.for_model(model)
    requests = testbed.facts()[:10]
    adam, polyak = (run(model, tokenizer, config.replace(optimizer=name), requests) for name in ("adam", "polyak"))
    assert max(polyak.losses) < config.early_stop and max(polyak.steps) <= 6
    assert sum(polyak.steps) < 0.75 * sum(adam.steps)


def test_the_default_dtype_of_products(tiny_model, monkeypatch):
    """bfloat16 for a float32 model where the processor has it and the copies have room; else the model's own."""
    from comeba_ext.forward import half_compute

    model = tiny_model("llama")
    for native, free, dtype, expected in (
        (True, 1 << 40, torch.float32, "bfloat16"),
        (False, 1 << 40, torch.float32, None),
        (True, 1000, torch.float32, None),
        (True, None, torch.float32, "bfloat16"),
        (True, 1 << 40, torch.float64, None),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(half_compute, "free_memory", lambda device, free=free: free)
        model.to(dtype)
        assert EditConfig.for_model(model).compute_dtype == expected
        assert EditConfig.for_model(model, compute_dtype=None).compute_dtype is None
