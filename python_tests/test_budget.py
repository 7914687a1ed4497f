"""How many tokens go through a model at once."""

import pytest
import torch

from comeba_ext import EditConfig, Editor
from comeba_ext.editing import budget


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
