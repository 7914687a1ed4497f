"""What every score has: how strongly a token looks like an edited one, and what follows for the hooked layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.errors import ComebaError
from comeba_ext.ops.hooked_linear import in_scope, swap

if TYPE_CHECKING:
    from comeba_ext.layers.hooked_linear import HookedLinear


class Score(nn.Module):
    """How strongly a token looks like an edited one: the part of a hooked layer that decides whose edited output goes on.

    A new score overrides :meth:`scores`, and is made known by :func:`comeba_ext.scores.register_score`. Its buffers move, save and
    load with the model. The layer it belongs to (``delta``, ``alpha``, ``base_layer``) is handed to it.

    Class attributes:
        name: as in ``EditConfig.scope``.
        start: α before any edit.
        margin: share of the lowest score of a batch's prompts that α is lowered to.
        leverage_ratio: ``d_in/λ``; where any token may meet the edits, the covariance of all others needs the more weight. (Good
            values of λ on models of 7M to 270M parameters: docs/findings.md.)
        ratio_of_one_layer: the same where a single layer has to realise all of a residual.
        whole_sequence: whether it looks at more than the token: then it is given the mask of real tokens and what the sequence's
            earlier tokens left behind, and prefixes are not shared among rows.
        compares_keys: whether it compares inputs with those that were edited, and so must be told of them.
        decodes: whether :meth:`decode` computes the whole layer for few tokens at once.
        precise: buffers that keep their dtype when the model's changes.
        named: whether it asks what the text names (:mod:`comeba_ext.ops.mentions`); an instance may know names or none.

    Args:
        d_in: inputs of the layer.
        gate: what responses are computed from, ``"exact"`` or ``"sketch"``; of no effect for scores without one.
        dtype, device: of the layer's ``delta``.
    """

    name: ClassVar[str] = ""
    start: ClassVar[float] = 0.0
    margin: ClassVar[float] = 1.0
    leverage_ratio: ClassVar[float] = 1.0
    ratio_of_one_layer: ClassVar[float] = 1.0
    whole_sequence: ClassVar[bool] = False
    compares_keys: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    precise: ClassVar[tuple[str, ...]] = ()
    named: bool = False

    def __init__(self, d_in: int, *, gate: str = "exact", dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__()
        self.d_in, self.gate = d_in, gate

    def scores(
        self, x: torch.Tensor, layer: HookedLinear, mask: torch.Tensor | None = None, past: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every token's score, and what later tokens of the sequence must know (``whole_sequence``; else ``None``).

        Args:
            x: ``(batch, seq, d_in)`` in the dtype of ``layer.delta``.
            mask: ``(batch, seq)`` bool of real tokens; ``None`` when all are.
            past: what the earlier tokens left behind, ``(batch, …)``; ``None`` at the beginning.

        Returns:
            ``(batch, seq)`` in float32 or better; a token is in scope where it reaches ``layer.alpha``.
        """
        raise NotImplementedError

    def peaks(self, x: torch.Tensor, mask: torch.Tensor, layer: HookedLinear) -> torch.Tensor:
        """The highest score of every row's real tokens, ``(batch,)``."""
        return self.scores(x, layer, mask)[0].masked_fill(~mask, -torch.inf).amax(-1)

    def hook(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        layer: HookedLinear,
        mask: torch.Tensor | None,
        past: torch.Tensor | None,
        inplace: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``output + x @ deltaᵀ`` for tokens in scope, ``output`` elsewhere, bit for bit. Fused kernels override this.

        Args:
            output: base output ``(batch, seq, d_out)``.
            inplace: the result may take the place of ``output``.

        Returns:
            The layer's output, and what later tokens must know, as :meth:`scores`.
        """
        value, after = self.scores(x, layer, mask, past)
        return swap(output, F.linear(x, layer.delta), in_scope(value, layer.alpha, mask, x.dtype)), after

    def decode(
        self, x: torch.Tensor, layer: HookedLinear, mask: torch.Tensor | None, past: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The whole layer, base product and all, for few tokens; only with ``decodes``."""
        raise NotImplementedError

    def fit(self, covariance: torch.Tensor) -> None:
        """Learn what inputs are like from ``C0 (d_in, d_in)``, before the first edit.

        Raises:
            torch.linalg.LinAlgError: it is not positive definite.
        """

    def delta_changed(self, layer: HookedLinear, covariance: Callable[[], torch.Tensor]) -> None:
        """``layer.delta`` is another one; ``covariance()`` gives ``C0`` on the layer's device. May lower or raise ``layer.alpha``."""

    def refresh(self, layer: HookedLinear) -> None:
        """Make anew what follows from delta, now: a compiled model would not see that it is old."""

    def meets(self, other: Score, alpha: torch.Tensor, other_alpha: torch.Tensor) -> int:
        """How many subjects of another score of this kind, of the same layer, are in the scope of this one's edits or the other way
        round; 0 where that cannot be told from what is kept."""
        return 0

    def clear(self) -> None:
        """No edit is left."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a saved layer needs of the score to be used again, by names, for :meth:`restore`."""
        return {}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises :class:`ValueError` for shapes that do not fit, ``KeyError`` for what is missing."""

    def carried(self, layer: HookedLinear) -> dict[str, torch.Tensor]:
        """What a model that is exported with its edits needs to decide as this layer does: the buffers of its gate in
        :mod:`comeba_ext.exporting.modeling`, where it has one under this score's name.

        Raises:
            ComebaError: it has none.
        """
        why = "it looks at a sequence's other tokens too" if self.whole_sequence else "the exported model knows nothing of it"
        raise ComebaError(
            f"edits with the score {self.name!r} cannot be exported with their gate: {why}; edit with score 'nearest' or 'reference', "
            "or export without a gate (merged, lora)"
        )

    def take_over(self, other: Score) -> None:
        """What another score of this kind knows; buffers stay where they are as long as they fit."""
        take_over_buffers(self, other)

    def _apply(self, fn, recurse: bool = True):
        """``model.half()`` and the like move the precise buffers but leave them as precise as they are."""
        return keep_precise(self, self.precise, lambda: super(Score, self)._apply(fn, recurse))

    def extra_repr(self) -> str:
        return f"{self.name!r}, gate={self.gate!r}"


def keep_precise(module: nn.Module, names: tuple[str, ...], apply):
    """Run a module's ``_apply`` and give these buffers, if it has them, their dtype back, with the values that a narrower one would
    have lost."""
    before = {name: getattr(module, name) for name in names if name in module._buffers}
    result = apply()
    for name, buffer in before.items():
        after = getattr(module, name)
        if after.dtype != buffer.dtype:
            setattr(module, name, buffer.to(after.device))
    return result


def take_over_buffers(module: nn.Module, other: nn.Module, except_for: str = " ") -> None:
    """The buffers of another module of this kind; they stay where they are as long as they fit."""
    own = dict(module.named_buffers())
    for name, buffer in other.named_buffers():
        if name.startswith(except_for):
            continue
        if own[name].shape == buffer.shape:
            own[name].copy_(buffer)
        else:
            set_buffer(module, name, buffer.clone())


def set_buffer(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, value)
