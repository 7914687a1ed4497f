"""What hooks cost a whole model: ``python bench/bench_model_overhead.py [MODEL …] [--subjects N] [--quick] [--json]``

Prefill and cached decode of Wikipedia's tokens: without hooks, with ``nearest`` in five layers (or the model's own settings) that
know subjects of CounterFact by their names, and with the paper's z-score there, exact and by its sketch. They take turns, so that
ratios come from one run. A MODEL is a folder, or gpt2, gpt2-xl, gpt-j or llama-3-8b: the real shape with random weights, GPT-2's tokens.
Keys and edits are random, so nothing is in scope, as for almost all text; every token whose id ends a name is looked at.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

import torch
from bench_subjects import article_tokens, gpt2_tokenizer, know, name_forms
from common import finish, target
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from comeba_ext import EditConfig
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers import hooked_linear
from comeba_ext.layers.attachment import detach
from comeba_ext.loading import load_model

CONFIGS = {
    "gpt2": lambda: GPT2Config(),
    "gpt2-xl": lambda: GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "gpt-j": lambda: GPTJConfig(),
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def random_model(name: str, dtype: torch.dtype, device: str):
    """Built without weights and filled: initialising billions of normals one by one would take longer than the test."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model = model.to_empty(device=device).eval()
    noise = torch.randn(1 << 22, device=device).mul_(0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                piece = flat[start : start + noise.numel()]
                piece.copy_(noise[: piece.numel()])
        for module in model.modules():  # buffers have no values yet either: rotary frequencies, masks
            if hasattr(module, "inv_freq"):
                module.__init__(module.config, device=device)
            if hasattr(module, "embed_positions") and isinstance(module.embed_positions, torch.Tensor):
                module.embed_positions = torch.zeros_like(module.embed_positions)
            if isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                module.weight.fill_(1.0)
    model.tie_weights()
    return model


class Runs:
    """Seconds of a prefill of ``tokens`` of a text, and of a step of decoding the ``steps`` after them."""

    def __init__(self, model, text: list[int], tokens: int, steps: int, device: str):
        self.model, self.steps, self.device = model, steps, device
        self.ids = torch.tensor([text[: tokens + steps]], device=device)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        start = self._now()
        tokens = self.ids.shape[1] - self.steps
        out = self.model(self.ids[:, :tokens], use_cache=True, logits_to_keep=1)
        prefilled = self._now()
        for token in self.ids[0, tokens:]:
            out = self.model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, (self._now() - prefilled) / self.steps


def loaded(name: str, dtype: torch.dtype, device: str):
    """``(model, tokenizer)`` of a folder, or of a shape."""
    if name in CONFIGS:
        return random_model(name, dtype, device), gpt2_tokenizer()
    model, tokenizer = load_model(name, dtype)
    return model.to(device), tokenizer


def layers_of(model, count: int) -> tuple[int, ...]:
    """The settings' own, and where they are fewer, the blocks before them."""
    own = EditConfig.for_model(model).layers
    return tuple(range(max(0, own[-1] + 1 - max(count, len(own))), own[-1] + 1))


HOOKS = {"nearest": ("nearest", "exact"), "zscore": ("zscore", "exact"), "zscore, sketch": ("zscore", "sketch")}


def hooked(model, names: list[str], decoder: str, how: tuple[str, str], forms: list) -> None:
    for layer in hooked_linear.install(model, names, decoder, how[0], 0.4 if how[0] == "nearest" else 1e9, how[1]).values():
        if how[0] == "nearest":
            know(layer, forms)
        else:
            layer.delta.fill_(1e-3)
            layer.score.refresh(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", help="default: all shapes on a GPU, gpt2-xl else")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=0, help="of the prefill; default 1024 on a GPU, 256 else")
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=5, help="hooked ones at least")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    dtype = args.dtype or ("bf16" if gpu else "fp32")
    tokens = args.tokens or (1024 if gpu else 256) // (2 if args.quick else 1)
    rows, targets = [], []
    for name in args.model or (list(CONFIGS) if gpu else ["gpt2-xl"]):
        model, tokenizer = loaded(name, DTYPES[dtype], args.device)
        architecture = Architecture.of(model)
        names = [architecture.projection_name(index) for index in layers_of(model, args.layers)]
        forms = name_forms(tokenizer, args.subjects)
        run = Runs(model, article_tokens(tokenizer), tokens, 16 if args.quick else 64, args.device)
        run()
        taken: dict[str, list[tuple[float, float]]] = {"unhooked": [], **{how: [] for how in HOOKS}}
        for _ in range(3 if args.quick else 9):
            for how in taken:
                if how != "unhooked":
                    hooked(model, names, architecture.decoder, HOOKS[how], forms)
                taken[how].append(run())
                if how != "unhooked":
                    detach(model)
        for n, phase in enumerate(("prefill", "decode")):
            plain = statistics.median(times[n] for times in taken["unhooked"])
            row = {
                "model": name.rstrip("/").rpartition("/")[2],
                "dtype": dtype,
                "phase": phase,
                "tokens": tokens if n == 0 else 1,
                "hooked_layers": len(names),
                "subjects": args.subjects,
                "unhooked_ms": round(plain * 1e3, 3),
            }
            for how in HOOKS:
                ratios = sorted(own[n] / base[n] for own, base in zip(taken[how], taken["unhooked"], strict=True))
                row[how] = round(statistics.median(ratios), 4)
                row[f"{how}, spread"] = [round(ratios[0], 4), round(ratios[-1], 4)]
            rows.append(row)
            limit = 1.02 if gpu else 1.05
            targets.append(target(f"{row['model']} {phase}, nearest / unhooked", row["nearest"], limit, row["nearest"] <= limit))
            print("  ".join(f"{k} {v}" for k, v in row.items()), file=sys.stderr if args.json else sys.stdout, flush=True)
        del model, run
        gc.collect()
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
