"""A language model with edited facts: the base model's weights, and edits that only the tokens they are about take.

Loads with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` and needs nothing but torch and Transformers. The base
weights have the names and values that they had; what was edited is in ``edits.*``. Every edited layer has a *gate*: which tokens take an
edit, and which one. How the edits were made: comeba_ext (COMEBA-HK, arXiv 2403.05330), which wrote this folder.
"""

import inspect
import math
import threading

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseModel

LONGEST = 16  # tokens of a name that are compared, its last ones
KEPT = 16 * LONGEST  # earlier tokens that a cache remembers: one that is cropped still knows the last ones
UNKNOWN = -1  # token id of padding, and of what came before the text that is known
HASH_BASE = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64
COARSE, ABOVE = 96, 0.17  # directions of a first look at a key, and how far above it the cosine may lie
# Rounding of a score, relative; in float64 that of the thresholds, which are float32.
SLACK = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FIRST = 4.0  # above any difference of two cosines
CHUNK = 1 << 24  # numbers at a time


PRECISE = [f"edits.*.{name}" for name in ("alpha", "thresholds", "named_thresholds", "scale")]  # stay in float32


class EditedConfig(BaseConfig):
    """The base model's configuration, and in ``comeba`` the gates and the sizes of their tensors.

    The ``model_type`` is its own, so that no program takes the folder for the unedited model.
    """

    model_type = f"comeba_{BaseConfig.model_type}"


class EditedForCausalLM(BaseModel):
    """The base model with its edits."""

    config_class = EditedConfig
    supports_gradient_checkpointing = False  # it runs layers when nobody knows the text any more
    _keep_in_fp32_modules_strict = {*(BaseModel._keep_in_fp32_modules_strict or ()), *PRECISE}

    def __init__(self, config):
        super().__init__(config)
        here, layers = Pass(), config.comeba["layers"]
        self.edits = nn.ModuleList(GATES[own["score"]](own["tensors"], here) for own in layers.values())
        Reader(self.get_submodule(config.comeba["decoder"]), dict(zip(layers, self.edits)), here)


# -- which text a pass is about ------------------------------------------------------------------------------------


class Pass(threading.local):
    """The calling thread's pass in progress: its ``shape (batch, seq)``, and hashes of the last tokens up to every one."""

    shape = hashes = kept = embedded = None

    def __reduce__(self):
        return Pass, ()


class Reader:
    """Listens at the decoder. The last token ids are kept on the generation's own cache, which knows when it is reordered or cut.

    Args:
        decoder: gets token ids, attention mask and cache.
        gates: by the names of their layers inside the decoder.
        here: what the gates look at.
    """

    def __init__(self, decoder: nn.Module, gates: dict, here: Pass):
        self.gates, self.here = gates, here
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        decoder.get_input_embeddings().register_forward_pre_hook(self.embed)

    @torch.compiler.disable
    def before(self, module, args, kwargs):
        for name, gate in self.gates.items():
            gate.attach(module.get_submodule(name))
        here, given = self.here, {**dict(zip(self.parameters, args)), **kwargs}
        ids, cache = given.get("input_ids"), cache_of(given.get)
        tokens = given.get("inputs_embeds") if ids is None else ids
        if tokens is None:  # the model's own error says it better
            return
        here.shape = tuple(tokens.shape[:2])
        if ids is None and here.embedded is not None and here.embedded.shape == here.shape:
            ids = here.embedded  # embedded by the model that this one is a part of
        before = getattr(cache, "comeba_ids", None)
        if before is None or len(before) != here.shape[0]:
            before = torch.full((here.shape[0], KEPT), UNKNOWN, device=tokens.device)
        here.hashes = None
        if ids is None:  # embeddings from elsewhere: no name is known
            ids = torch.full(here.shape, UNKNOWN, device=tokens.device)
        else:
            real = real_tokens(given.get("attention_mask"), cache.get_seq_length() if cache is not None else 0, here.shape[1])
            ids = ids if real is None else ids.masked_fill(~real.to(ids.device), UNKNOWN)
            here.hashes = suffix_hashes(ids, before.to(ids.device))
        here.kept = torch.cat([before.to(ids.device), ids], 1)[:, -KEPT:]

    @torch.compiler.disable
    def after(self, module, args, kwargs, output):
        given = {**dict(zip(self.parameters, args)), **kwargs}
        cache = cache_of(given.get) or cache_of(lambda name: getattr(output, name, None))
        if cache is not None and output is not None and self.here.kept is not None:
            if not hasattr(cache, "comeba_ids"):
                cache.__class__ = remembering(type(cache))
            cache.comeba_ids = self.here.kept
        self.here.__dict__.clear()

    @torch.compiler.disable
    def embed(self, module, args):
        self.here.embedded = args[0] if args else None


