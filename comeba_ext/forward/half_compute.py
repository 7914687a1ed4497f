"""Matrix products in half precision, everything else as it was: the memory-bound part of a model stays in its dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from comeba_ext.forward.budget import free_memory
from comeba_ext.forward.partial import restore


def fast_product_dtype(model: nn.Module) -> str | None:
    """``"bfloat16"`` for a float32 model on a device that multiplies it natively: processors with AVX-512 BF16 or AMX, GPUs from
    compute capability 8.0; elsewhere it would be emulated, and slower. And where twice the copies' memory is free."""
    weight, size = model.get_input_embeddings().weight, sum(p.numel() * p.element_size() for p in model.parameters())
    free = free_memory(weight.device)
    if weight.dtype != torch.float32 or (free is not None and free < size):
        return None
    if weight.device.type == "cuda":
        fast = torch.version.cuda is not None and torch.cuda.get_device_capability(weight.device)[0] >= 8
    else:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.6 has no public ones
        fast = weight.device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
    return "bfloat16" if fast else None


@contextmanager
def products_in(dtype: torch.dtype | None, modules: Iterable[nn.Module]):
    """Inside, the linear layers of ``modules`` multiply copies of their weights in ``dtype``, and return their input's.

    Like autocast, but weights are converted once and not at every call, which would cost more than it saves when few
    tokens run many times. No gradient flows to the weights. Left alone are quantised, wrapped and offloaded layers, and
    those in ``dtype`` already.

    Args:
        dtype: ``None`` changes nothing.
    """
    found = [m for module in modules for m in module.modules()] if dtype is not None else []
    found = [m for m in dict.fromkeys(found) if type(m) in (nn.Linear, Conv1D) and not hasattr(m, "_hf_hook")]
    found = [m for m in found if m.weight.is_floating_point() and m.weight.dtype != dtype]
    originals = [m.forward for m in found]
    try:
        for module in found:
            module.forward = _product(module, dtype)
        yield
    finally:
        for module, original in zip(found, originals, strict=True):
            restore(module, original)


def products_behind(block: int, model: nn.Module, blocks: Sequence[nn.Module], compute_dtype: str | None):
    """:func:`products_in` for the blocks behind number ``block`` and the head, in the dtype that settings name: what is trained in
    that block, or before it, is computed with the model's own."""
    dtype = getattr(torch, compute_dtype) if compute_dtype else None
    return products_in(dtype, [*blocks[block + 1 :], model.get_output_embeddings()])


def _product(module: nn.Module, dtype: torch.dtype):
    weight = module.weight.detach()
    weight = (weight.T if isinstance(module, Conv1D) else weight).to(dtype).contiguous()
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias).to(x.dtype)
