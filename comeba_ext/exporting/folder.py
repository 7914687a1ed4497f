"""A model folder that brings its edits and the code that decides about them, for machines without this package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import transformers
from torch import nn

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.exporting import modeling
from comeba_ext.exporting.base import Exported, edited, edited_layers, size_of, write_tokenizer
from comeba_ext.exporting.new_folder import must_be_new, new_folder
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.storage import write_text

FILE = "modeling_comeba.py"


def export_folder(model: nn.Module, tokenizer, edits: str | Path, out: str | Path) -> Exported:
    """Write the base model's weights, the edits beside them, and :mod:`comeba_ext.exporting.modeling`, so that
    ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)`` is the edited model: the same tokens meet the same edits, in
    cached decoding too. Needs no more than Transformers to load.

    Args:
        model: the base model, of a class of Transformers' own; it is as it came afterwards.
        tokenizer: its tokenizer, written too.
        edits: folder of :meth:`Editor.save_pretrained`.
        out: a new folder.

    Raises:
        ComebaError: a score whose decision takes more than the token and its text, or a method whose edits every token meets, or none
            of hooked layers.
        ArchitectureError, StorageError: the model or a folder cannot be used; nothing was written.
    """
    must_be_new(out)
    with edited(model, edits) as (manifest, _):
        source, layers, tensors = _source_for(model), {}, {}
        for number, (name, own) in enumerate(edited_layers(model).items()):
            carried = _gate_of(own, manifest.get("method", "COMEBA-HK"))
            layers[name] = {"score": own.scope, "tensors": {what: [_dtype(own, what, t), *t.shape] for what, t in carried.items()}}
            # The threshold in scalar float64 and what is kept with it are float32 there, far below the rounding of a score.
            tensors |= {f"edits.{number}.{what}": t.float() if _dtype(own, what, t) == "float32" else t for what, t in carried.items()}
    # Of the model as it came: what is found by inspection is not looked for among hooked layers.
    decoder = Architecture.of(model, *(manifest["config"].get(part) for part in ("blocks", "projection"))).decoder
    inside = {name.removeprefix(f"{decoder}."): own for name, own in layers.items()}
    state = {**model.state_dict(), **{name: t.detach().clone() for name, t in tensors.items()}}
    with new_folder(out) as staging:
        # Under the names they have in memory: for code that a folder brings Transformers translates none.
        type(model).save_pretrained(model, staging, state_dict=state, save_original_format=False)
        config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        config |= {
            "architectures": [modeling.EditedForCausalLM.__name__],
            "auto_map": {
                "AutoConfig": f"{Path(FILE).stem}.{modeling.EditedConfig.__name__}",
                "AutoModelForCausalLM": f"{Path(FILE).stem}.{modeling.EditedForCausalLM.__name__}",
            },
            "model_type": f"comeba_{model.config.model_type}",
            "comeba": {"base": type(model).__name__, "decoder": decoder, "layers": inside},
        }
        write_text(staging / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(staging / FILE, source)
        notes = write_tokenizer(tokenizer, staging)
        if manifest["config"].get("question_floor") is not None:
            notes += ("question_floor is not in the folder: an edit is felt wherever its subject is named",)
        size = size_of(staging)
    return Exported(Path(out), manifest["edits"], list(layers), size, notes=notes)


def _gate_of(own: nn.Module, method: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer's gate."""
    if not isinstance(own, HookedLinear) or own.mode != "validated":
        raise ComebaError(
            f"{method} has no gate of the kind that the folder brings, hooked layers' (COMEBA-HK); edits that are in the weights can be "
            "exported there: merged, lora"
        )
    return own.score.carried(own)


def _dtype(own: HookedLinear, what: str, tensor: torch.Tensor) -> str:
    """``"weight"``: as the model is loaded."""
    if not tensor.is_floating_point():
        return "int64"
    return "float32" if what in ("alpha", *own.score.precise) else "weight"


def _source_for(model: nn.Module) -> str:
    """The modelling file, for the classes of this model."""
    kinds = {"LlamaForCausalLM": type(model), "LlamaConfig": type(model.config)}
    for kind in kinds.values():
        if getattr(transformers, kind.__name__, None) is not kind:
            raise ArchitectureError(f"{kind.__name__} is not of Transformers, so the folder could not load it; export merged or lora")
    source = Path(modeling.__file__).read_text(encoding="utf-8")
    for stand_in, kind in kinds.items():
        source = re.sub(rf"\b{stand_in}\b", kind.__name__, source)
    return source
