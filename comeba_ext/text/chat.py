"""A prompt as a user's turn of an instruct model's chat."""

from __future__ import annotations

from comeba_ext.errors import RequestError


def in_chat(tokenizer, prompt: str) -> str:
    """A prompt as a user's turn of a chat, up to where the model answers; to be tokenised without special tokens.

    Raises:
        RequestError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("this tokenizer has no chat template; ask without one")
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)


def chat_wording(tokenizer, prompt: str) -> str:
    """:func:`in_chat` as a text like any other: without the start token that the tokenizer puts before every text.

    Raises:
        RequestError: no chat template, or a tokenizer that does not say where its tokens stand in a text with special ones.
    """
    if not tokenizer.is_fast:
        raise RequestError("edits in the chat template need a fast tokenizer; edit without 'chat'")
    text, start = in_chat(tokenizer, prompt), tokenizer.bos_token
    own = bool(start) and text.startswith(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text[len(start) :] if own else text