def cache_of(get):
    found = [get(name) for name in ("past_key_values", "cache")]  # the latter since Transformers 5.24
    return next((cache for cache in found if cache is not None), None)


def real_tokens(mask, past, length):
    """``(batch, length)`` bool of the tokens that are no padding, of those that a pass adds after ``past`` ones; ``None``: all."""
    if isinstance(mask, dict):  # one prepared mask a kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if mask.dim() == 4:  # (batch, 1, query, key): a real token is seen by some query
        mask = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(1)
    start = min(past, mask.shape[1] - length)  # a prepared one of sliding windows ends where a window does
    return mask[:, start : start + length].bool()


REMEMBERING = {}


def remembering(kind):
    """A class of caches whose batch operations take the token ids along."""

    class Remembering(kind):
        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self.comeba_ids = self.comeba_ids.index_select(0, beam_idx.to(self.comeba_ids.device))

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self.comeba_ids = self.comeba_ids.repeat_interleave(repeats, 0)

        def batch_select_indices(self, indices):
            super().batch_select_indices(indices)
            self.comeba_ids = self.comeba_ids[indices.to(self.comeba_ids.device)]

        def crop(self, *args, **kwargs):
            before = int(self.get_seq_length())  # a static cache's is a tensor that changes in place
            super().crop(*args, **kwargs)
            gone = min(before - int(self.get_seq_length()), KEPT)
            self.comeba_ids = F.pad(self.comeba_ids[:, : KEPT - gone], (gone, 0), value=UNKNOWN)

        def reset(self):
            super().reset()
            self.comeba_ids = torch.full_like(self.comeba_ids, UNKNOWN)

        def __reduce__(self):
            return restored, (kind, self.__dict__)

    if kind not in REMEMBERING:
        Remembering.__name__ = Remembering.__qualname__ = kind.__name__
        REMEMBERING[kind] = Remembering
    return REMEMBERING[kind]


def restored(kind, state):
    cache = remembering(kind).__new__(remembering(kind))
    cache.__dict__.update(state)
    return cache


def suffix_hashes(ids, past):
    """``h_n(t) = Σ_{j<n} (id_{t−j} + 1) B^j mod 2⁶⁴`` of the last 1 … LONGEST tokens up to every one, ``(batch, seq, LONGEST)``."""
    whole = torch.cat([past[:, -(LONGEST - 1) :], ids.long()], 1) - UNKNOWN  # 0 where unknown
    powers = torch.tensor([1] + [HASH_BASE] * (LONGEST - 1), device=ids.device).cumprod(0)
    return (whole.unfold(1, LONGEST, 1).flip(-1) * powers).cumsum(-1)


# -- which tokens take which edit ----------------------------------------------------------------------------------


