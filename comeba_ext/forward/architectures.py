"""Where the blocks, the MLP output projection, the final norm and the head live in each Hugging Face family.

Everything that touches a model's insides goes through :class:`Architecture`; a family is one row of ``FAMILIES``, and
a decoder-only model that has no row is searched by inspection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.errors import ArchitectureError

# model_type -> (decoder, blocks inside it, MLP output projection inside a block, final norm inside the decoder)
FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "gpt2": ("transformer", "h", "mlp.c_proj", "ln_f"),
    "gptj": ("transformer", "h", "mlp.fc_out", "ln_f"),
    "gpt_neo": ("transformer", "h", "mlp.c_proj", "ln_f"),
    "gpt_neox": ("gpt_neox", "layers", "mlp.dense_4h_to_h", "final_layer_norm"),
    "opt": ("model.decoder", "layers", "fc2", "final_layer_norm"),
    "phi": ("model", "layers", "mlp.fc2", "final_layernorm"),
    **{
        model_type: ("model", "layers", "mlp.down_proj", "norm")
        for model_type in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi3",
            "olmo2",
            "granite",
            "smollm3",
        )
    },
}

# A norm between the MLP's output and the hidden state it is added to, inside a block (Gemma 2/3, OLMo 2, EXAONE 4; GLM 4).
AFTER_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Architecture:
    """Names of a model's parts, as in ``model.named_modules()``.

    Attributes:
        decoder: the module that receives ``input_ids``, ``attention_mask`` and the cache and owns the blocks.
        blocks: the module list of transformer blocks.
        projection: the MLP output projection, relative to a block.
        final_norm: the norm before the head.
    """

    decoder: str
    blocks: str
    projection: str
    final_norm: str

    @classmethod
    def of(cls, model: nn.Module, blocks: str | None = None, projection: str | None = None) -> Architecture:
        """Locate the parts of a decoder-only language model.

        Args:
            model: a Hugging Face causal language model (a PEFT wrapper around one is looked through).
            blocks: full name of the list of blocks, where inspection cannot find it.
            projection: name of the MLP output projection inside a block, likewise.

        Raises:
            ArchitectureError: the model is encoder-only or encoder-decoder, or its parts were not found; the message
                says which names to give.
        """
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", type(model).__name__)
        if getattr(config, "is_encoder_decoder", False):
            raise ArchitectureError(f"{model_type} is an encoder-decoder; editing needs a decoder-only language model")
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ArchitectureError(
                f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM (encoder-only "
                "models cannot be edited)"
            )
        if _is_masked_lm(model) and not getattr(config, "is_decoder", False):
            raise ArchitectureError(f"{type(model).__name__} is encoder-only; editing needs a decoder-only model")
        prefix = _wrapper_prefix(model)
        if blocks is None and projection is None and model_type in FAMILIES:
            decoder, inner, inside, norm = FAMILIES[model_type]
            found = cls(prefix + decoder, f"{prefix}{decoder}.{inner}", inside, f"{prefix}{decoder}.{norm}")
        else:
            found = _inspect(model, blocks, projection)
        found._check(model)
        if projection is not None:
            _refuse_attention(model_type, projection)
        return found

    def _check(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        hint = (
            "; give EditConfig(blocks=..., projection=...) with names from model.named_modules(), e.g. "
            "blocks='model.layers', projection='mlp.down_proj'"
        )
        projection = f"{self.blocks}.0.{self.projection}"
        for name in (self.decoder, self.blocks, projection, self.final_norm):
            if name not in modules:
                raise ArchitectureError(f"{type(model).__name__} has no module {name!r}{hint}")
        shape = _linear_shape(modules[projection])
        if shape is None:
            raise ArchitectureError(f"{projection} is a {type(modules[projection]).__name__}, not a linear layer{hint}")
        if shape[1] != _width(model):
            raise ArchitectureError(f"{projection} writes {shape[1]} values, not the model's {_width(model)}{hint}")

    def num_blocks(self, model: nn.Module) -> int:
        return len(model.get_submodule(self.blocks))

    def block(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(f"{self.blocks}.{index}")

    def projection_name(self, index: int) -> str:
        """Full name of block ``index``'s MLP output projection."""
        return f"{self.blocks}.{index}.{self.projection}"

    def mlp(self, model: nn.Module, index: int) -> tuple[str, int]:
        """Full name of what owns block ``index``'s MLP output projection, and how wide its input is; where the block itself does
        (OPT), of the projection."""
        name, (owner, _, last) = self.projection_name(index), self.projection.rpartition(".")
        return (name.removesuffix(f".{last}"), _width(model)) if owner else (name, _linear_shape(model.get_submodule(name))[0])

    def after_norm(self, model: nn.Module, index: int) -> nn.Module | None:
        """The norm through which block ``index``'s MLP output reaches the hidden state; ``None`` where it is added as it is."""
        block = self.block(model, index)
        return next((getattr(block, name) for name in AFTER_NORMS if isinstance(getattr(block, name, None), nn.Module)), None)

    def head(self, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from the decoder's output ``(..., d_model)`` to logits ``(..., vocab)``.

        Includes what some families do to the logits after the head (Gemma 2's soft cap, Granite's scale).
        """
        head, config = model.get_output_embeddings(), model.config
        cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logits_scaling", None)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            out = head(hidden)
            if scale is not None:
                out = out / scale
            return out if cap is None else torch.tanh(out / cap) * cap

        return logits


def _refuse_attention(model_type: str, projection: str) -> None:
    """Keys and values are the MLP's: what attention writes is read by the same block's MLP, so an edit there is no sum."""
    known = FAMILIES[model_type][2] if model_type in FAMILIES else None
    if (known is not None and projection != known) or (known is None and "attn" in projection.lower().replace("attention", "attn")):
        wanted = f"{model_type}'s is {known!r}" if known else "such as 'mlp.down_proj'"
        raise ArchitectureError(f"projection={projection!r} is not the MLP's output projection, which is what is edited; {wanted}")


def _width(model: nn.Module) -> int:
    """d_model; the embeddings may be narrower (OPT-350M)."""
    return getattr(model.config, "hidden_size", None) or model.get_input_embeddings().weight.shape[-1]


def context_length(model: nn.Module) -> int | None:
    """Tokens the model can take, or ``None`` when its config names no limit."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # models with a vision part nest the language model's config
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _is_masked_lm(model: nn.Module) -> bool:
    return "MaskedLM" in type(model).__name__ or type(model).__name__.endswith("ForPreTraining")


def _wrapper_prefix(model: nn.Module) -> str:
    """``"base_model.model."`` for PEFT models, else nothing."""
    inner = getattr(model, "base_model", None)
    return "base_model.model." if type(model).__module__.startswith("peft") and hasattr(inner, "model") else ""


def _inspect(model: nn.Module, blocks: str | None, projection: str | None) -> Architecture:
    """Find the block list and the projection by shape: the longest list of like modules, and in its blocks the
    linear layer with the most inputs among those that write ``d_model`` outputs from another width."""
    modules = dict(model.named_modules())
    if blocks is None:
        lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1}
        if not lists:
            raise ArchitectureError(
                f"{type(model).__name__}: found no list of transformer blocks; give EditConfig(blocks=..., "
                "projection=...) with names from model.named_modules()"
            )
        blocks = max(lists, key=lambda n: (len(lists[n]), -n.count(".")))
    if not isinstance(modules.get(blocks), nn.ModuleList) or not len(modules[blocks]):
        raise ArchitectureError(
            f"{type(model).__name__} has no list of blocks named {blocks!r} (given as blocks); see model.named_modules()"
        )
    if projection is None:
        width = _width(model)
        sizes = {n: _linear_shape(m) for n, m in modules[blocks][0].named_modules()}
        sizes = {n: s for n, s in sizes.items() if s is not None}
        outer = {n for n in sizes if not any(n.startswith(f"{other}.") for other in sizes)}  # not inside LoRA or a hook
        wide = {n: sizes[n][0] for n in outer if sizes[n][1] == width and sizes[n][0] != width}
        if len([n for n, s in wide.items() if s == max(wide.values())]) != 1:
            raise ArchitectureError(
                f"{type(model).__name__}: could not tell the MLP output projection in {blocks}.0 (candidates: "
                f"{sorted(wide) or 'none'}); give EditConfig(projection=...)"
            )
        projection = max(wide, key=wide.get)
    decoder = blocks.rpartition(".")[0]
    norms = [n for n, m in modules[decoder].named_children() if "norm" in type(m).__name__.lower()]
    return Architecture(decoder, blocks, projection, ".".join(filter(None, (decoder, *norms[-1:]))))


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(d_in, d_out)`` of a linear layer, by attributes so that quantised and wrapped layers count too."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's Conv1D
        return module.nx, module.nf
    return None
