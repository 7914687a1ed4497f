"""A plugin for vLLM: folders of ``comeba export --to folder`` are served with their edits (docs/exporting.md).

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). A folder is then of vLLM's own class for the
base model, with the folder's gates beside the edited layers; no code of the folder's is run. vLLM itself is imported only there.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn

from comeba_ext.errors import ComebaError
from comeba_ext.exporting.modeling import GATES, LONGEST, Pass
from comeba_ext.serving.paged import PagedText

PREFIX = "Edited"  # before the base model's architecture
PARTS = ("slot_mapping", "query_start_loc", "block_table")  # of an attention layer's metadata
ENDS = ("ForCausalLM", "LMHeadModel")  # of architectures that write text


def register() -> None:
    """Make folders with edits known to vLLM and Transformers; again is no harm."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from vllm import ModelRegistry

    for kind in CONFIG_MAPPING_NAMES:
        CONFIG_MAPPING.register(f"comeba_{kind}", BaseConfig(kind), exist_ok=True)
    known = set(ModelRegistry.get_supported_archs())
    for name in known:
        if name.endswith(ENDS) and not known & {f"{PREFIX}{name}", name.removeprefix(PREFIX)} - {name}:
            ModelRegistry.register_model(f"{PREFIX}{name}", f"{__name__}:{PREFIX}{name}")


class BaseConfig:
    """Stands for a class of configurations: makes those of the base model, so that vLLM treats the folder as it treats that.

    Args:
        kind: the base model's ``model_type``.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def from_dict(self, config: dict, **kwargs):
        from transformers import CONFIG_MAPPING

        own = {**config, "model_type": self.kind, "architectures": [PREFIX + config["comeba"]["base"]]}
        own.pop("auto_map", None)
        return CONFIG_MAPPING[self.kind].from_dict(own, **kwargs)


@functools.cache
def __getattr__(name: str):
    """``EditedLlamaForCausalLM``, …: vLLM asks for them by name."""
    from vllm import ModelRegistry

    base = ModelRegistry.models.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (Edited, base.load_model_cls()), {"__module__": __name__})


class Edited:
    """Put before a model class of vLLM's: its edits, of the ``comeba`` part of its configuration and the weights ``edits.*``."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        _check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        own, here = vllm_config.model_config.hf_config.comeba, Pass()
        self.edits = nn.ModuleList(GATES[layer["score"]](layer["tensors"], here) for layer in own["layers"].values())
        self.reading = Reading(here) if any("ends" in gate.tensors and "delta" not in gate.tensors for gate in self.edits) else None
        self.met, self.missing = [], {f"edits.{name}" for name, _ in self.edits.named_buffers()}
        for name, gate in zip(own["layers"], self.edits):
            self._layer(own["decoder"], name).register_forward_hook(functools.partial(self._edit, gate))

    def _layer(self, decoder, name):
        """As the base model calls it; vLLM's class for models that it takes from Transformers calls every decoder ``model``."""
        for place in (decoder, "model"):
            with contextlib.suppress(AttributeError):
                return self.get_submodule(f"{place}.{name}")
        raise ComebaError(f"vLLM's {type(self).__bases__[1].__name__} has no layer {decoder}.{name} to edit")

    def _edit(self, gate, layer, args, output):
        self.met.append(gate)
        if self.reading is not None and args[0].shape[:-1].numel() != self.reading.here.hashes.shape[1]:
            raise ComebaError("an edited layer was given other tokens than the model, so their text is not known")
        if not isinstance(output, tuple):
            return gate.edit(layer, args, output)
        return (gate.edit(layer, args, output[0]), *output[1:])

    def forward(self, input_ids, positions, *args, **kwargs):
        self.met.clear()
        if self.reading is not None:
            self.reading.read(input_ids, positions)
        output = super().forward(input_ids, positions, *args, **kwargs)
        if len(self.met) != len(self.edits):
            raise ComebaError(f"{len(self.edits) - len(self.met)} edited layers were not run as modules, so their edits were passed over")
        return output

    def load_weights(self, weights):
        loaded, buffers = set(), {f"edits.{name}": buffer for name, buffer in self.edits.named_buffers()}

        def others():
            for name, tensor in weights:
                if not name.startswith("edits."):
                    yield name, tensor
                    continue
                if name not in buffers or buffers[name].shape != tensor.shape:
                    raise ComebaError(f"{name} {tuple(tensor.shape)} is none of the tensors that the folder's config.json tells of")
                buffers[name].copy_(tensor)
                loaded.add(name)

        loaded |= super().load_weights(others()) or set()
        self.missing -= loaded
        if self.missing:
            raise ComebaError(f"the folder lacks {', '.join(sorted(self.missing))}")
        return loaded


class Reading:
    """Tells gates which text a pass is about, by vLLM's own account of the pass.

    Args:
        here: what the gates look at.
    """

    def __init__(self, here: Pass):
        self.here, self.text, self.layer = here, PagedText(), None

    def read(self, ids: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Token ids and positions ``(n,)``, of all sequences' new tokens."""
        from vllm.forward_context import get_forward_context

        if ids is None or positions.dim() != 1:
            raise ComebaError("edits are recognised in texts of token ids; vLLM gives this model embeddings, or positions of several kinds")
        context = get_forward_context()
        if context.attn_metadata is None:  # a trial of vLLM's, about no text
            self.here.hashes = torch.zeros(1, len(ids), LONGEST, dtype=torch.int64, device=ids.device)
            return
        own = self._metadata(context)
        slots = positions.new_full(positions.shape, -1)
        slots[: len(own.slot_mapping)] = own.slot_mapping[: len(slots)]
        self.here.hashes = self.text.hashes(ids, positions, slots, own.query_start_loc, own.block_table)[None]

    def _metadata(self, context):
        """Of one attention layer, always the same: one that sees all earlier tokens, where there is one."""
        if self.layer is None:
            layers = [name for name, own in context.attn_metadata.items() if all(hasattr(own, part) for part in PARTS)]
            if not layers:
                kinds = ", ".join(sorted({type(own).__name__ for own in context.attn_metadata.values()}))
                raise ComebaError(f"edits find their text by {', '.join(PARTS)}, which {kinds} lacks; choose another --attention-backend")
            far = [name for name in layers if getattr(context.no_compile_layers.get(name), "sliding_window", None) is None]
            self.layer = (far or layers)[0]
        return context.attn_metadata[self.layer]


def _check(config) -> None:
    """Settings of vLLM's under which edits would be passed over or misplaced.

    Raises:
        ComebaError: which one, and what to do.
    """
    parallel, model = config.parallel_config, config.model_config
    for wrong, why in (
        (not model.enforce_eager, "needs --enforce-eager: its gates gather the few tokens that matter, which no captured graph can"),
        (parallel.world_size > 1, "runs on one device: its gates need whole inputs of a layer; start without tensor and pipeline parallel"),
        (parallel.use_ubatching, "takes a batch whole: start without --enable-dbo and --ubatch-size"),
        (config.lora_config is not None, "takes no adapters: LoRA's layers go round the edited ones; start without --enable-lora"),
        (config.quant_config is not None, "is not quantised: its gates compare a layer's input as it is; start without --quantization"),
        (config.kv_transfer_config is not None, "reads its texts itself: start without key-value transfer or offloading"),
        (model.enable_prompt_embeds, "takes texts, no embeddings: start without --enable-prompt-embeds"),
    ):
        if wrong:
            raise ComebaError(f"a model with edits {why}")