class Gate(nn.Module):
    """Beside an edited layer.

    Args:
        tensors: name to ``[dtype, *shape]`` of its buffers.
        here: what the pass in progress is about.
    """

    def __init__(self, tensors: dict, here: Pass):
        super().__init__()
        self.here, self.tensors, self.layer = here, tensors, None
        for name, (dtype, *shape) in tensors.items():
            dtype = torch.get_default_dtype() if dtype == "weight" else getattr(torch, dtype)
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def attach(self, layer: nn.Module):
        """Stand beside this layer; whoever quantises a model puts others in their places after it is made."""
        while hasattr(layer, "base_layer"):  # an adapter around it
            layer = layer.base_layer
        if self.layer is None or self.layer[0] is not layer:
            self.layer = (layer,)  # a module in a tuple is not a part of this one
            layer.register_forward_hook(self.edit)

    @torch.compiler.disable
    def edit(self, layer, args, output):
        """The layer's output ``(..., d_out)`` for ``args[0]``, ``(..., d_in)``, with the edits of the tokens in scope."""
        rows, edits = self(args[0].reshape(-1, args[0].shape[-1]))
        if not len(rows):
            return output
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_add(0, rows.to(flat.device), edits.to(flat)).reshape(output.shape)

    def forward(self, x):
        """Of tokens ``(n, d_in)``: which are in scope ``(m,)``, and what they take ``(m, d_out)``."""
        raise NotImplementedError

    def limit(self, x):
        """What a score must reach, up to its rounding."""
        alpha = self.alpha.double()
        return (alpha * (1.0 - SLACK.get(x.dtype, 1e-5) * alpha.sign())).to(wide(x))


class ReferenceGate(Gate):
    """In scope: tokens whose response to the edits, ``‖delta·x‖²``, is large beside an average token's."""

    def forward(self, x):
        x = x.to(self.delta.dtype)
        norm = torch.linalg.vector_norm(F.linear(x, self.sketch if "sketch" in self.tensors else self.delta), dim=-1, dtype=wide(x))
        scale = self.scale.to(norm.dtype)
        score = torch.where(scale > 0, norm**2 / torch.where(scale > 0, scale, 1.0), 0.0)
        rows = (score >= self.limit(x)).nonzero()[:, 0]
        return rows, F.linear(x[rows], self.delta)


