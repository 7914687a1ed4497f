"""What hooks cost a whole model: ``python bench/bench_model_overhead.py [--model gpt2-xl] [--device cuda] [--quick] [--json]``

Prefill and cached decode of a model of the real shape with random weights, the paper's layers hooked, against the same
model without hooks; the two take turns, so that ratios come from one run. Nothing is in scope, as for almost all text.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from common import finish, target
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from comeba_ext import EditConfig
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers import hooked_linear
from comeba_ext.layers.attachment import detach

CONFIGS = {
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
    """Seconds of a prefill and of ``steps`` cached decode steps."""

    def __init__(self, model, tokens: int, steps: int, device: str):
        self.model, self.steps, self.device = model, steps, device
        self.ids = torch.randint(0, 1000, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(0))

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        start = self._now()
        out = self.model(self.ids, use_cache=True, logits_to_keep=1)
        prefilled = self._now()
        token = self.ids[:, :1]
        for _ in range(self.steps):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, (self._now() - prefilled) / self.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, action="append", help="repeatable; default all on a GPU, gpt2-xl else")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=0, help="of the prefill; default 2048 on a GPU, 256 else")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    dtype = args.dtype or ("bf16" if gpu else "fp32")
    tokens = args.tokens or (1024 if gpu else 256) // (2 if args.quick else 1)
    rows, targets = [], []
    for name in args.model or (list(CONFIGS) if gpu else ["gpt2-xl"]):
        model = random_model(name, DTYPES[dtype], args.device)
        config = EditConfig.for_model(model)
        architecture = Architecture.of(model, config.blocks, config.projection)
        names = [architecture.projection_name(index) for index in config.layers]
        run = Runs(model, tokens, 4 if args.quick else 16, args.device)
        run()
        taken: dict[str, list[tuple[float, float]]] = {"unhooked": [], "exact": [], "sketch": []}
        for _ in range(3 if args.quick else 7):
            for gate in taken:
                if gate != "unhooked":
                    layers = hooked_linear.install(model, names, architecture.decoder, config.scope, 1e9, gate)
                    for layer in layers.values():
                        layer.delta.fill_(1e-3)
                        layer.score.refresh(layer)
                taken[gate].append(run())
                if gate != "unhooked":
                    detach(model)
        for n, phase in enumerate(("prefill", "decode")):
            plain = statistics.median(times[n] for times in taken["unhooked"])
            row = {
                "model": name,
                "dtype": dtype,
                "phase": phase,
                "tokens": tokens if n == 0 else 1,
                "hooked_layers": len(names),
                "unhooked_ms": round(plain * 1e3, 3),
            }
            for gate in ("exact", "sketch"):
                ratios = sorted(own[n] / base[n] for own, base in zip(taken[gate], taken["unhooked"], strict=True))
                row[f"{gate}_ratio"] = round(statistics.median(ratios), 4)
                row[f"{gate}_spread"] = [round(ratios[0], 4), round(ratios[-1], 4)]
            rows.append(row)
            limit = (1.01 if n == 0 else 1.02) if gpu else 1.03
            targets.append(target(f"{name} {phase}, gated / unhooked", row["sketch_ratio"], limit, row["sketch_ratio"] <= limit))
            if not args.json:
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        del model, run
        gc.collect()
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
