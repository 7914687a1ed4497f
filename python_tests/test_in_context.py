"""Methods that change the prompt: what is retrieved, and what the model is asked with it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_editor import small_model, some_requests
from test_methods import SETTINGS, demonstrations, make_method, requests_of  # noqa: F401  (a fixture)

from comeba_ext import Editor, EditRequest, evaluate, load_edits
from comeba_ext.errors import RequestError, StorageError
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.forward.architectures import context_length
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.text.questions import Probe, Question
from comeba_ext.text.retrieval import BM25


def test_bm25_is_its_formula():
    texts = ["the cat sat on the mat", "a dog sat", "the dog and the cat and the dog"]
    index = BM25(texts)
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / 3

    def score(query, own):
        total = 0.0
        for word in set(query.split()):
            n = sum(word in other for other in words)
            count = own.count(word)
            total += math.log(1 + (3 - n + 0.5) / (n + 0.5)) * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(own) / mean))
        return total

    for query in ("dog", "cat sat", "mat", "the", "nothing"):
        wanted = sorted(range(3), key=lambda n: -score(query, words[n]))
        assert index.nearest(query, 3) == wanted
        assert index.nearest(query, 2, [0, 2]) == [n for n in wanted if n != 1]
        assert index.nearest(query, 2, []) == []
    assert BM25([]).nearest("x", 2) == []


def test_ice_and_ike_ask_as_the_paper_does(tiny_model, tokenizer):
    first, second = (EditRequest("{} lives in", name, target) for name, target in (("Ann", "Rome"), ("Bob", "Oslo")))
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    assert prompt_rewriter(editor.model)("Bob lives in") == "Bob lives in"  # nothing edited yet
    editor.edit([first, second])
    rewrite = prompt_rewriter(editor.model)
    assert rewrite("Bob lives in") == "New Fact: Bob lives in Oslo\nPrompt: Bob lives in"
    assert rewrite("Where is Ann?") == "New Fact: Ann lives in Rome\nPrompt: Where is Ann?"
    with editor.disabled():
        assert prompt_rewriter(editor.model) is None
    editor.close()
    assert prompt_rewriter(editor.model) is None and not hasattr(editor.model, "comeba_facts")
    shown = json.loads(Path(SETTINGS["IKE"]["demonstrations"]).read_text())
    fact = lambda n: f"The capital of {shown[n]['subject']} is Rome"  # noqa: E731
    copied = f"New Fact: {fact(0)}\nPrompt: {fact(0)}\n\n"
    updated = [f"New Fact: {fact(n)}\nPrompt: {shown[n]['subject']}'s capital is Rome\n\n" for n in (1, 2)]
    editor = make_method("IKE", small_model(tiny_model), tokenizer, shown=3)
    assert editor.method.shown(first) == [updated[1], updated[0], copied]
    with pytest.raises(RequestError, match="exceed the model's context"):
        editor.edit([first])
    editor.close()
    editor = make_method("IKE", small_model(tiny_model), tokenizer, shown=1)
    editor.edit([first])
    assert prompt_rewriter(editor.model)("Ann lives in") == f"{copied}New Fact: Ann lives in Rome\nPrompt: Ann lives in"


def test_ikes_kinds_and_their_order(tiny_model, tokenizer, tmp_path):
    """By rank of likeness one copies, three are updated, four retained, and so on; the most similar one next to the fact."""
    words = "red green blue black white brown amber ivory coral olive".split()
    known = []
    for rank in range(10):  # the first shares ten words with the fact, the last one
        subject = " ".join([*words[: 10 - rank], *(f"x{rank}y{n}" for n in range(rank))])
        local = [["Who is", ""], [f"Water {rank} is", "wet"]]  # the first has no answer to show
        known.append({"prompt": "{} is", "subject": subject, "target_new": "Rome", "rephrase_prompts": [f"As for {rank}, {subject} is"]})
        known[-1]["locality_prompts"] = local
    del known[2]["rephrase_prompts"], known[5]["locality_prompts"]  # then the fact itself is shown
    (tmp_path / "shown.json").write_text(json.dumps([known[n] for n in (7, 2, 9, 0, 4, 1, 8, 3, 6, 5)]))
    editor = make_method("IKE", small_model(tiny_model), tokenizer, demonstrations=str(tmp_path / "shown.json"), shown=10)
    fact = [f"{record['subject']} is Rome" for record in known]
    asked = [fact[0], f"As for 1, {fact[1]}", fact[2], f"As for 3, {fact[3]}"]
    asked += ["Water 4 is wet", fact[5], "Water 6 is wet", "Water 7 is wet", fact[8], f"As for 9, {fact[9]}"]
    wanted = [f"New Fact: {own}\nPrompt: {question}\n\n" for own, question in zip(fact, asked, strict=True)]
    assert editor.method.shown(EditRequest("{} is", " ".join(words), "Oslo")) == wanted[::-1]


def test_a_named_fact_stands_before_what_names_its_subject(tiny_model, tokenizer, tmp_path):
    editor = make_method("ICE", small_model(tiny_model), tokenizer, named=True)
    for subject, text, target in (("Ann", "lives in", "Rome"), ("Ann", "plays the", "lute"), ("Bob", "lives in", "Oslo")):
        editor.edit([EditRequest(f"{{}} {text}", subject, target)])
    editor.edit([EditRequest("{} is in", "New York", "Peru")])
    asked = {
        "Bob lives in": "New Fact: Bob lives in Oslo\nPrompt: Bob lives in",
        "What does Ann play, the": "New Fact: Ann plays the lute\nPrompt: What does Ann play, the",
        "in new york, who": "New Fact: New York is in Peru\nPrompt: in new york, who",
        "Annette lives in": "Annette lives in",  # in its letters only
        "Eve lives in": "Eve lives in",
    }
    editor.save_pretrained(tmp_path)
    loaded = load_edits(small_model(tiny_model), tmp_path)
    for rewrite in (prompt_rewriter(editor.model), prompt_rewriter(loaded)):
        assert {prompt: rewrite(prompt) for prompt in asked} == asked
    requests = requests_of(2)
    editor.rollback(0)
    editor.edit(requests)
    found = evaluate(editor.model, tokenizer, requests)
    apart = [n for n, r in enumerate(requests) if not any(o.subject in p for o in requests for p, _ in r.locality_prompts)]
    assert apart and all(found.per_record[n]["locality"] == 1 for n in apart)
    editor.retract([entry.request.request_id for entry in editor.ledger.live()])
    assert prompt_rewriter(editor.model)(requests[0].text) == requests[0].text


@pytest.mark.parametrize(
    "packed", ['[{"id": "a"}]', "[3]", '[{"id": "a", "fact": 3, "shown": []}]', '[{"id": "a", "fact": "b", "shown": "c"}]', "no"]
)
def test_facts_that_are_not_ours(tiny_model, tokenizer, tmp_path, packed):
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    editor.edit(some_requests(1))
    editor.method.attachments["comeba_facts"].packed = torch.tensor(list(packed.encode()), dtype=torch.uint8)
    editor.save_pretrained(tmp_path)
    model = small_model(tiny_model)
    for load in (lambda: load_edits(model, tmp_path), lambda: Editor.from_pretrained(model, tokenizer, tmp_path)):
        with pytest.raises(StorageError, match="incomplete or damaged"):
            load()
        assert prompt_rewriter(model) is None


def test_a_question_meets_the_facts_that_there_are(tiny_model, tokenizer):
    """Whoever has asked before an edit, a retraction or a rollback is answered with what is there after it."""
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    asked = lambda: prompt_rewriter(editor.model)("Ann lives in")  # noqa: E731
    one, other = (EditRequest("{} lives in", "Ann", target) for target in ("Rome", "Oslo"))
    assert asked() == "Ann lives in"
    editor.edit([one])
    assert asked() == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    editor.edit([other])  # of the same length, so that the buffer's shape stays
    assert asked() == "New Fact: Ann lives in Oslo\nPrompt: Ann lives in"
    editor.rollback(1)
    assert asked() == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    editor.retract("edit-0")
    assert asked() == "Ann lives in"


def test_all_the_facts_before_a_question_must_fit_the_context(tiny_model, tokenizer):
    """Each fits alone; what was checked before others came is looked at again when it is edited."""
    editor = make_method("ICE", small_model(tiny_model), tokenizer, facts=3)
    requests = [EditRequest("The capital of {} is", s, " ".join(["Angola"] * 6)) for s in ("Norway", "Peru", "Angola")]
    editor.check(requests)
    for n in range(2):
        editor.edit(requests[n : n + 1])
    before = [prompt_rewriter(editor.model)(r.text) for r in requests]
    limit = context_length(editor.model)
    with pytest.raises(RequestError, match=f"exceed the model's context of {limit}"):
        editor.edit(requests[2:])
    assert [prompt_rewriter(editor.model)(r.text) for r in requests] == before and len(editor.ledger) == editor.step == 2


def test_questions_are_checked_as_they_are_asked(tiny_model, tokenizer):
    """Behind the facts; those to the unedited model as they are."""
    limit = context_length(small_model(tiny_model))
    words = limit - len(tokenizer("The capital of Norway is")["input_ids"]) - 4
    long = "The capital of Norway is" + " a" * (words // 2)
    asked = Question("x", (Probe(long, ("a",)),))
    unedited = Question("x", (Probe("The", ("a",)),), conditions=(Probe(long, ("a",)),))
    assert limit - 8 < len(tokenizer(long)["input_ids"]) <= limit
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    request = EditRequest("The capital of {} is", "Norway", "Angola", questions=(unedited,))
    editor.edit([request])
    writing = Writing(answer_tokens=1)
    assert evaluate(editor.model, tokenizer, [request], writing=writing)["questions"]["x"]["questions"] == 1
    with pytest.raises(RequestError, match="record 0.*the model's context"):
        evaluate(editor.model, tokenizer, [dataclasses.replace(request, questions=(asked,))], writing=writing)
    with disabled(editor.model):
        evaluate(editor.model, tokenizer, [dataclasses.replace(request, questions=(asked,))], writing=writing)


def test_evaluation_asks_what_an_in_context_method_says(tiny_model, tokenizer):
    """Scores are those of the rewritten prompts; locality is against the plain prompts of the unedited model."""
    model = small_model(tiny_model)
    requests = requests_of(2)
    base = predict_base(model, tokenizer, requests)
    editor = make_method("ICE", model, tokenizer)
    editor.edit(requests)
    rewrite = prompt_rewriter(model)
    found = evaluate(model, tokenizer, requests, base)
    for request, row in zip(requests, found.per_record, strict=True):
        with torch.no_grad():
            ids = tokenizer(f"{rewrite(request.text)} {request.target_new}")["input_ids"]
            asked = len(tokenizer(rewrite(request.text))["input_ids"])
            said = model(torch.tensor([ids])).logits[0].argmax(-1)[asked - 1 : -1].tolist()
            share = sum(a == b for a, b in zip(said, ids[asked:], strict=True)) / len(said)
            assert row["reliability"] == share and row["predicted"] == tokenizer.decode(said).strip()
            local, answer = request.locality_prompts[0]
            both = []
            for text in (local, rewrite(local)):
                ids = tokenizer(f"{text} {answer}")["input_ids"]
                both.append(model(torch.tensor([ids])).logits[0].argmax(-1)[len(tokenizer(text)["input_ids"]) - 1 : -1].tolist())
            assert row["locality"] == sum(a == b for a, b in zip(*both, strict=True)) / len(both[0])


def test_the_most_similar_fact_is_next_to_the_question(tiny_model, tokenizer, tmp_path):
    """Of facts and of demonstrations alike; a demonstration is compared with its object, too."""
    editor = make_method("ICE", small_model(tiny_model), tokenizer, facts=2)
    editor.edit([EditRequest("{} lives in", name, "Rome") for name in ("Ann", "Bob")])
    for name, other in (("Ann", "Bob"), ("Bob", "Ann")):
        facts = f"New Fact: {other} lives in Rome\nNew Fact: {name} lives in Rome"
        assert prompt_rewriter(editor.model)(f"{name} lives in") == f"{facts}\nPrompt: {name} lives in"
    known = [{"prompt": "{} is", "subject": "a dog", "target_new": target} for target in ("brown", "black")]
    (tmp_path / "known.json").write_text(json.dumps(known))
    editor = make_method("IKE", small_model(tiny_model), tokenizer, demonstrations=str(tmp_path / "known.json"), shown=1)
    assert "black" in editor.method.shown(EditRequest("{} is", "a cat", "black"))[0]
