"""Context prefixes: short texts the model itself would write, put before a prompt so that an edit holds in any context.

MEMIT (arXiv 2210.07229, section 4.3) samples them from five neutral starts; the paper uses the same procedure.
"""

from __future__ import annotations

import torch

from comeba_ext.text.encoding import pad, pad_id

STARTS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


@torch.no_grad()
def sample_prefixes(model, tokenizer, count: int, length: int, seed: int) -> list[str]:
    """``count`` texts of about ``length`` tokens, sampled top-5, after the empty prefix.

    Deterministic under ``seed`` for a given model; the user's random state is restored. Hooks should be off, so that
    prefixes do not depend on what was edited before.

    Returns:
        ``["", "The … ", …]``: ``count + 1`` texts, to be put right before a prompt.
    """
    if count == 0:
        return [""]
    device = model.get_input_embeddings().weight.device
    rows = [tokenizer(STARTS[i % len(STARTS)])["input_ids"] for i in range(count)]
    rows = [[t for t in row if t != tokenizer.eos_token_id or t == row[0]] for row in rows]
    ids, mask = pad(rows, pad_id(tokenizer), "left", device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which seeds every device, also those whose state is not put back.
        generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
        generator.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=TOP_K,
            top_p=1.0,
            temperature=1.0,
            num_beams=1,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=pad_id(tokenizer),
        )
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return ["", *(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". " for text in texts)]
