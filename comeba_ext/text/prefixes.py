"""Context prefixes: short texts the model itself would write, put before a prompt so that an edit holds in any context.

MEMIT (arXiv 2210.07229, section 4.3) samples them from five neutral starts; the paper uses the same procedure.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper

from comeba_ext.text.encoding import input_device, pad, pad_id

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
    device = input_device(model)
    rows = [tokenizer(STARTS[i % len(STARTS)])["input_ids"] for i in range(count)]
    rows = [[t for t in row if t != tokenizer.eos_token_id or t == row[0]] for row in rows]
    ids, mask = pad(rows, pad_id(tokenizer), "left", device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([TopKLogitsWarper(TOP_K), Drawn(seed)]),
        do_sample=False,  # it is Drawn that samples
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


class Drawn(LogitsProcessor):
    """Leaves of every row's tokens one, drawn by a generator of its own: what samples where ``do_sample`` would draw from the state that
    all threads share.

    Args:
        seed: of the generator; ``None``: another one every time.
        device: of the generator. On the CPU, the default, the same tokens are drawn whatever device the model is on; on the model's
            device, those that ``generate(do_sample=True)`` draws behind ``torch.manual_seed(seed)``.
    """

    def __init__(self, seed: int | None, device="cpu"):
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        likely = scores.float().to(self.generator.device).softmax(-1)
        drawn = torch.multinomial(likely, 1, generator=self.generator).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
