"""How many tokens go through a model at once."""

import pytest
import torch

from comeba_ext import EditConfig, Editor
from comeba_ext.forward import budget
from comeba_ext.forward.logits import logits_at, room_for_logits
from comeba_ext.text.encoding import dense_batches


def test_a_given_number_stands(tiny_model):
    assert budget.token_budget(tiny_model("gpt2"), 7) == 7


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "opt"])
def test_less_memory_fewer_tokens(tiny_model, family, monkeypatch):
    model = tiny_model(family)
    config = model.config
    each = budget.token_bytes(model)
    assert each >= config.num_hidden_layers * 18 * config.hidden_size * 4  # the MLP is at least as wide as the hidden state
    for free, expected in ((0, budget.LEAST), (each * 2000, 1000), (each * 2001, 1000), (1 << 60, 4096)):
        monkeypatch.setattr(budget, "free_memory", lambda device, free=free: free)
        assert budget.token_budget(model) == expected
    monkeypatch.setattr(budget, "free_memory", lambda device: None)
    assert budget.token_budget(model) == 4096


def test_memory_of_the_host(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  24000 kB\nMemAvailable:    1234 kB\n")
    assert budget._available(tmp_path / "meminfo") == 1234 * 1024
    assert budget._available(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert budget._left_in_group(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._left_in_group(tmp_path) is None
    assert budget.free_memory(torch.device("meta")) is None


def test_an_editor_asks_anew_at_every_step(tiny_model, tokenizer, monkeypatch):
    model = tiny_model("gpt2")
    editor = Editor(model, tokenizer, EditConfig(layers=(1,)))
    for free in (budget.token_bytes(model) * 1200, budget.token_bytes(model) * 800):
        monkeypatch.setattr(budget, "free_memory", lambda device, free=free: free)
        assert editor.max_tokens == free // (2 * budget.token_bytes(model))
    editor.close()


def test_what_starting_a_pass_is_worth(tiny_model):
    """As many tokens as their multiplications fill the time with: fewer, the larger the blocks."""
    blocks = [torch.nn.Linear(100, 50, bias=False), torch.nn.Linear(50, 100, bias=False)]
    cpu, operations = torch.device("cpu"), (0.003 + 2 * 0.0008) * 5e10
    assert budget.launch_tokens(blocks, cpu) == 64 + round(operations / 10_000)
    assert budget.launch_tokens(blocks, cpu, spared=blocks[1]) == 64 + round(operations / 5000)
    assert budget.launch_tokens(blocks, torch.device("cuda")) > budget.launch_tokens(blocks, cpu)
    assert budget.launch_tokens([], cpu) > 10**6


@pytest.mark.parametrize("launch", [0, 1, 5, 30, 1000])
def test_groups_cost_least(launch):
    """Against every way to cut the sorted lengths."""
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 2, 7, 9):
        lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
        cost = lambda groups: sum(launch + len(g) * max(g) for g in groups)  # noqa: E731
        ordered, best = sorted(lengths), 0 if not count else 10**9
        for cuts in range(1 << max(count - 1, 0)):
            ends = [n + 1 for n in range(count - 1) if cuts >> n & 1] + [count]
            best = min(best, cost([ordered[a:b] for a, b in zip([0, *ends], ends) if count]))
        groups = dense_batches(lengths, 10**6, launch)
        assert sorted(n for group in groups for n in group) == list(range(count))
        assert cost([[lengths[n] for n in group] for group in groups]) == best
        for group in dense_batches(lengths, 20, launch):
            assert len(group) == 1 or len(group) * max(lengths[n] for n in group) <= 20


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_logits_where_they_are_read_are_the_models_own(tiny_model, family):
    model = tiny_model(family).double()
    ids = torch.randint(5, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    places = [[0, 3], range(2, 5), [6]]
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        found = logits_at(model, {"input_ids": ids, "attention_mask": mask}, places)
        model.hf_device_map = {"a": 0, "b": 1}  # of several GPUs: its places are not those of the inputs
        spread = logits_at(model, {"input_ids": ids, "attention_mask": mask}, places)
        del model.hf_device_map
        real = model.forward
        model.forward = lambda input_ids, attention_mask, use_cache: real(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )
        without = logits_at(model, {"input_ids": ids, "attention_mask": mask}, places)  # of a model that cannot leave any out
    for n, row in enumerate(places):
        for own in (found, spread, without):
            assert own[n].shape == (len(row), whole.shape[-1]) and torch.allclose(own[n], whole[n, list(row)], atol=1e-10)


def test_room_for_logits(tiny_model):
    model = tiny_model("gpt2")
    assert room_for_logits(model, 4096) == 4096
    model.config.vocab_size = 262_144
    assert room_for_logits(model, 4096) == 512  # half a gigabyte of float32
    assert room_for_logits(model, 100) == 100
