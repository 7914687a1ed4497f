"""Attention with shared keys against a loop over heads, and where it is used."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from comeba_ext.forward import grouped_attention as module


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


def inputs(seed=0, queries=4, keys=9):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key, value = random(5, 6, queries, 8), random(5, 2, keys, 8), random(5, 2, keys, 8)
    allowed = torch.rand(5, 1, queries, keys, generator=generator) < 0.7
    allowed[..., 0] = True
    return [part.requires_grad_() for part in (query, key, value)], allowed


def by_loops(query, key, value, allowed, scaling):
    """Head by head and query by query: softmax of the allowed products, times the values."""
    out = []
    for r in range(5):
        for n in range(query.shape[2]):
            for h in range(6):
                there = allowed[r, 0, n].nonzero()[:, 0]
                share = torch.softmax(key[r, h // 3, there] @ query[r, h, n] * scaling, 0)
                out.append(share @ value[r, h // 3, there])
    return torch.stack(out).view(5, query.shape[2], 6, 8)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_the_same_as_a_loop_over_heads(added, scaling):
    parts, allowed = inputs()
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf) if added else allowed
    found, weights = module.grouped_attention(Layer(), *parts, mask, scaling=scaling)
    expected = by_loops(*parts, allowed, 8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(found, expected)
    assert weights is None
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parts) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_it_is_torchs_bit_for_bit():
    """What another thread generates meanwhile stays as it is."""
    parts, allowed = inputs()
    with torch.no_grad():
        assert torch.equal(
            module.grouped_attention(Layer(), *parts, allowed)[0], sdpa_attention_forward(Layer(), *parts, allowed)[0]
        )  # fmt: skip
        assert torch.equal(module.grouped_attention(Layer(), *parts, None)[0], sdpa_attention_forward(Layer(), *parts, None)[0])


def test_where_it_is_used(tiny_model):
    for family, implementation, expected in (("llama", "sdpa", True), ("llama", "eager", False), ("gpt2", "sdpa", False)):
        model = tiny_model(family)
        model.set_attn_implementation(implementation)
        config = model.get_decoder().config if hasattr(model, "get_decoder") else model.transformer.config
        assert module.can_group(model.base_model) == expected
        if expected:
            with pytest.raises(KeyError), module.grouped(model.base_model):
                assert config._attn_implementation == module.NAME
                raise KeyError
            assert config._attn_implementation == implementation
