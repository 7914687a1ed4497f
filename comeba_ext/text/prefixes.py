"""Context prefixes: short texts the model itself would write, put before a prompt so that an edit holds in any context.

MEMIT (arXiv 2210.07229, section 4.3) samples them from five neutral starts; the paper uses the same procedure.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from comeba_ext.text.encoding import pad, pad_id

STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


@torch.no_grad()
def sample_prefixes(model, tokenizer, count: int, length: int, seed: int) -> list[str]:
    """``count`` texts of about ``length`` tokens, sampled top-5, after the empty prefix.

    Deterministic under ``seed`` for a given model, on whatever device it is; the user's random state is not touched. Hooks should be
    off, so that prefixes do not depend on what was edited before.

    Returns:
        ``["", "The … ", …]``: ``count + 1`` texts, to be put right before a prompt.
    """
    if count == 0:
        return [""]
    device = model.get_input_embeddings().weight.device
    rows = [tokenizer(STARTS[i % len(STARTS)])["input_ids"] for i in range(count)]
    rows = [[t for t in row if t != tokenizer.eos_token_id or t == row[0]] for row in rows]
    ids, mask = pad(rows, pad_id(tokenizer), "left", device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([_Drawn(seed)]),
        do_sample=False,  # it is _Drawn that samples
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        min_new_tokens=length,
        max_new_tokens=length,
        pad_token_id=pad_id(tokenizer),
    )
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return ["", *(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". " for text in texts)]


class _Drawn(LogitsProcessor):
    """Leaves of every row's tokens one of the likeliest ``TOP_K``, drawn on the CPU: a device's own generator would draw others."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        likely = scores.float().cpu()
        likely = likely.masked_fill(likely < likely.topk(TOP_K).values[:, -1:], -torch.inf).softmax(-1)
        drawn = torch.multinomial(likely, 1, generator=self.generator).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
