"""Running only a part of a model, whatever its family: read a layer's input, stop early, resume from a block.

All of it works through forward hooks on the model's own modules, so attention masks, rotary tables and devices stay the
model's business.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

from comeba_ext.text.encoding import micro_batches, pad


class _Stop(Exception):
    """Raised by a hook once everything asked for was seen."""


def hidden_of(output):
    """The hidden states of a block's output, which is a tensor in some families and a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output, hidden: torch.Tensor):
    """The same block output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode, then every submodule's own training flag again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def frozen(model: nn.Module):
    """No parameter asks for a gradient inside, so that graphs hold only what leads to the caller's own tensors."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    """What a module was called with; some families hand a block its hidden states by name."""
    return args[0] if args else kwargs["hidden_states"]


class Seen(dict):
    """What :func:`watched` has seen last: ``before``, ``after``, ``x``, ``y``."""

    def hidden(self) -> dict[str, torch.Tensor]:
        """All of it as tensors."""
        return {name: hidden_of(value) for name, value in self.items()}


@contextmanager
def watched(block: nn.Module, projection: nn.Module):
    """Inside, every run leaves its hidden states ``before`` the block, the block's output ``after`` it, and the input
    ``x`` and output ``y`` of its projection in a :class:`Seen`."""
    seen = Seen()
    handles = [
        block.register_forward_pre_hook(lambda m, args, kw: seen.__setitem__("before", _input(args, kw)), with_kwargs=True),
        block.register_forward_hook(lambda m, args, out: seen.__setitem__("after", out)),
        projection.register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0])),
        projection.register_forward_hook(lambda m, args, out: seen.__setitem__("y", out)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_until(
    decoder: nn.Module,
    last: nn.Module,
    inputs: dict,
    taps: dict[nn.Module, Callable],
    output: Callable | None = None,
    *,
    before: bool = False,
) -> None:
    """Run ``decoder(**inputs)`` up to and including module ``last``, then stop. Other threads' passes meanwhile go on as they were.

    Args:
        taps: module to a function that is given the module's input tensor.
        output: a function that is given what ``last`` returns.
        before: stop when ``last`` has received its input, without running it.
    """

    thread = threading.get_ident()

    def on_input(tap):
        # Another thread that comes while the hook is put there or taken away calls it without kwargs.
        return lambda module, args, kwargs=None: tap(_input(args, kwargs)) if threading.get_ident() == thread else None

    def on_last(module, args, result):
        if threading.get_ident() != thread:
            return
        if output is not None:
            output(result)
        raise _Stop

    def on_last_input(module, args):
        if threading.get_ident() == thread:
            raise _Stop

    handles = [module.register_forward_pre_hook(on_input(tap), with_kwargs=True) for module, tap in taps.items()]
    handles.append(last.register_forward_pre_hook(on_last_input) if before else last.register_forward_hook(on_last))
    try:
        decoder(**inputs, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_at_ends(
    decoder: nn.Module, modules: dict[str, nn.Module], rows: list[list[int]], pad_token: int, max_tokens: int, device
) -> dict[str, torch.Tensor]:
    """Modules' inputs at the last token of every row, each ``(len(rows), d_in)``, of the model as it stands.

    Args:
        modules: in the order in which they run.
        rows: token ids; max_tokens: of a pass.
    """
    found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in modules}
    for group in micro_batches([len(row) for row in rows], max_tokens):
        ids, mask = pad([rows[n] for n in group], pad_token, device=device)

        def note(x: torch.Tensor, own: dict, group=group, mask=mask) -> None:
            x = x.reshape(*mask.shape, -1)  # OPT flattens tokens before the MLP
            last = mask.sum(1).to(x.device) - 1
            own.update(zip(group, x[torch.arange(len(group), device=x.device), last], strict=True))

        taps = {module: functools.partial(note, own=found[name]) for name, module in modules.items()}
        run_until(decoder, list(modules.values())[-1], {"input_ids": ids, "attention_mask": mask}, taps, before=True)
    return {name: torch.stack([own[n] for n in range(len(rows))]) for name, own in found.items()}


@contextmanager
def resumed(blocks: list[nn.Module], index: int, hidden: Callable[[], torch.Tensor], template):
    """Inside, blocks ``0 … index`` do nothing and block ``index`` returns ``hidden()``: a run starts in the middle.

    Args:
        blocks: the model's blocks.
        hidden: called once a run, gives the hidden states ``(batch, seq, d_model)`` after block ``index``.
        template: an output of block ``index``, for its type (tensor or tuple).
    """
    originals = [block.forward for block in blocks[: index + 1]]

    def skip(hidden_states, *args, **kwargs):
        return with_hidden(template, hidden_states)

    def start(hidden_states, *args, **kwargs):
        return with_hidden(template, hidden())

    try:
        for block in blocks[:index]:
            block.forward = skip
        blocks[index].forward = start
        yield
    finally:
        for block, original in zip(blocks, originals, strict=False):
            restore(block, original)


@contextmanager
def only_at(module: nn.Module, index: tuple[torch.Tensor, torch.Tensor]):
    """Inside, a position-wise module (an MLP) computes its outputs at some positions only; elsewhere they are zero.

    Args:
        index: rows and columns of ``(rows, seq, d)``.
    """
    original = module.forward

    def forward(x, *args, **kwargs):
        at = tuple(i.to(x.device) for i in index)
        some = original(x[at], *args, **kwargs)
        return some.new_zeros(*x.shape[:-1], some.shape[-1]).index_put(at, some)

    module.forward = forward
    try:
        yield
    finally:
        restore(module, original)


def restore(module: nn.Module, original) -> None:
    """Put back a ``module.forward`` that was read before it was replaced."""
    # An instance attribute shadowed the method; accelerate's dispatch may have put one there itself.
    if getattr(original, "__self__", None) is module and original.__func__ is type(module).forward:
        del module.forward
    else:
        module.forward = original
