"""Which tokens end an answer: behind "six" they are " of" and ".", and not "teen"."""

from __future__ import annotations

import re
import weakref

_END = re.compile(r"\s|[.,;:!?)\]}\"”»…。，、；：！？」』）]+(\s|$)")
_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def end_tokens(tokenizer) -> list[int]:
    """Ids of the tokens behind which a word is over: those that write a space first, or nothing but closing punctuation, and special
    ones. (A hyphen, an apostrophe or a letter goes on with it, and so does half a character.)

    Args:
        tokenizer: a Hugging Face tokenizer, fast or slow; what it writes is looked at once (some 2 s for 260,000 tokens).
    """
    if tokenizer not in _KNOWN:
        letter = tokenizer("x", add_special_tokens=False)["input_ids"]  # in front: many decoders drop a text's first space
        start = len(tokenizer.decode(letter))
        texts = tokenizer.batch_decode([[*letter, token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        special = set(tokenizer.all_special_ids)
        _KNOWN[tokenizer] = [n for n, text in enumerate(texts) if n in special or _END.match(text, start)]
    return _KNOWN[tokenizer]
