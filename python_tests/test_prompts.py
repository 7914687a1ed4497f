"""``generate`` of a model whose edits stand in the prompt."""

import copy
import logging
import threading

import pytest
import torch
from test_editor import small_model
from test_methods import make_method
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

from comeba_ext import EditRequest, load_edits, set_edits, unload_edits
from comeba_ext.errors import ComebaError
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import plain_generate
from comeba_ext.text.chat import last_turn

FACTS = [EditRequest("{} lives in", "Ann", "Rome"), EditRequest("{} lives in", "Bob", "Oslo")]
ASKED = {"Ann lives in": "New Fact: Ann lives in Rome\nPrompt: Ann lives in", "Eve plays": "Eve plays"}
NEW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def edited(tiny_model, tokenizer):
    editor = make_method("ICE", small_model(tiny_model), tokenizer, named=True)
    editor.edit(FACTS)
    return editor


def one(tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_hand(tiny_model, tokenizer, text, **options):
    """What a model that was never edited writes behind the text that is to be asked."""
    asked = one(tokenizer, ASKED[text])
    out = small_model(tiny_model).generate(**asked, **{**NEW, **options})
    return out[:, asked["input_ids"].shape[1] :]


def test_it_answers_what_is_asked_instead(tiny_model, tokenizer):
    model = edited(tiny_model, tokenizer).model
    said = {}
    for text in ASKED:
        given = one(tokenizer, text)
        said[text] = torch.cat((given["input_ids"], by_hand(tiny_model, tokenizer, text)), 1)
        assert torch.equal(model.generate(**given, **NEW), said[text])
        assert torch.equal(model.generate(given["input_ids"], **NEW), said[text])
    assert not torch.equal(said["Ann lives in"], small_model(tiny_model).generate(**one(tokenizer, "Ann lives in"), **NEW))
    with disabled(model):
        plain = model.generate(**one(tokenizer, "Ann lives in"), **NEW)
    assert torch.equal(plain, small_model(tiny_model).generate(**one(tokenizer, "Ann lives in"), **NEW))
    # In one batch, padded on the left; with and without a mask that says so.
    tokenizer.padding_side, side = "left", tokenizer.padding_side
    batch = tokenizer(list(ASKED), return_tensors="pt", padding=True)
    tokenizer.padding_side = side
    assert (batch["input_ids"] == 0).any()
    for given in (batch, {"input_ids": batch["input_ids"]}):
        out = model.generate(**given, **NEW)
        assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert torch.equal(out[:, -5:], torch.cat([said[text][:, -5:] for text in ASKED]))


def test_all_that_generate_is_asked_for(tiny_model, tokenizer):
    model, text = edited(tiny_model, tokenizer).model, "Ann lives in"
    given = one(tokenizer, text)
    width = given["input_ids"].shape[1]
    out = model.generate(**given, **NEW, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences[:, width:], by_hand(tiny_model, tokenizer, text, num_beams=3, num_return_sequences=2))
    assert torch.equal(out.sequences[:, :width], given["input_ids"].expand(2, -1)) and len(out.scores) == 5
    length = {**NEW, "max_new_tokens": None, "max_length": width + 3}  # of what was given and what is written
    assert torch.equal(model.generate(**given, **length)[:, width:], by_hand(tiny_model, tokenizer, text, max_new_tokens=3))
    model.generation_config.max_length = width + 2
    assert model.generate(**given, do_sample=False, pad_token_id=0, eos_token_id=None).shape[1] == width + 2
    heard = []
    streamer = type("Streamer", (), {"put": lambda self, value: heard.append(value), "end": lambda self: heard.append("end")})()
    written = model.generate(**given, **NEW, streamer=streamer)
    assert torch.equal(torch.cat([own.reshape(-1) for own in heard[:-1]]), written[0]) and heard[-1] == "end"
    with pytest.raises(ComebaError, match="as token ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), **NEW)
    cache = DynamicCache()
    with torch.no_grad():
        model(**one(tokenizer, "Ann"), past_key_values=cache)
    with pytest.raises(ComebaError, match="without a cache"):
        model.generate(**given, past_key_values=cache, **NEW)
    assert torch.equal(model.generate(**given, past_key_values=DynamicCache(), **NEW), written)
    placed = model.generate(given["input_ids"], GenerationConfig(**NEW), LogitsProcessorList(), StoppingCriteriaList())
    assert torch.equal(placed, written)
    with pytest.raises(TypeError):
        model.generate(given["input_ids"], inputs=given["input_ids"], **NEW)
    assert torch.equal(plain_generate(model)(**given, **NEW), small_model(tiny_model).generate(**given, **NEW))
    assert plain_generate(plain := small_model(tiny_model)) == plain.generate


@pytest.mark.parametrize("wrap", ["peft", "edited in peft", "compiled"])
def test_what_is_rewritten_already_is_not_again_in_a_wrapped_model(tiny_model, tokenizer, tmp_path, wrap):
    edited(tiny_model, tokenizer).save_pretrained(tmp_path)
    inner = model = small_model(tiny_model)
    if wrap != "edited in peft":
        load_edits(inner, tmp_path, tokenizer=tokenizer)
    if wrap == "compiled":
        model = torch.compile(inner, backend="eager")
    else:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)  # adds nothing before it is trained
        model = peft.get_peft_model(inner, lora)
    if wrap == "edited in peft":
        load_edits(model, tmp_path, tokenizer=tokenizer)
    seen = []
    inner.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0].tolist()))
    asked, other = one(tokenizer, ASKED["Ann lives in"]), one(tokenizer, "Ann lives in")
    out = plain_generate(model)(**asked, **NEW)
    assert seen[0] == asked["input_ids"][0].tolist()
    assert torch.equal(out[:, asked["input_ids"].shape[1] :], by_hand(tiny_model, tokenizer, "Ann lives in"))
    seen.clear()
    model.generate(**other, **NEW)  # and otherwise it is
    assert seen[0] == asked["input_ids"][0].tolist()
    # Only in the thread that says so, and no longer once an error has ended it.
    with pytest.raises(ValueError):
        plain_generate(model)(**asked, **NEW, no_such_option=1)
    seen.clear()
    going, done = threading.Event(), threading.Event()

    class Waits(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            going.set()
            return torch.full((len(input_ids),), done.wait(60))

    waiting = threading.Thread(target=plain_generate(model), kwargs={**asked, **NEW, "stopping_criteria": StoppingCriteriaList([Waits()])})
    waiting.start()
    assert going.wait(60)
    seen.clear()
    model.generate(**other, **NEW)
    done.set()
    waiting.join()
    assert seen[0] == asked["input_ids"][0].tolist()


def test_a_pipeline_asks_too(tiny_model, tokenizer):
    editor = edited(tiny_model, tokenizer)
    ask = pipeline("text-generation", model=editor.model, tokenizer=tokenizer, device="cpu")
    for text in ASKED:
        found = ask(text, max_new_tokens=5, do_sample=False, eos_token_id=None)[0]["generated_text"]
        assert found == text + tokenizer.decode(by_hand(tiny_model, tokenizer, text)[0], skip_special_tokens=True)


def test_saved_edits_ask_with_the_tokenizer_they_are_given(tiny_model, tokenizer, tmp_path, caplog):
    editor, given = edited(tiny_model, tokenizer), one(tokenizer, "Ann lives in")
    editor.save_pretrained(tmp_path)
    assert "tokenizer=tokenizer)" in (tmp_path / "README.md").read_text(encoding="utf-8")
    expected, plain = editor.model.generate(**given, **NEW), small_model(tiny_model).generate(**given, **NEW)
    without = load_edits(small_model(tiny_model), tmp_path)
    with caplog.at_level(logging.WARNING, "comeba_ext"):
        assert all(torch.equal(without.generate(**given, **NEW), plain) for _ in range(2))
    assert [record.message for record in caplog.records if "give load_edits the tokenizer" in record.message] != []
    assert sum("give load_edits the tokenizer" in record.message for record in caplog.records) == 1
    loaded = load_edits(small_model(tiny_model), tmp_path, tokenizer=tokenizer)
    twin = copy.deepcopy(loaded)
    for model in (loaded, twin):
        assert torch.equal(model.generate(**given, **NEW), expected)
    assert twin.generate.model is twin
    named = load_edits(small_model(tiny_model), tmp_path, name="facts", tokenizer=tokenizer)
    assert torch.equal(named.generate(**given, **NEW), expected)
    set_edits(named, [])
    assert torch.equal(named.generate(**given, **NEW), plain) and "generate" not in vars(named)
    set_edits(named, ["facts"])
    assert torch.equal(named.generate(**given, **NEW), expected)
    unload_edits(named, "facts")
    editor.close()
    for model in (named, editor.model):
        assert torch.equal(model.generate(**given, **NEW), plain) and not {"generate", "save_pretrained"} & set(vars(model))


CHATML = "{% for m in messages %}<|im|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML + "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}",
    "system": "<|im|>system\nYou are user\n<|end|>\n" + CHATML + "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}",
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|im|>{{ m['role'] }}<|end|>\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant<|end|>\n\n{% endif %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_in_a_chat_what_was_said_last_is_rewritten(tiny_model, tokenizer, kind):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im|>", "<|end|>", "<|eot|>"]})
    own.chat_template = TEMPLATES[kind]
    chat = [
        {"role": "user", "content": "Where is Ann?\nuser\n"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Ann lives in"},
    ]
    how = {"add_generation_prompt": True}
    text = own.apply_chat_template(chat, tokenize=False, **how)
    for given in (text, text + " Ann", text.removeprefix(own.bos_token)):  # as it is, with an answer begun, and as it is behind the start
        start, end = last_turn(own, given)
        assert given[start:end] == "Ann lives in" and start > given.index("There.")
    assert last_turn(own, "Ann lives in") == (0, 12)
    if "system" not in kind and "im" in TEMPLATES[kind]:
        text = own.apply_chat_template([{"role": "system", "content": "Be brief."}, chat[-1]], tokenize=False, **how)
        assert text[slice(*last_turn(own, text))] == "Ann lives in"
    own.chat_template = TEMPLATES[kind].replace("m['content']", "m['content'] | upper")
    assert last_turn(own, text) == (0, len(text))
    own.chat_template = TEMPLATES[kind]
    model = small_model(tiny_model)
    model.resize_token_embeddings(len(own))
    editor = make_method("ICE", model, own, named=True)
    editor.edit(FACTS)
    ids = own.apply_chat_template(chat, return_tensors="pt", return_dict=False, **how)
    chat[-1]["content"] = ASKED["Ann lives in"]
    asked = own.apply_chat_template(chat, return_tensors="pt", return_dict=False, **how)
    expected = plain_generate(model)(asked, attention_mask=torch.ones_like(asked), **NEW)[:, asked.shape[1] :]
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **NEW), torch.cat((ids, expected), 1))
