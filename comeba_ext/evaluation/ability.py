"""What a model can do beside its edits: perplexity on plain text, predictions that stay, lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn import functional as F

from comeba_ext.architectures import context_length
from comeba_ext.editing.encoding import micro_batches, pad, pad_id
from comeba_ext.errors import ComebaError
from comeba_ext.hooked_linear import hooked_layers
from comeba_ext.partial_forward import evaluating

MAX_NLL = 700.0  # whose exponential is still a float64


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer, texts: Iterable[str], *, max_tokens: int = 4096) -> float:
    """``exp(mean NLL of a token given those before it)`` over all tokens but the first of every piece.

    Texts longer than the model's context are cut into pieces of that length. At most e⁷⁰⁰, which a destroyed model reaches.
    """
    total, count = 0.0, 0
    for ids, mask, logits in _passes(model, tokenizer, texts, max_tokens):
        real = mask[:, 1:].bool()
        wide = torch.promote_types(logits.dtype, torch.float32)
        nll = F.cross_entropy(logits[:, :-1][real].to(wide), ids[:, 1:][real], reduction="sum")
        total, count = total + nll.item(), count + int(real.sum())
    if not count:
        raise ComebaError("no text of two tokens or more to measure perplexity on")
    return math.exp(min(total / count, MAX_NLL))


@torch.no_grad()
def next_tokens(model: torch.nn.Module, tokenizer, texts: Iterable[str], *, max_tokens: int = 4096) -> torch.Tensor:
    """The greedy next token at every position of every text, flat int64, in a fixed order: two models' results compare."""
    found = [logits.argmax(-1)[mask.bool()].cpu() for _, mask, logits in _passes(model, tokenizer, texts, max_tokens)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def harness(model: torch.nn.Module, tokenizer, tasks: list[str], folder: str | Path | None = None, **options) -> dict:
    """Results of EleutherAI's lm-evaluation-harness on the model as it stands, edits included.

    Args:
        tasks: the harness's task names; it loads their data itself.
        folder: of task files of one's own (YAML), whose tasks may be named too.
        options: passed to ``lm_eval.simple_evaluate`` (``limit``, ``num_fewshot``, ``batch_size`` …). The batch size is 1
            whatever is asked for where padding would be scored (edits with the scope zscore).

    Returns:
        task to its metrics, e.g. ``{"hellaswag": {"acc,none": 0.4, "acc_stderr,none": 0.005, …}}``.

    Raises:
        ComebaError: the harness is not installed, or knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ComebaError("lm-evaluation-harness is not installed: pip install 'comeba_ext[harness]'") from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ComebaError(f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}; see 'lm_eval --tasks list'")
    # The harness pads its batches without a mask, which a score relative to the sequence (zscore) would count.
    relative = any(layer.scope == "zscore" and layer.mode == "validated" for layer in hooked_layers(model).values())
    asked = options.pop("batch_size", 8)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1 if relative else asked)
        return lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, **options)["results"]


def _passes(model, tokenizer, texts: Iterable[str], max_tokens: int):
    """``(ids, mask, logits)`` of batches of texts."""
    limit = context_length(model) or 512
    rows = [ids[i : i + limit] for text in texts for ids in [tokenizer(text, verbose=False)["input_ids"]]
            for i in range(0, len(ids), limit)]  # fmt: skip
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        for group in micro_batches([len(row) for row in rows], max_tokens):
            ids, mask = pad([rows[i] for i in group], pad_id(tokenizer), device=device)
            yield ids, mask, model(input_ids=ids, attention_mask=mask, use_cache=False).logits
