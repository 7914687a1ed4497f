"""The score ``nearest``: how like a token's input is to one that was edited (:mod:`comeba_ext.ops.nearest_hook`)."""

from __future__ import annotations

import math

import torch

from comeba_ext.errors import ComebaError
from comeba_ext.ops import nearest_hook as ops
from comeba_ext.scores.base import Score


class NearestScore(Score):
    """The largest cosine with an edited key in the metric of ``C0⁻¹``; every key may ask for more than α.

    Needs :meth:`fit` and the keys, which :mod:`comeba_ext.editing.anchors` chooses.

    Attributes:
        projection: ``(rows, d_in)`` buffer, what inputs and keys are compared under.
        anchors: ``(keys, rows)`` buffer, the edited keys' directions, filled up with rows of zeros.
        thresholds: ``(keys,)`` float32 buffer, each anchor's own, where it lies above α.
        shards: ``(keys,)`` int64 buffer, whose edit a token near that anchor gets (:class:`~comeba_ext.layers.shards.Shards`); −1:
            the layer's ``delta``.
    """

    name = "nearest"
    start = 1.0
    margin = 0.6
    leverage_ratio = 4.0
    ratio_of_one_layer = 32.0
    compares_keys = True
    precise = ("thresholds",)

    def __init__(self, d_in: int, *, gate: str = "exact", dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__(d_in, gate=gate, dtype=dtype, device=device)
        self.register_buffer("projection", torch.zeros(0, d_in, dtype=dtype, device=device))
        self.register_buffer("anchors", torch.zeros(0, 0, dtype=dtype, device=device))
        self.register_buffer("thresholds", torch.zeros(0, dtype=torch.float32, device=device))
        self.register_buffer("shards", torch.zeros(0, dtype=torch.int64, device=device))
        self.known = 0  # rows of anchors that are one, and
        self.needs_delta = True  # whether one of them, or none at all, is outside all shards: known without asking the device

    def scores(self, x, layer, mask=None, past=None):
        return ops.nearest_scores(x, self.projection, self.anchors, self.excess(layer.alpha)), None

    def peaks(self, x, mask, layer):
        return ops.peak_scores(x, mask, self.projection, self.anchors, self.excess(layer.alpha))

    def hook(self, output, x, layer, mask, past, inplace):
        how = (self.projection, self.anchors, self.excess(layer.alpha), mask, layer.alpha)
        parts = layer.shards
        shards = (self.shards, parts.rows, parts.left, parts.right) if len(parts.rows) else None
        return ops.nearest_hook(output, x, layer.delta if self.needs_delta else None, *how, shards, inplace=inplace), None

    def excess(self, alpha: torch.Tensor) -> torch.Tensor:
        """What every anchor's threshold lies above α, ``(keys,)``."""
        return (self.thresholds - alpha).clamp(min=0)

    def fit(self, covariance):
        """The metric to compare in; forgets all keys."""
        self.set_projection(ops.projection_of(covariance))

    def set_projection(self, projection: torch.Tensor) -> None:
        """What inputs and keys are compared under, from :func:`ops.nearest_hook.projection_of`; forgets all keys."""
        self.projection = projection.to(self.projection, copy=True)
        self.set_keys(projection.new_zeros(0, self.d_in))

    def set_keys(self, keys: torch.Tensor) -> None:
        """The edited keys, ``(n, d_in)``, that the nearest score compares with, in place of those known."""
        self.set_anchors(self.projection.new_zeros(0, len(self.projection)))
        self.add_keys(keys)

    def add_keys(self, keys: torch.Tensor) -> None:
        """More keys, ``(n, d_in)``, whose threshold is ``alpha``; zero keys, which have no direction, are left out.

        Raises:
            ComebaError: there is no covariance to compare in.
        """
        if len(keys) and not len(self.projection):
            raise ComebaError("no metric to compare keys in yet; call fit(C0) first")
        unit = self.directions(keys)
        self.add_anchors(unit[unit.any(-1)])

    @torch.no_grad()
    def directions(self, x: torch.Tensor) -> torch.Tensor:
        """Unit vectors that the nearest score compares, ``(..., rows)`` in float32 or better, for inputs ``(..., d_in)``."""
        wide = torch.promote_types(self.projection.dtype, torch.float32)  # in half precision a key's norm may overflow
        return ops.directions(x.to(self.projection.device, wide), self.projection.to(wide))

    def set_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor | None = None) -> None:
        """Anchors, as :meth:`add_anchors` takes them, in place of those known."""
        with torch.inference_mode(False):
            self.anchors = self.projection.new_zeros(0, len(self.projection))
            self.thresholds, self.shards = self.thresholds.new_zeros(0), self.shards.new_zeros(0)
            self.known = 0
        self.add_anchors(unit, thresholds)

    def add_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor | None = None) -> torch.Tensor:
        """More directions to compare with.

        One that a known one stands for (:func:`ops.nearest_hook.stands_for`) adds nothing but its threshold, where that is
        lower. ``anchors`` grows by 64 or more, a thirtieth or so, at a time, so that its shape seldom changes; a CUDA graph
        captured by hand must be captured again.

        Args:
            unit: ``(n, rows)``, of :meth:`directions`.
            thresholds: ``(n,)``, each one's own; it counts where it lies above ``alpha``. Default: none above.

        Returns:
            ``(n,)`` int64 on the CPU: the anchor that stands for each direction. New ones are in no shard (:meth:`assign`).
        """
        with torch.inference_mode(False), torch.no_grad():
            if thresholds is None:
                thresholds = torch.full((len(unit),), -math.inf)
            unit, thresholds = unit.to(self.anchors), thresholds.to(self.thresholds)
            parts = zip(unit.split(1024), thresholds.split(1024), strict=True)
            places = torch.cat([self._add_anchors(part, own) for part, own in parts])
            self._look()
        return places

    @torch.no_grad()
    def keep_anchors(self, stays: torch.Tensor) -> None:
        """Forget those of the known anchors that do not stay, ``(known,)`` bool; the others keep their order."""
        known = self.known_keys()
        with torch.inference_mode(False):
            for name in ("anchors", "thresholds", "shards"):
                old = getattr(self, name)
                new = torch.full_like(old, -1) if name == "shards" else torch.zeros_like(old)
                kept = old[:known][stays.to(old.device)]
                new[: len(kept)] = kept
                setattr(self, name, new)
        self.known = len(kept)
        self._look()

    def assign(self, shards: torch.Tensor) -> None:
        """Say which shard every known anchor is in, ``(known,)`` int64."""
        with torch.inference_mode(False):
            self.shards = torch.full_like(self.shards, -1)
            self.shards[: len(shards)] = shards.to(self.shards)
        self._look()

    def _count(self) -> None:
        """Of anchors that came from elsewhere."""
        self.known = int(self.anchors.any(-1).sum())
        self._look()

    def _look(self) -> None:
        self.needs_delta = not self.known or bool((self.shards[: self.known] < 0).any())

    def _add_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """More directions, ``(n, rows)``, in the dtype of ``anchors``; what stands for each."""
        known = self.known_keys()
        stands = ops.stands_for(unit, self.anchors[:known])
        new = stands == torch.arange(known, known + len(unit))
        place = known + new.cumsum(0) - 1  # of the new ones, among the anchors
        stands = torch.where(stands < known, stands, place[(stands - known).clamp(min=0)])
        count = known + int(new.sum())
        if count > len(self.anchors):
            step = max(64, 1 << max(count.bit_length() - 5, 0))
            size = -(-count // step) * step
            grown, own = unit.new_zeros(size, len(self.projection)), thresholds.new_zeros(size)
            grown[:known], own[:known] = self.anchors[:known], self.thresholds[:known]
            shards = self.shards.new_full((size,), -1)
            shards[:known] = self.shards[:known]
            self.anchors, self.thresholds, self.shards = grown, own, shards
        self.anchors[known:count] = unit[new.to(unit.device)]
        self.thresholds[known:count] = math.inf
        self.thresholds.scatter_reduce_(0, stands.to(unit.device), thresholds, "amin")
        self.known = count
        return stands

    def known_keys(self) -> int:
        """Number of directions that the nearest score compares with: those in the first rows of ``anchors``."""
        return self.known

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Buffers that grow with the keys take the shape they are loaded with, if it fits the layer."""
        projection, anchors = (state_dict.get(prefix + name) for name in ("projection", "anchors"))
        given = projection is not None and anchors is not None
        if given and projection.shape[1:] == (self.d_in,) and anchors.shape[1:] == projection.shape[:1]:
            self.projection = self.projection.new_zeros(projection.shape)
            self.anchors = self.anchors.new_zeros(anchors.shape)
            self.thresholds = self.thresholds.new_zeros(anchors.shape[:1])
            self.shards = self.shards.new_full(anchors.shape[:1], -1)
            state_dict.setdefault(f"{prefix}shards", self.shards)  # of a version that had none
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._count()

    def take_over(self, other):
        super().take_over(other)
        self.known, self.needs_delta = other.known, other.needs_delta

    def tensors(self):
        known = self.known_keys()
        own = {"projection": self.projection, "anchors": self.anchors[:known], "thresholds": self.thresholds[:known]}
        return own | {"anchor_shards": self.shards[:known]} if (self.shards[:known] >= 0).any() else own

    def restore(self, tensors):
        projection, anchors, thresholds = (tensors[what] for what in ("projection", "anchors", "thresholds"))
        fits = projection.shape[1:] == (self.d_in,) and anchors.shape[1:] == projection.shape[:1]
        if not fits or thresholds.shape != anchors.shape[:1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (projection, anchors, thresholds))
            raise ValueError(f"projection, anchors and thresholds {shapes} do not fit")
        # Copied, because where a file's tensors begin decides how BLAS sums them: aligned, equal bits follow.
        self.projection, self.anchors = (part.to(self.projection, copy=True) for part in (projection, anchors))
        self.thresholds = thresholds.to(self.thresholds, copy=True)
        self.shards = torch.full(thresholds.shape, -1, dtype=torch.int64, device=self.shards.device)
        if "anchor_shards" in tensors:
            shards = tensors["anchor_shards"]
            if shards.shape != thresholds.shape or shards.is_floating_point():
                raise ValueError(f"anchor_shards is {shards.dtype} {tuple(shards.shape)}, expected {tuple(thresholds.shape)}")
            self.shards.copy_(shards)
        self._count()
