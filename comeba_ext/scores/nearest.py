"""The score ``nearest``: how like a token's input is to one that was edited (:mod:`comeba_ext.ops.nearest_hook`), and where the text is
known, to one of a subject whose name ends there (:mod:`comeba_ext.ops.subject_hook`)."""

from __future__ import annotations

import math

import torch

from comeba_ext.errors import ComebaError
from comeba_ext.ops import nearest_hook as ops
from comeba_ext.ops.subject_hook import Subjects, subject_hook, subject_scores
from comeba_ext.scores.base import Score

CALLED = ("names", "of_name", "ends", "of_end")
PER_ANCHOR = ("anchors", "thresholds", "named_thresholds", "shards")  # buffers that grow together


class NearestScore(Score):
    """The largest cosine with an edited key in the metric of ``C0⁻¹``; every key may ask for more than α, and for less of it where
    the text names its subject.

    Needs :meth:`fit` and the keys, which :mod:`comeba_ext.editing.anchors` chooses.

    Attributes:
        projection: ``(rows, d_in)`` buffer, what inputs and keys are compared under.
        anchors: ``(keys, rows)`` buffer, the edited keys' directions, filled up with rows of zeros.
        thresholds: ``(keys,)`` float32 buffer, each anchor's own, where it lies above α; named_thresholds: the same where the text
            names the anchor's shard.
        shards: ``(keys,)`` int64 buffer, whose edit a token near that anchor gets (:class:`~comeba_ext.layers.shards.Shards`); −1:
            the layer's ``delta``.
            Anchors of one shard lie side by side.
        names, of_name, ends, of_end: int64 buffers, of :class:`~comeba_ext.ops.subject_hook.Subjects`.
    """

    name = "nearest"
    start = 1.0
    leverage_ratio = 4.0
    ratio_of_one_layer = 32.0
    compares_keys = True
    precise = ("thresholds", "named_thresholds")

    def __init__(self, d_in: int, *, gate: str = "exact", dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__(d_in, gate=gate, dtype=dtype, device=device)
        self.register_buffer("projection", torch.zeros(0, d_in, dtype=dtype, device=device))
        self.register_buffer("anchors", torch.zeros(0, 0, dtype=dtype, device=device))
        self.register_buffer("thresholds", torch.zeros(0, dtype=torch.float32, device=device))
        self.register_buffer("named_thresholds", torch.zeros(0, dtype=torch.float32, device=device))
        self.register_buffer("shards", torch.zeros(0, dtype=torch.int64, device=device))
        for name in CALLED:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64, device=device))
        for name in ("first", "count"):  # where the anchors of every shard are; follows from the shards
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64, device=device), persistent=False)
        # Known without asking the device: rows of anchors that are one; whether one of them, or none at all, is outside all shards;
        self.known, self.needs_delta = 0, True
        self.most = (0, 0)  # how many shards share an end at most, and how many anchors a shard has.

    @property
    def named(self) -> bool:
        """Whether every anchor is of a subject that has a name."""
        return not self.needs_delta and len(self.ends) > 0

    def scores(self, x, layer, mask=None, past=None):
        hashes = layer.hashes(x) if self.named else None
        if hashes is None:
            return ops.nearest_scores(x, self.projection, self.anchors, self.excess(layer.alpha)), None
        return subject_scores(x, hashes, *self._compared(), layer.alpha, self._subjects(), self.most)[0], None

    def peaks(self, x, mask, layer):
        return ops.peak_scores(x, mask, self.projection, self.anchors, self.excess(layer.alpha))

    def hook(self, output, x, layer, mask, past, inplace):
        parts = layer.shards
        shards = (parts.rows, parts.left, parts.right)
        hashes = layer.hashes(x) if self.named else None
        if hashes is not None:
            how = (*self._compared(), mask, layer.alpha, self._subjects(), self.most)
            return subject_hook(output, x, hashes, *how, shards, inplace=inplace), None
        how = (self.projection, self.anchors, self.excess(layer.alpha), mask, layer.alpha)
        apart = (self.shards, *shards) if len(parts.rows) else None
        return ops.nearest_hook(output, x, layer.delta if self.needs_delta else None, *how, apart, inplace=inplace), None

    def excess(self, alpha: torch.Tensor) -> torch.Tensor:
        """What every anchor's threshold lies above α, ``(keys,)``."""
        return (self.thresholds - alpha).clamp(min=0)

    def _compared(self) -> tuple:
        return self.projection, self.anchors, (self.thresholds, self.named_thresholds)

    def _subjects(self) -> Subjects:
        return Subjects(*(getattr(self, name) for name in CALLED), self.first, self.count)

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
        """Anchors, as :meth:`add_anchors` takes them, in place of those known, and of all names."""
        with torch.inference_mode(False):
            for name in PER_ANCHOR:
                setattr(self, name, getattr(self, name)[:0].clone())
            self.anchors = self.projection.new_zeros(0, len(self.projection))
            self.known = 0
        self.assign(self.shards)
        self.add_anchors(unit, thresholds)

    def add_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor | None = None) -> torch.Tensor:
        """More directions to compare with, which no name tells of.

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
            places = torch.cat([self._add_anchors(*part) for part in zip(unit.split(1024), thresholds.split(1024), strict=True)])
            self._look()
        return places

    def append_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor, named: torch.Tensor) -> None:
        """More directions ``(n, rows)``, each an anchor of its own, with thresholds ``(n,)`` in general and where its shard is named;
        to be followed by :meth:`assign`."""
        with torch.inference_mode(False), torch.no_grad():
            self._grow(len(unit))
            for name, own in (("anchors", unit), ("thresholds", thresholds), ("named_thresholds", named)):
                buffer = getattr(self, name)
                buffer[self.known : self.known + len(unit)] = own.to(buffer)
            self.known += len(unit)

    @torch.no_grad()
    def keep_anchors(self, stays: torch.Tensor) -> None:
        """Forget those of the known anchors that do not stay, ``(known,)`` bool; the others keep their order; to be followed by
        :meth:`assign`."""
        known = self.known_keys()
        with torch.inference_mode(False):
            for name in PER_ANCHOR:
                old = getattr(self, name)
                new = torch.full_like(old, -1) if name == "shards" else torch.zeros_like(old)
                kept = old[:known][stays.to(old.device)]
                new[: len(kept)] = kept
                setattr(self, name, new)
        self.known = len(kept)

    def assign(self, shards: torch.Tensor, called: tuple[torch.Tensor, ...] = ()) -> None:
        """Say which shard every known anchor is in, ``(known,)`` int64; and what the shards are called, ``CALLED``.

        Raises:
            ValueError: a shard's anchors do not lie side by side.
        """
        with torch.inference_mode(False):
            self.shards = torch.full_like(self.shards, -1)
            self.shards[: len(shards)] = shards.to(self.shards)
            for name in CALLED:
                setattr(self, name, getattr(self, name).new_zeros(0))
            for name, own in zip(CALLED, called, strict=False):
                setattr(self, name, own.to(self.names, copy=True))
        self._look()

    def _count(self) -> None:
        """Of anchors that came from elsewhere."""
        self.known = int(self.anchors.any(-1).sum())
        self._look()

    def _look(self) -> None:
        shards = self.shards[: self.known].cpu()
        self.needs_delta = not self.known or bool((shards < 0).any())
        begins = torch.ones(len(shards), dtype=torch.bool)
        begins[1:] = shards[1:] != shards[:-1]
        start = begins.nonzero()[:, 0]
        of_run, size = shards[start], torch.diff(start, append=torch.tensor([len(shards)]))
        start, size, of_run = start[of_run >= 0], size[of_run >= 0], of_run[of_run >= 0]
        total = int(of_run.max()) + 1 if len(of_run) else 0
        if len(of_run) and of_run.bincount().max() > 1:
            raise ValueError("the anchors of a shard do not lie side by side")
        with torch.inference_mode(False):
            for name, value in (("first", start), ("count", size)):
                setattr(self, name, torch.zeros(total, dtype=torch.int64).index_copy(0, of_run, value).to(self.shards.device))
        shared = self.ends.cpu().unique_consecutive(return_counts=True)[1]
        self.most = (int(shared.max()) if len(shared) else 0, int(size.max()) if len(size) else 0)

    def _add_anchors(self, unit: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
        """More directions, ``(n, rows)``, in the dtype of ``anchors``, and their thresholds ``(n,)``; what stands for each."""
        known = self.known_keys()
        stands = ops.stands_for(unit, self.anchors[:known])
        new = stands == torch.arange(known, known + len(unit))
        place = known + new.cumsum(0) - 1  # of the new ones, among the anchors
        stands = torch.where(stands < known, stands, place[(stands - known).clamp(min=0)])
        count = known + int(new.sum())
        self._grow(count - known)
        self.anchors[known:count] = unit[new.to(unit.device)]
        for own in (self.thresholds, self.named_thresholds):
            own[known:count] = math.inf
            own.scatter_reduce_(0, stands.to(unit.device), thresholds, "amin")
        self.known = count
        return stands

    def _grow(self, more: int) -> None:
        """Make room for more anchors."""
        size = self._size(self.known + more)
        if size > len(self.anchors):
            for name in PER_ANCHOR:
                old = getattr(self, name)
                grown = old.new_full((size, *old.shape[1:]), -1 if name == "shards" else 0)
                grown[: self.known] = old[: self.known]
                setattr(self, name, grown)

    def _size(self, count: int) -> int:
        """Rows of the buffers for so many anchors."""
        step = max(64, 1 << max(count.bit_length() - 5, 0))
        return len(self.anchors) if count <= len(self.anchors) else -(-count // step) * step

    def nbytes_with(self, more: int) -> int:
        """Bytes of the anchors and what is kept of each, once there are so many more."""
        own = [getattr(self, name) for name in PER_ANCHOR]
        return self._size(self.known + more) * sum(part.element_size() * math.prod(part.shape[1:]) for part in own)

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
            for name in ("thresholds", "named_thresholds"):
                setattr(self, name, getattr(self, name).new_zeros(anchors.shape[:1]))
            self.shards = self.shards.new_full(anchors.shape[:1], -1)
            for name in CALLED:
                own = state_dict.setdefault(prefix + name, getattr(self, name)[:0])  # a version before had none
                setattr(self, name, getattr(self, name).new_zeros(own.shape))
            state_dict.setdefault(f"{prefix}shards", self.shards)
            if f"{prefix}thresholds" in state_dict:
                state_dict.setdefault(f"{prefix}named_thresholds", state_dict[f"{prefix}thresholds"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._count()

    @torch.no_grad()
    def meets(self, other, alpha, other_alpha):
        """By names in common, and where both compare in the same metric, by directions as well."""
        shards, named = self.shards[: self.known], torch.isin(self.names, other.names.to(self.names))
        near = torch.isin(shards, self.of_name[named])
        if torch.equal(self.projection, other.projection.to(self.projection)):
            unit, least = self._reach(alpha)
            theirs = (part.to(unit.device).split(1024) for part in other._reach(other_alpha))
            for other_unit, other_least in zip(*theirs, strict=True):
                near |= (unit @ other_unit.mT >= torch.minimum(least[:, None], other_least)).any(1)
        return len(shards[near].unique())

    def _reach(self, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The known directions ``(n, rows)``, and the least cosine ``(n,)`` with each from which a token is in scope, in float32."""
        return self.anchors[: self.known].float(), self.thresholds[: self.known].float().clamp(min=alpha.float())

    def take_over(self, other):
        super().take_over(other)
        self.known, self.needs_delta, self.most = other.known, other.needs_delta, other.most

    def tensors(self):
        known = self.known_keys()
        own = {"projection": self.projection, "anchors": self.anchors[:known], "thresholds": self.thresholds[:known]}
        if (self.shards[:known] >= 0).any():
            own |= {"anchor_shards": self.shards[:known], "named_thresholds": self.named_thresholds[:known]}
            own |= {name: getattr(self, name) for name in CALLED}
        return own

    def carried(self, layer):
        left, right, sizes = (layer.shards.tensors()[f"shard_{what}"] for what in ("left", "right", "sizes"))
        number = torch.arange(int(sizes.max()) if len(sizes) else 1, device=sizes.device)
        rows = torch.where(number < sizes[:, None], (sizes.cumsum(0) - sizes)[:, None] + number, -1)  # (shards, m)
        known = {name: getattr(self, name)[: self.known] for name in PER_ANCHOR}
        known["anchor_shards"] = known.pop("shards")
        called = {name: getattr(self, name) for name in (*CALLED, "first", "count")}
        delta = {"delta": layer.delta} if self.needs_delta else {}
        own = {"alpha": layer.alpha, "projection": self.projection, "left": left, "right": right, "rows": rows}
        return {**own, **known, **called, **delta}

    def restore(self, tensors):
        projection, anchors, thresholds = (tensors[what] for what in ("projection", "anchors", "thresholds"))
        named = tensors.get("named_thresholds", thresholds)
        fits = projection.shape[1:] == (self.d_in,) and anchors.shape[1:] == projection.shape[:1]
        if not fits or not thresholds.shape == named.shape == anchors.shape[:1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (projection, anchors, thresholds, named))
            raise ValueError(f"projection, anchors and thresholds {shapes} do not fit")
        # Copied, because where a file's tensors begin decides how BLAS sums them: aligned, equal bits follow.
        self.projection, self.anchors = (part.to(self.projection, copy=True) for part in (projection, anchors))
        self.thresholds, self.named_thresholds = (part.to(self.thresholds, copy=True) for part in (thresholds, named))
        shards = _integers(tensors, "anchor_shards", torch.full(thresholds.shape, -1), thresholds.shape)
        none = torch.zeros(0, dtype=torch.int64)
        names, ends = (_integers(tensors, name, none) for name in ("names", "ends"))
        of_name, of_end = _integers(tensors, "of_name", none, names.shape), _integers(tensors, "of_end", none, ends.shape)
        if not (names[1:] > names[:-1]).all() or not (ends[1:] >= ends[:-1]).all():
            raise ValueError("names or ends are not in order")
        self.shards = self.shards.new_full(thresholds.shape, -1)
        self.known = int(self.anchors.any(-1).sum())
        self.assign(shards, (names, of_name, ends, of_end))
        if any(len(own) and not 0 <= own.min() <= own.max() < len(self.first) for own in (of_name, of_end)):
            raise ValueError("of_name or of_end has shards that have no anchors")


def _integers(tensors: dict[str, torch.Tensor], name: str, default: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    own = tensors.get(name, default)
    if own.is_floating_point() or own.dim() != 1 or (shape is not None and own.shape != shape):
        raise ValueError(f"{name} is {own.dtype} {tuple(own.shape)}, expected whole numbers {'(any,)' if shape is None else tuple(shape)}")
    return own
