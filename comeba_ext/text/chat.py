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


def last_turn(tokenizer, text: str) -> tuple[int, int]:
    """Where in a chat's text, as the template writes it, stands what the user said last: the first character and the one behind it;
    all of a text that is no such chat. What begins every text of the tokenizer may be left out."""
    said, answered = "What was said.", "What was answered."
    if not getattr(tokenizer, "chat_template", None):
        return 0, len(text)
    first, written, ends = in_chat(tokenizer, said).partition(said)
    if not written:  # a template that changes what is said
        return 0, len(text)
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}, {"role": "user", "content": said}]
    turns = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    later = turns.partition(answered)[2].partition(said)[0]
    end = text.rfind(ends) if ends else len(text)
    if end >= 0 and later and (start := text.rfind(later, 0, end)) >= 0:
        return start + len(later), end
    for opening in (first, first.removeprefix(tokenizer.bos_token or "")):
        if end >= len(opening) > 0 and text.startswith(opening):
            return len(opening), end
    return 0, len(text)
