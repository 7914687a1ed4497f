"""Edits that hold in an instruct model's chat template too."""

import dataclasses

import pytest
import torch
from test_cli import run
from test_editor import make_editor, small_model, some_requests
from torch.nn import functional as F

from comeba_ext.cli.inputs import check_same
from comeba_ext.errors import ComebaError, ConfigError, RequestError
from comeba_ext.text.chat import chat_wording
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import target_rows

TURN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}[a]\n{% endif %}"


@pytest.fixture
def instruct(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def request_with_question():
    request = some_requests(1)[0]
    return dataclasses.replace(request, wordings=(f"Where does {request.subject} live?",))


def by_hand(tokenizer, text, target):
    """Ids of the chat up to the answer, by the tokenizer's own template, and of the answer behind it."""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    return turn, tokenizer(target, add_special_tokens=False)["input_ids"]


def test_rows_are_the_templates_own_tokens(instruct):
    request = request_with_question()
    plain, question, *chats = target_rows(instruct, [request], [""], wordings=True, whole=True, chat=True)
    assert len(chats) == 2 and [row.prefix for row in (plain, question, *chats)] == [0, 1, 2, 3]
    for row, text in zip(chats, (request.text, request.wordings[0]), strict=True):
        turn, answer = by_hand(instruct, text, request.target_new)
        assert row.ids == turn + answer and row.target == answer  # at the start of a line: no space before it
        assert row.ids.count(instruct.bos_token_id) == 1
        up_to = instruct.decode(row.ids[: row.subject_last + 1])
        assert up_to.endswith(request.subject) and text.startswith(up_to.split("[user]\n")[1])
    assert target_rows(instruct, [request], [""], wordings=True, whole=True) == [plain, question]


def test_a_subject_that_the_template_says_too(tokenizer, monkeypatch):
    """ "a" heads the answer's turn; what is edited is the word in what the user says, and not a letter of another one."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    request = EditRequest("Is that a cat", "a", "dog")
    assert request.prompt == "Is that {} cat"
    *_, chat = target_rows(tokenizer, [request], [""], wordings=True, whole=True, chat=True)
    assert tokenizer.decode(chat.ids[: chat.subject_last + 1]).endswith("Is that a")


def test_an_edit_holds_in_the_chat_as_well(tiny_model, instruct):
    request = request_with_question()
    turn, answer = by_hand(instruct, request.text, request.target_new)
    ids = torch.tensor([turn + answer])

    def loss(**settings):
        editor = make_editor(small_model(tiny_model), instruct, prefixes=0, steps=20, scope="reference", **settings)
        editor.edit([request])
        for layer in editor.layers.values():
            layer.mode = "temporary"  # random keys are no test of scope
        with torch.no_grad():
            logits = editor.model(ids).logits[0, len(turn) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(answer)).item()

    assert loss(chat=True) < loss(chat=False) - 0.1


def test_what_cannot_be_done_is_said_before_anything_is_changed(tiny_model, tokenizer, instruct, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="chat must be true or false"):
        make_editor(small_model(tiny_model), tokenizer, chat=1)
    failed = run(
        "edit", "testbed", "--method", "GRACE", "--chat", "--out", tmp_path, "--prompt", "{} is", "--subject", "A", "--target", "B"
    )
    assert failed.exit_code == 1 and "--chat is for methods that look for target values; GRACE does not" in failed.output
    monkeypatch.setattr(tokenizer, "chat_template", None)
    editor = make_editor(small_model(tiny_model), tokenizer, chat=True)
    with pytest.raises(RequestError, match="no chat template"):
        editor.edit(some_requests(1))
    assert editor.step == 0

    class Slow:
        is_fast, chat_template = False, TEMPLATE

    with pytest.raises(RequestError, match="fast tokenizer"):
        chat_wording(Slow(), "x")


def test_edits_are_gone_on_with_in_the_chat_they_were_begun_in(tiny_model, instruct, tmp_path):
    (tmp_path / "not.yaml").write_text("chat: false\n")
    for begun in (True, False):
        editor = make_editor(small_model(tiny_model), instruct, chat=begun)
        resume = lambda chat=False, config=None: check_same(editor, tmp_path, None, config, None, None, chat, None, None)  # noqa: B023, E731
        resume()  # not given: as it was
        given = {"config": tmp_path / "not.yaml"} if begun else {"chat": True}
        with pytest.raises(ComebaError, match=f"made with chat {begun}, not {not begun}.*choose a new --out"):
            resume(**given)
        resume(**({"chat": True} if begun else {"config": tmp_path / "not.yaml"}))