class NearestGate(Gate):
    """In scope: tokens whose input is like one that was edited, ``cos(P x, P k) ≥`` the key's threshold.

    Where the text is known a token meets only the keys of subjects whose name ends in it, which ask for less where all of the name stands
    there.
    """

    def forward(self, x):
        x = x.to(self.projection.dtype)
        hashes = self.here.hashes
        named = hashes is not None and hashes.shape[:2].numel() == len(x) and len(self.ends) and "delta" not in self.tensors
        rows, shard = self.by_name(x, hashes.reshape(-1, LONGEST).to(x.device)) if named else self.by_key(x)
        edits = self.of_shards(x[rows], shard)
        if "delta" in self.tensors:
            edits = torch.where((shard < 0)[:, None], F.linear(x[rows], self.delta), edits)
        return rows, edits

    def of_shards(self, x, shard):
        """``delta_s x``, ``(m, d_out)``, for tokens ``(m, d_in)`` and their shards; zero where that is −1."""
        if not len(self.rows):
            return x.new_zeros(len(x), self.left.shape[1])
        own, parts = torch.where((shard >= 0)[:, None], self.rows[shard.clamp(min=0)], -1), []  # (m, factors of a shard)
        size = max(1, CHUNK // (own.shape[1] * (self.left.shape[1] + self.right.shape[1])))
        for part, its in zip(x.split(size), own.split(size)):
            there, its = (its >= 0)[..., None], its.clamp(min=0)
            parts.append((self.left[its] * ((self.right[its] * there) @ part[..., None] * there)).sum(1))
        return torch.cat(parts)

    def by_name(self, x, hashes):
        """Tokens in scope and the shard of each, by the subjects that the text names."""
        low = torch.searchsorted(self.ends, hashes[:, 0].contiguous())
        high = torch.searchsorted(self.ends, hashes[:, 0].contiguous(), right=True)
        token, place = spread(low, high - low)  # pairs of a token and a subject that ends in it
        shard = self.of_end[place]
        pair, anchor = spread(self.first[shard], self.count[shard])
        token, shard = token[pair], shard[pair]
        there, row = token.unique(return_inverse=True)
        own = shard == self.mentioned(hashes[there])[row]
        unit, size, dtype = self.directions(x[there]), max(1, CHUNK // self.anchors.shape[1]), wide(x)
        asked = (torch.where(own, self.named_thresholds[anchor], self.thresholds[anchor]) - self.alpha).clamp(min=0).to(dtype)
        coarse, rows = self.coarse(), len(self.projection)
        looks = [((parts := unit[r] * self.anchors[a])[:, :coarse].sum(-1, dtype=dtype), parts.sum(-1, dtype=dtype))
                 for r, a in zip(row.split(size), anchor.split(size))]  # fmt: skip
        first, cosine = (torch.cat(part) for part in zip(*looks)) if looks else (asked, asked)
        kept = own | (first >= (self.limit(x) + asked - ABOVE) * (coarse / rows))
        rank = cosine - asked
        rank = torch.where(own & (rank >= self.limit(x)), rank + FIRST, rank)
        rank = torch.where(kept, rank, -FIRST)
        best = rank.new_full((len(there),), -FIRST).scatter_reduce(0, row, rank, "amax")
        nearest = torch.where(rank == best[row], shard, len(self.first))  # of equal ones the first
        shard = torch.full_like(there, len(self.first)).scatter_reduce(0, row, nearest, "amin")
        score = torch.where(best > FIRST / 2, best - FIRST, best).clamp(min=0)
        inside = score >= self.limit(x)
        return there[inside], shard[inside]

    def by_key(self, x):
        """Tokens in scope and the shard of each (−1: the layer's delta), by all keys."""
        if not len(self.anchors):
            return torch.zeros(0, dtype=torch.int64, device=x.device), torch.zeros(0, dtype=torch.int64, device=x.device)
        excess, coarse, found = (self.thresholds - self.alpha).clamp(min=0).to(x.dtype), self.coarse(), []
        share = len(self.projection) / coarse
        for part in x.split(max(1, CHUNK // len(self.anchors))):
            unit = self.directions(part)
            best = F.linear(unit, self.anchors, -excess).max(-1)
            score = best.values.clamp(min=0).to(wide(x))
            if coarse < len(self.projection):
                bound = F.linear(unit[:, :coarse] * share, self.anchors[:, :coarse], -excess).amax(-1)
                score = score.minimum(bound.clamp(min=0).to(wide(x)) + ABOVE)
            found.append((score >= self.limit(x), self.anchor_shards[best.indices]))
        inside, shard = (torch.cat(own) for own in zip(*found))
        rows = inside.nonzero()[:, 0]
        return rows, shard[rows]

    def mentioned(self, hashes):
        """The shard of the longest name that ends at every token, ``(n,)``; −1: none does."""
        if not len(self.names):
            return hashes.new_full(hashes.shape[:1], -1)
        place = torch.searchsorted(self.names, hashes).clamp(max=len(self.names) - 1)
        lengths = torch.arange(1, LONGEST + 1, device=hashes.device)
        longest = torch.where(self.names[place] == hashes, lengths, 0).amax(-1)
        found = self.of_name[place.gather(-1, (longest - 1).clamp(min=0)[:, None])[:, 0]]
        return torch.where(longest > 0, found, -1)

    def coarse(self):
        """How many directions a first look takes."""
        rows, width = self.projection.shape
        return COARSE if COARSE < rows < width else rows

    def directions(self, x):
        """Unit vectors along ``P x``, ``(n, rows)``; those of the first look and the others are normalised apart."""
        projected, coarse, rows = F.linear(x, self.projection), self.coarse(), len(self.projection)
        parts = (projected.to(wide(x))[:, :coarse], projected.to(wide(x))[:, coarse:])
        return torch.cat([F.normalize(p, dim=-1) * math.sqrt(p.shape[-1] / rows) for p in parts], -1).to(projected.dtype)


GATES = {"reference": ReferenceGate, "nearest": NearestGate}


def spread(start, count):
    """All numbers ``start, …, start + count − 1`` of every row: whose each is, and they."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    number = torch.arange(len(owner), device=count.device)
    return owner, number - (count.cumsum(0) - count)[owner] + start[owner]


def wide(x):
    return torch.promote_types(x.dtype, torch.float32)
