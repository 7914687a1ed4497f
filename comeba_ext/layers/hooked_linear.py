"""HookedLinear: a linear layer with all edits beside it, and the token-by-token choice between the two."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.sequence_context import SequenceContext
from comeba_ext.ops.hooked_linear import decode_hook_available
from comeba_ext.scores import score_named
from comeba_ext.scores.base import Score, keep_precise

log = logging.getLogger(__name__)

MODES = ("off", "temporary", "validated")
GATES = ("exact", "sketch")


class HookedLinear(nn.Module):
    """Drop-in for a linear layer: ``base_layer(x)``, plus ``x @ deltaᵀ`` for the tokens in scope.

    The base layer is called as a module and never written, so it may be quantised, LoRA-wrapped or dispatched over
    devices. Modes: ``"off"`` returns the base output bit for bit; ``"temporary"`` uses the edited output everywhere
    (while editing); ``"validated"`` uses it for tokens whose score reaches ``alpha`` (COMEBA-HK, arXiv 2403.05330,
    section 3.3).

    Args:
        base: ``nn.Linear``, GPT-2's ``Conv1D``, or any module with ``in_features``/``out_features``.
        scope: name of the :class:`~comeba_ext.scores.Score`: ``"zscore"`` (the paper's: the response, relative to the other
            tokens of the sequence), ``"reference"`` (the response, relative to an average corpus token's, DESIGN §3),
            ``"nearest"`` (the similarity to the nearest edited key), or one of :func:`~comeba_ext.scores.register_score`.
        alpha: threshold; default the score's start: 2.2 for zscore, infinity for reference, 1 for nearest.
        gate: what responses are computed from: ``"exact"``, the edit of every token, a second product of the layer's
            size; or ``"sketch"``, a few rows with nearly the same norm, after which only tokens in scope pay for their
            edit (:mod:`comeba_ext.ops.sketch`). ``alpha`` belongs to the gate it was set with. Of no effect with nearest.
        dtype: of ``delta``; default the base weight's, or float32 where that is quantised.
        device: of ``delta``; default where the base layer computes.

    Attributes:
        base_layer: the wrapped layer.
        delta: ``(d_out, d_in)`` buffer, the sum of all edits.
        alpha: scalar buffer, float64 on the base's device.
        score: what decides which tokens are in scope, with the buffers that it needs.
        mode: one of ``MODES``.

    Raises:
        ArchitectureError: ``base`` is not a linear layer.
        ComebaError: unknown scope, gate or mode.
    """

    def __init__(
        self,
        base: nn.Module,
        scope: str = "zscore",
        alpha: float | None = None,
        *,
        gate: str = "exact",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if isinstance(base, HookedLinear):
            raise ArchitectureError("the layer is hooked already; edit through the editor that holds it")
        kind = score_named(scope)
        if gate not in GATES:
            raise ComebaError(f"unknown gate {gate!r}; choose one of {', '.join(GATES)}")
        self.base_layer = base
        self.in_features, self.out_features = shape_of(base)
        self._mode = "validated"
        self.context: SequenceContext | None = None
        self.name = ""
        weight = getattr(base, "weight", None)
        weight = weight if isinstance(weight, torch.Tensor) else None  # a method in torch's own quantised layers
        if dtype is None:
            dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
            dtype = dtype if dtype.itemsize > 1 else torch.float32  # 8-bit floats store, they do not compute
        if device is None:
            device = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
        if device is None:
            device = weight.device if weight is not None and weight.device.type != "meta" else "cpu"
        alpha = kind.start if alpha is None else float(alpha)
        self.register_buffer("delta", torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64, device=device))
        self.score: Score = kind(self.in_features, gate=gate, dtype=dtype, device=device)

    @property
    def scope(self) -> str:
        """The score's name."""
        return self.score.name

    @property
    def gate(self) -> str:
        """What the score's responses are computed from."""
        return self.score.gate

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def reads_sequence(self) -> bool:
        """Whether a token's output depends on other tokens, beyond what the base layer does."""
        return self.score.whole_sequence and self.mode == "validated"

    @property
    def mode(self) -> str:
        """Inside :func:`disabled`, for the thread that is, ``"off"``."""
        return "off" if self.context is not None and self.context.here.off else self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ComebaError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
        self._mode = mode

    def forward(self, x: torch.Tensor, *args, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Base or edited output.

        Args:
            x: ``(batch, seq, d_in)``, or ``(tokens, d_in)`` (one sequence, unless the model's mask says otherwise).
            mask: ``(batch, seq)`` bool of real tokens, for the z-score; inside a model it is taken from the model's attention
                mask. Other scores look at single tokens, and decide of padding as of any.

        Returns:
            ``(..., d_out)`` in the base layer's output dtype.
        """
        mode = self.mode
        if mode == "off":
            return self.base_layer(x, *args, **kwargs)
        if mode == "temporary":
            output = self.base_layer(x, *args, **kwargs)
            return output + self.edit_output(x).to(output.dtype)
        score = self.score
        if score.whole_sequence and not torch.compiler.is_compiling():
            self._refuse_recomputing()
        plain = self._plain_base() and not args and not kwargs
        given, mask = self._as_sequences(self._to_delta(x), mask)
        past = self._past()
        if plain and score.decodes and self._decodes(x):
            output, after = score.decode(given, self, mask, past)
            output = output.reshape(*x.shape[:-1], self.out_features)
        else:
            output = self.base_layer.forward(x) if plain else self.base_layer(x, *args, **kwargs)
            shape = output.shape
            if len(shape) != 3:
                output = output.reshape(*given.shape[:-1], self.out_features)
            # A base layer that is more than a product may hand out, or keep, what it returned.
            output, after = score.hook(output, given, self, mask, past, plain)
            if len(shape) != 3:
                output = output.reshape(shape)
        if self.context is not None and after is not None:
            self.context.here.updated[self.name] = after
        return output

    def _refuse_recomputing(self) -> None:
        """Gradient checkpointing runs blocks again in the backward pass, when nobody knows the mask and the tokens before."""
        if self.context is not None and self.context.here.shape is None and torch._C._current_graph_task_id() != -1:
            raise ComebaError(f"the score {self.scope!r} cannot be computed again in gradient checkpointing; switch that off, or use "
                              "score 'nearest' or 'reference'")  # fmt: skip

    def edit_output(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ deltaᵀ``, ``(..., d_out)``."""
        return F.linear(self._to_delta(x), self.delta)

    def scores(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Score of every token, ``(batch, seq)``, for ``x`` of ``(batch, seq, d_in)`` with its mask."""
        x, mask = self._as_sequences(self._to_delta(x), mask)
        return self.score.scores(x, self, mask, self._past())[0]

    def peak_scores(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The highest score of every row's real tokens, ``(batch,)``, for ``x (batch, seq, d_in)`` and its bool mask."""
        x, mask = self._as_sequences(self._to_delta(x), mask.to(x.device))
        return self.score.peaks(x, mask, self)

    @torch.no_grad()
    def take_over(self, other: HookedLinear) -> None:
        """The edits and thresholds of another layer of this shape; buffers stay where they are as long as they fit."""
        self.delta.copy_(other.delta)
        self.alpha.copy_(other.alpha)
        self.score.take_over(other.score)
        self.score.refresh(self)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> HookedLinear:
        """What PEFT asks for when it takes its adapters out (``merge_and_unload``): out of the base layer, the edits stay."""
        base = self.base_layer
        if hasattr(base, "get_base_layer"):
            if merge:
                base.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer = base.get_base_layer()
        return self

    def _to_delta(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.delta.dtype
        return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _past(self) -> torch.Tensor | None:
        """What the sequence's earlier tokens left behind for the score."""
        return self.context.here.statistics.get(self.name) if self.context is not None else None

    def _plain_base(self) -> bool:
        """Whether the base layer is a product and nothing else: no hooks, no quantisation, no adapters."""
        base = self.base_layer
        product = type(base) is nn.Linear or type(base).__qualname__ == "Conv1D"
        return product and not (base._forward_hooks or base._forward_pre_hooks or "_hf_hook" in base.__dict__)

    def _decodes(self, x: torch.Tensor) -> bool:
        """Whether one fused pass over both weights takes this input; the base layer is known to be plain."""
        if not decode_hook_available(x, self.delta) or type(self.base_layer) is not nn.Linear:
            return False
        weight = self.weight
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return weight.dtype == x.dtype and not grad and not torch.is_autocast_enabled(x.device.type)

    def _as_sequences(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` as ``(batch, seq, d_in)`` and its mask; some families (OPT) flatten tokens before the MLP.

        Only a score that looks at more than the token asks the model for its mask.
        """
        if mask is None and self.context is not None and self.score.whole_sequence:
            mask = self.context.here.mask
        if mask is not None:
            mask = mask.to(x.device)
            return x.reshape(*mask.shape, x.shape[-1]), mask
        if x.dim() == 3:
            return x, None
        if self.context is not None and self.context.here.shape is not None:
            return x.reshape(*self.context.here.shape, x.shape[-1]), None
        length = x.shape[-2] if x.dim() > 1 else 1
        return x.reshape(-1, length, x.shape[-1]), None

    def _apply(self, fn, recurse: bool = True):
        """``model.half()`` and the like move the threshold but leave it as precise as it is."""
        return keep_precise(self, ("alpha",), lambda: super(HookedLinear, self)._apply(fn, recurse))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, mode={self._mode!r}, "
            f"scope={self.scope!r}, gate={self.gate!r}"
        )


def install(
    model: nn.Module, names: list[str], decoder: str, scope: str, alpha: float | None, gate: str = "exact"
) -> dict[str, HookedLinear]:
    """Put a :class:`HookedLinear` around each named layer, all listening to one :class:`SequenceContext`.

    Args:
        model: the model, changed in place; its weights are not.
        names: of the layers, as in ``model.named_modules()``.
        decoder: name of the module that receives the attention mask.

    Raises:
        ArchitectureError: a name matches nothing or a layer is hooked already; then the model is as before.
    """
    known = dict(model.named_modules())
    for name in (*names, decoder):
        if name not in known:
            raise ArchitectureError(f"the model has no module {name!r}; see model.named_modules()")
    layers = {name: HookedLinear(known[name], scope, alpha, gate=gate) for name in names}
    context = SequenceContext(known[decoder])
    for name, layer in layers.items():
        layer.context, layer.name = context, name
        layer.train(known[name].training)
        model.set_submodule(name, layer)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _SaveBase(model)
    return layers


def uninstall(model: nn.Module) -> None:
    """Put every base layer back and stop listening: the model as it was before :func:`install`."""
    contexts = set()
    for name, layer in hooked_layers(model).items():
        contexts.add(layer.context)
        model.set_submodule(name, layer.base_layer)
    for context in contexts - {None}:
        context.detach()
    if isinstance(vars(model).get("save_pretrained"), _SaveBase):
        del model.save_pretrained


class _SaveBase:
    """``model.save_pretrained`` of a hooked model: the base model as it came.

    Under the hooked layers' names no other program would find the base weights, and would start those layers at random.
    """

    def __init__(self, model: nn.Module):
        self.model = model  # a copy of the model has a copy of this, with the copy in it

    def __call__(self, *args, state_dict: dict | None = None, **kwargs):
        log.warning("save_pretrained writes the base model without its edits; Editor.save_pretrained saves the edits")
        save = functools.partial(type(self.model).save_pretrained, self.model, *args, **kwargs)
        if type(self.model).__module__.startswith("peft"):
            # It looks for its adapters among the modules, so for the time of the save there are no hooks.
            layers = hooked_layers(self.model)
            try:
                for name, layer in layers.items():
                    self.model.set_submodule(name, layer.base_layer)
                return save()
            finally:
                for name, layer in layers.items():
                    self.model.set_submodule(name, layer)
        state = self.model.state_dict() if state_dict is None else state_dict
        return save(state_dict=base_state(self.model, state))


def base_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A hooked model's state dict with the base weights under the base model's names, and nothing of the edits."""
    names = sorted(hooked_layers(model), key=len)
    found = {}
    for key, value in state.items():
        name = next((name for name in names if key.startswith(f"{name}.")), None)
        inner = None if name is None else key[len(name) + 1 :]
        if inner is None:
            found[key] = value
        elif inner.startswith("base_layer."):
            found[f"{name}.{inner[len('base_layer.') :]}"] = value
    return found


def hooked_layers(model: nn.Module) -> dict[str, HookedLinear]:
    """Every :class:`HookedLinear` of a model by name, in the order of the blocks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HookedLinear)}


@contextmanager
def disabled(model: nn.Module):
    """Inside, in this thread, every hooked layer is off: the original model, bit for bit. Other threads go on as they were."""
    layers = hooked_layers(model).values()
    alone = {layer: layer.mode for layer in layers if layer.context is None}  # put into the model by hand
    contexts = {layer.context for layer in layers} - {None}
    try:
        for context in contexts:
            context.here.off += 1
        for layer in alone:
            layer.mode = "off"
        yield model
    finally:
        for context in contexts:
            context.here.off -= 1
        for layer, mode in alone.items():
            layer.mode = mode


@contextmanager
def between_passes(model: nn.Module):
    """Inside, no other thread is in a forward pass of the model (compiled ones do not say so)."""
    with ExitStack() as stack:
        for context in {layer.context for layer in hooked_layers(model).values()} - {None}:
            stack.enter_context(context.passes.between())
        yield


def shape_of(base: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)``.

    Raises:
        ArchitectureError: not a linear layer.
    """
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return base.in_features, base.out_features
    if hasattr(base, "nf"):  # GPT-2's Conv1D stores its weight as (d_in, d_out)
        return base.weight.shape[0], base.nf
    raise ArchitectureError(f"{type(base).__name__} is not a linear layer: it has no in_features and out_features")
