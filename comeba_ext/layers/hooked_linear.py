"""HookedLinear: a linear layer with all edits beside it, and the token-by-token choice between the two."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.attachment import Attachment, attach
from comeba_ext.layers.shards import Shards
from comeba_ext.ops.hooked_linear import decode_hook_pays
from comeba_ext.scores import score_named
from comeba_ext.scores.base import Score

GATES = ("exact", "sketch")


class HookedLinear(Attachment):
    """Drop-in for a linear layer: ``base_layer(x)``, plus ``x @ deltaᵀ`` for the tokens in scope.

    The base layer is called as a module and never written, so it may be quantised, LoRA-wrapped or dispatched over
    devices. Modes: ``"off"`` returns the base output bit for bit; ``"temporary"`` uses the edited output everywhere
    (while editing); ``"validated"`` uses it for tokens whose score reaches ``alpha`` (COMEBA-HK, arXiv 2403.05330,
    section 3.3).

    Args:
        base: ``nn.Linear``, GPT-2's ``Conv1D``, or any module with ``in_features``/``out_features``.
        scope: name of the :class:`~comeba_ext.scores.Score`: ``"zscore"`` (the paper's: the response, relative to the other
            tokens of the sequence), ``"reference"`` (the response, relative to an average corpus token's, DESIGN §3),
            ``"nearest"`` (the similarity to the nearest edited key), ``"always"`` (every token), or one of
            :func:`~comeba_ext.scores.register_score`.
        alpha: threshold; default the score's start: 2.2 for zscore, infinity for reference, 1 for nearest and always.
        gate: what responses are computed from: ``"exact"``, the edit of every token, a second product of the layer's
            size; or ``"sketch"``, a few rows with nearly the same norm, after which only tokens in scope pay for their
            edit (:mod:`comeba_ext.ops.sketch`). ``alpha`` belongs to the gate it was set with. Of no effect with nearest.
        dtype: of ``delta``; default the base weight's, or float32 where that is quantised.
        device: of ``delta``; default where the base layer computes.

    Attributes:
        base_layer: the wrapped layer.
        delta: ``(d_out, d_in)`` buffer, the sum of all edits that are in no shard.
        shards: edits that are kept apart, subject by subject, where the score compares keys (:class:`~comeba_ext.layers.shards.Shards`);
            else ``None``.
        alpha: scalar buffer, float64 on the base's device.
        score: what decides which tokens are in scope, with the buffers that it needs.
        mode: one of ``modes``.

    Raises:
        ArchitectureError: ``base`` is not a linear layer.
        ComebaError: unknown scope, gate or mode.
    """

    modes = ("off", "temporary", "validated")
    appended = ("shards.left", "shards.right")
    precise = ("alpha",)
    grows = False  # what grows is in the shards and the score

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
        super().__init__(base, "validated")
        kind = score_named(scope)
        if gate not in GATES:
            raise ComebaError(f"unknown gate {gate!r}; choose one of {', '.join(GATES)}")
        self.in_features, self.out_features = shape_of(base)
        weight = getattr(base, "weight", None)
        weight = weight if isinstance(weight, torch.Tensor) else None  # a method in torch's own quantised layers
        if dtype is None:
            dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
            dtype = dtype if dtype.itemsize > 1 else torch.float32  # 8-bit floats store, they do not compute
        device = device_of(base) if device is None else device
        alpha = kind.start if alpha is None else float(alpha)
        self.register_buffer("delta", torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64, device=device))
        self.score: Score = kind(self.in_features, gate=gate, dtype=dtype, device=device)
        self.shards = Shards(self.in_features, self.out_features, dtype=dtype, device=device) if kind.compares_keys else None

    @property
    def scope(self) -> str:
        """The score's name."""
        return self.score.name

    @property
    def gate(self) -> str:
        """What the score's responses are computed from."""
        return self.score.gate

    @property
    def keeps(self) -> str:
        return f"the running statistics of the score {self.scope!r} (scores 'nearest' and 'reference' have none)"

    @property
    def reads_sequence(self) -> bool:
        """Whether a token's output depends on other tokens, beyond what the base layer does."""
        return self.score.whole_sequence and self.mode == "validated"

    @property
    def reads_names(self) -> bool:
        return self.score.compares_keys

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
        if score.whole_sequence or score.named:
            self.refuse_recomputing(f"the score {self.scope!r}", ", or use score 'reference'")
        if any([buffer.is_meta for buffer in score._buffers.values()]):
            raise ComebaError(
                "the edits were offloaded with the weights, and only these come back for a forward pass; dispatch the model without "
                "offload_buffers"
            )
        plain = self._plain_base() and not args and not kwargs
        given, mask = self.as_sequences(self._to_delta(x), mask, self.score.whole_sequence)
        past = self.past()
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
        self.leave(after)
        return output

    def edit_output(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ deltaᵀ``, ``(..., d_out)``: what is edited everywhere in mode ``"temporary"``."""
        return F.linear(self._to_delta(x), self.delta)

    def scores(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Score of every token, ``(batch, seq)``, for ``x`` of ``(batch, seq, d_in)`` with its mask."""
        x, mask = self.as_sequences(self._to_delta(x), mask, self.score.whole_sequence)
        return self.score.scores(x, self, mask, self.past())[0]

    def peak_scores(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The highest score of every row's real tokens, ``(batch,)``, for ``x (batch, seq, d_in)`` and its bool mask."""
        x, mask = self.as_sequences(self._to_delta(x), mask.to(x.device), self.score.whole_sequence)
        return self.score.peaks(x, mask, self)

    @torch.no_grad()
    def take_over(self, other: HookedLinear) -> None:
        """The edits and thresholds of another layer of this shape; buffers stay where they are as long as they fit."""
        self.delta.copy_(other.delta)
        self.alpha.copy_(other.alpha)
        if self.shards is not None:
            self.shards.take_over(other.shards)
        self.score.take_over(other.score)
        self.score.refresh(self)

    def tensors(self) -> dict[str, torch.Tensor]:
        """``delta``, ``alpha``, the shards and what the score keeps."""
        shards = self.shards.tensors() if self.shards else {}
        return {"delta": self.delta, "alpha": self.alpha, **shards, **self.score.tensors()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Instead of ``delta`` there may be its factors ``left`` and ``right``, or nothing while it is zero."""
        if "left" in tensors:
            self.delta.copy_(tensors["left"] @ tensors["right"])
        elif "delta" in tensors:
            self.delta.copy_(tensors["delta"])
        self.alpha.copy_(tensors["alpha"])
        if "shard_left" in tensors and self.shards is not None:
            self.shards.restore(tensors)
        self.score.restore(tensors)
        for what in ("anchor_shards", "of_name", "of_end") if self.shards is not None else ():
            if what in tensors and not tensors[what].lt(len(self.shards)).all():
                raise ValueError(f"{what} has numbers that are not among the {len(self.shards)} shards")
        self.score.refresh(self)

    def weight_change(self) -> torch.Tensor:
        if self.shards:
            raise ComebaError(
                "these edits are kept apart, subject by subject, and were saved for inference only; what they come to in one weight "
                "needs their keys: save them without inference_only"
            )
        return self.delta

    def _to_delta(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.delta.dtype
        return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _plain_base(self) -> bool:
        """Whether the base layer is a product and nothing else: no hooks, no quantisation, no adapters."""
        base = self.base_layer
        product = type(base) is nn.Linear or type(base).__qualname__ == "Conv1D"
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return product and not any(hooks) and "_hf_hook" not in base.__dict__

    def _decodes(self, x: torch.Tensor) -> bool:
        """Whether one fused pass over both weights takes this input; the base layer is known to be plain."""
        if not decode_hook_pays(x, self.delta, self.gate == "sketch") or type(self.base_layer) is not nn.Linear:
            return False
        weight = self.weight
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return weight.dtype == x.dtype and not grad and not torch.is_autocast_enabled(x.device.type)

    def meets(self, other: HookedLinear) -> int:
        same = self.scope == other.scope and "off" not in (self._mode, other._mode)
        return self.score.meets(other.score, self.alpha, other.alpha) if same else 0

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, mode={self._mode!r}, "
            f"scope={self.scope!r}, gate={self.gate!r}"
        )


def install(
    model: nn.Module, names: list[str], decoder: str, scope: str, alpha: float | None, gate: str = "exact"
) -> dict[str, HookedLinear]:
    """Put a :class:`HookedLinear` around each named layer (:func:`attach`).

    Args:
        names: of the layers, as in ``model.named_modules()``.
        decoder: name of the module that receives the attention mask.

    Raises:
        ArchitectureError: a name matches nothing or a layer is hooked already; then the model is as before.
    """
    known = dict(model.named_modules())
    for name in (*names, decoder):
        if name not in known:
            raise ArchitectureError(f"the model has no module {name!r}; see model.named_modules()")
    return attach(model, {name: HookedLinear(known[name], scope, alpha, gate=gate) for name in names}, decoder)


def device_of(base: nn.Module) -> torch.device:
    """Where a layer computes, and so where what stands beside it belongs: where accelerate brings its inputs (its weights are elsewhere, or
    on disk, between two passes), else with its first tensor, under whatever name a quantiser keeps that; the CPU where neither says."""
    for module in base.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((own.device for own in (*base.parameters(), *base.buffers()) if not own.is_meta), torch.device("cpu"))


def turned(base: nn.Module) -> bool:
    """Whether a layer stores its weight as ``(d_in, d_out)``, as GPT-2's ``Conv1D`` does."""
    return hasattr(base, "nf")


def shape_of(base: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)``.

    Raises:
        ArchitectureError: not a linear layer.
    """
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return base.in_features, base.out_features
    if turned(base):
        return base.weight.shape[0], base.nf
    raise ArchitectureError(f"{type(base).__name__} is not a linear layer: it has no in_features and out_features")
