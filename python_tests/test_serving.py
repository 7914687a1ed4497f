"""A model that is asked while it is edited: the service against ``generate`` itself."""

import threading
from pathlib import Path

import pytest
import torch
from test_editor import edits_of, make_editor, small_model, some_requests

from comeba_ext import Editor, load_edits, testbed
from comeba_ext.errors import ComebaError, CovarianceError, RequestError, StorageError
from comeba_ext.layers.attachment import attachments
from comeba_ext.serving.completion import Cancelled, Sampling, _settled
from comeba_ext.serving.service import EditingService

FACTS = testbed.facts()[:6]


@pytest.fixture(scope="module")
def covariance():
    editor = Editor(*testbed.load())
    editor.collect_covariance(testbed.texts(), tokens=2000, progress=False)
    return editor.covariance


@pytest.fixture(scope="module")
def folder(covariance, tmp_path_factory):
    """Two edits of the embedded model."""
    editor = Editor(*testbed.load())
    editor.set_covariance(covariance)
    editor.edit(FACTS[:2])
    editor.save_pretrained(tmp_path_factory.mktemp("edits"))
    return next(tmp_path_factory.getbasetemp().glob("edits*"))


@pytest.fixture(scope="module")
def shared(folder):
    """For tests that change nothing."""
    return EditingService(*testbed.load(), edits=folder, editable=False)


def written(model, tokenizer, text, new, **options):
    """By ``generate`` alone."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, **options}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0, **options)
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out]


def test_texts_are_those_of_generate(shared, folder):
    model, tokenizer = testbed.load()
    asked = [fact.text for fact in FACTS[:3]]
    before = [written(model, tokenizer, text, 12)[0] for text in asked]
    load_edits(model, folder)
    after = [written(model, tokenizer, text, 12)[0] for text in asked]
    assert before[:2] != after[:2] and before[2] == after[2]
    assert shared.generate(asked, max_new_tokens=12) == after
    assert shared.generate(asked, max_new_tokens=12, edited=False) == before
    assert shared.live == 2 and shared.step == 1 and not shared.editable
    with pytest.raises(ComebaError, match="only used here"):
        shared.add(FACTS[2:3])


@pytest.mark.parametrize("options", [{"temperature": 1.3, "top_p": 0.8}, {"temperature": 0.9, "top_k": 7}, {"temperature": 1.0}])
def test_a_seed_draws_what_generate_draws(shared, options):
    state = torch.get_rng_state()
    found = shared.generate(["The"], max_new_tokens=20, seed=5, n=3, **options)
    assert torch.equal(torch.get_rng_state(), state) and len(set(found)) > 1
    with torch.random.fork_rng(devices=[]), shared.generating() as model:
        torch.manual_seed(5)
        reference = {"top_k": 0, "top_p": 1.0, **options}
        assert found == written(model, shared.tokenizer, "The", 20, do_sample=True, num_return_sequences=3, **reference)
    assert shared.generate(["The"], max_new_tokens=20, n=3, **options) != found


def test_what_generate_would_do_is_the_default():
    """A model whose configuration samples is sampled from, as long as nothing else is asked for."""
    model, tokenizer = testbed.load()
    model.generation_config.update(do_sample=True, temperature=1.4)  # and the 50 likeliest, as generate has it where nothing is said
    own = EditingService(model, tokenizer, editable=False)
    found = own.generate(["The"], max_new_tokens=20, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert found == written(model, tokenizer, "The", 20, do_sample=True)
    for cold in (0, 1e-9):
        assert own.generate(["The"], max_new_tokens=9, temperature=cold) == written(model, tokenizer, "The", 9)


def test_streams_are_the_text_in_parts(shared, tiny_model, tokenizer):
    """Of any bytes: a random model writes half characters, and stops begin that are none."""
    own = EditingService(tiny_model("llama"), tokenizer, editable=False)
    for service, stop, seeds in ((own, (), 2), (own, ("e", "ab", "\n\n"), 2), (shared, ("the", " of the"), 1)):
        for seed in range(seeds):
            parts: dict[int, list[str]] = {0: [], 1: [], 2: [], 3: []}
            asked = {"max_new_tokens": 30, "seed": seed, "temperature": 1.5, "n": 2, "stop": stop}
            whole = service.generate(["The capital of", "Marie"], **asked, stream=lambda n, text, parts=parts: parts[n].append(text))
            assert ["".join(parts[n]) for n in range(4)] == whole == service.generate(["The capital of", "Marie"], **asked)
            assert not any(end in text for end in stop for text in whole)
            unstopped = service.generate(["The capital of", "Marie"], **{**asked, "stop": ()})
            cut = [min([text[: text.find(end)] for end in stop if end in text] or [text], key=len) for text in unstopped]
            assert all(len(parts[n]) > 1 for n in range(4) if len(cut[n]) > 30)
            # Where no row had come to its end, the draws of the others are the same: then a stop is a cut.
            if whole[0] == unstopped[0]:
                assert whole[0] == cut[0]


@pytest.mark.parametrize(
    "text, stops, settled",
    [
        ("ab\ufffd", ("bé",), 1),  # its bytes may be é's
        ("ab\ufffd", (), 2),
        ("ab\ufffd\ufffd", ("abc", "x"), 0),
        ("ab\ufffdb", ("bé",), 3),
        ("abc", ("bc!", "c?"), 1),
        ("\ufffd", ("é",), 0),
    ],
)
def test_what_may_become_a_stop_is_not_sent(text, stops, settled):
    assert _settled(text, stops) == settled


def test_log_probabilities_are_the_models(shared):
    text = f"{FACTS[0].text} {FACTS[0].target_new}"
    (found,) = shared.complete([text], Sampling(2, logprobs=3, echo=True))
    with shared.generating() as model, torch.no_grad():
        logprobs = model(torch.tensor([found.prompt + found.tokens])).logits[0].log_softmax(-1)
    assert found.scored[0].logprob is None and [own.token for own in found.scored] == found.prompt + found.tokens
    for at, own in enumerate(found.scored[1:]):
        best = logprobs[at].topk(3)
        assert own.logprob == pytest.approx(logprobs[at, own.token].item(), abs=2e-4)
        assert [token for token, _ in own.top] == best.indices.tolist()
        assert [value for _, value in own.top] == pytest.approx(best.values.tolist(), abs=2e-4)
    (scored,) = shared.complete([text], Sampling(0, logprobs=0, echo=True))
    assert [own.logprob for own in scored.scored] == [own.logprob for own in found.scored[: len(found.prompt)]] and not scored.tokens


def test_whoever_began_before_an_edit_ends_before_it(covariance):
    """The edit is made in the middle of the text, which goes on from the state it began with; the next one has the new one."""
    with EditingService(*testbed.load(), covariance=covariance) as service:
        service.add(FACTS[:1])
        asked = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}
        before = service.generate([FACTS[1].text], **asked)
        made = []

        def edit(n: int, text: str) -> None:
            if not made:
                made.append(service.add(FACTS[1:2]))

        assert service.generate([FACTS[1].text], **asked, stream=edit) == before
        assert made[0].answered == [True]
        assert service.generate([FACTS[1].text], **asked) != before
        assert FACTS[1].target_new in service.generate([FACTS[1].text], max_new_tokens=6)[0]


def test_edits_come_and_go_whole(covariance, tmp_path, monkeypatch):
    asked = [fact.text for fact in FACTS[:3]]
    seen = []
    with EditingService(*testbed.load(), edits=tmp_path / "edits", covariance=covariance, autosave=True) as service:
        plain = service.generate(asked, max_new_tokens=6)
        report = service.add(FACTS[:2], progress=lambda done, loss: seen.append((done, loss)))
        assert seen[-1][0] == 2 and seen[-1][1] < 1 and report.answered == [True, True]
        both = service.generate(asked, max_new_tokens=6)
        assert [edit.id for edit in service.edits()] == report.request_ids and service.live == 2
        # An error anywhere, a disk that is full among them, is no edit.
        with monkeypatch.context() as patched:
            patched.setattr(Editor, "save_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(StorageError("full")))
            for change in (lambda: service.add(FACTS[2:3]), lambda: service.retract(report.request_ids[0]), service.undo):
                with pytest.raises(StorageError, match="full"):
                    change()
        with pytest.raises(RequestError):
            service.add([FACTS[2], {"prompt": "{} is"}])
        with pytest.raises(RequestError):
            service.retract("nobody")
        assert service.generate(asked, max_new_tokens=6) == both and service.step == 1
        service.retract(report.request_ids[0])
        one = service.generate(asked, max_new_tokens=6)
        assert one == [plain[0], both[1], plain[2]]
        assert [edit.superseded for edit in service.edits()] == [2, None]
        # What is on disk is what is seen.
        assert EditingService(*testbed.load(), edits=service.folder, editable=False).generate(asked, max_new_tokens=6) == one
        service.undo()
        assert service.generate(asked, max_new_tokens=6) == both
        service.undo()
        assert service.generate(asked, max_new_tokens=6) == plain and not service.edits()
        with pytest.raises(RequestError, match="nothing to undo"):
            service.undo()
    with pytest.raises(ComebaError, match="closed"):
        service.add(FACTS[2:3])
    assert service.generate(asked, max_new_tokens=6) == plain


def test_the_service_edits_what_an_editor_edits(tiny_model, tokenizer):
    """Step for step the same numbers, whatever is copied on the way."""
    editor = make_editor(small_model(tiny_model, "llama"), tokenizer)
    service = EditingService(
        small_model(tiny_model, "llama"), tokenizer, config=editor.config, covariance=lambda own: own.set_covariance(editor.covariance)
    )
    requests = some_requests(4)
    for batch in (requests[:2], requests[2:]):
        editor.edit(batch)
        service.add(batch)
    first = service.edits()[0].id
    editor.retract(first)
    service.retract(first)
    with service.generating() as model:
        for name, layer in editor.layers.items():
            assert edits_of(layer).any() and torch.equal(edits_of(layer), edits_of(model.get_submodule(name)))


def test_one_process_has_the_folder(folder, tmp_path):
    with pytest.raises(StorageError, match="no edits"):
        EditingService(*testbed.load(), edits=tmp_path, editable=False)
    with pytest.raises(ComebaError, match="other settings"):
        EditingService(*testbed.load(), edits=folder, method="FT")
    with pytest.raises(CovarianceError, match="needs a covariance"):
        EditingService(*testbed.load()).add(FACTS[:1])
    with (
        EditingService(*testbed.load(), edits=tmp_path / "new", covariance=covariance),
        pytest.raises(StorageError, match="another process"),
    ):
        EditingService(*testbed.load(), edits=tmp_path / "new")


def test_edits_from_the_hub_are_used_and_no_folder_is_made_for_them(shared, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder))
    monkeypatch.chdir(tmp_path)
    own = EditingService(*testbed.load(), edits="me/facts", editable=False)
    assert (own.live, own.step) == (2, 1)
    assert own.generate([FACTS[0].text], max_new_tokens=8) == shared.generate([FACTS[0].text], max_new_tokens=8)
    for name in ("me/facts", Path("me/facts")):
        with pytest.raises(StorageError, match="no folder me/facts to keep edits in"):
            EditingService(*testbed.load(), edits=name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "me").mkdir()
    with EditingService(*testbed.load(), edits="me/facts") as own:  # a new folder, in one that is there
        assert own.live == 0 and own.folder.is_dir()
    # What cannot be read leaves the model as it was.
    model, tokenizer = testbed.load()
    monkeypatch.setattr("comeba_ext.serving.service.read_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        EditingService(model, tokenizer, edits=folder, editable=False)
    assert not attachments(model)


def test_facts_in_the_prompt(tmp_path):
    """In-context edits are asked for as the method says, once, in texts and in chats."""
    model, tokenizer = testbed.load()
    service = EditingService(model, tokenizer, method="ICE")
    assert service.prompt("x") == "x"
    service.add([{"prompt": "{} is in", "subject": "Cognos", "target_new": "Paris"}])
    text = "Cognos is located in"
    asked = service.prompt(text)
    assert asked == f"New Fact: Cognos is in Paris\nPrompt: {text}"
    expected = written(model, tokenizer, asked, 8)
    assert service.generate([text], max_new_tokens=8) == expected
    assert service.generate([tokenizer(text)["input_ids"]], max_new_tokens=8) == expected
    assert service.generate([text], max_new_tokens=8, edited=False) == written(model, tokenizer, text, 8)
    with pytest.raises(RequestError, match="echo"):
        service.complete([text], Sampling(1, logprobs=1, echo=True))
    with pytest.raises(RequestError, match="no chat template"):
        service.generate([[{"role": "user", "content": text}]], max_new_tokens=8)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": text}]
    assert service.generate([chat], max_new_tokens=8) == expected
    # A chat that comes as tokens is asked as one that comes as turns: what the user said last is rewritten, not the whole of it.
    tokenizer.chat_template = "{% for m in messages %}Turn: {{ m.content }}\nEnd. {% endfor %}"
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}, *chat]
    tokens = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    assert f"Turn: {asked}\nEnd." in tokenizer.decode(service.complete([tokens], Sampling(1))[0].prompt)
    assert service.generate([tokens], max_new_tokens=8) == service.generate([chat], max_new_tokens=8)
    for unknown in (9999, -1):
        with pytest.raises(RequestError, match=str(unknown)):
            service.generate([[unknown]], max_new_tokens=2)


def test_bad_prompts(shared):
    long = [5] * 200
    for prompt, words in (("", "empty"), ([], "empty"), ([9999], "9999"), ([-1], "-1"), (long, "context is 128"), ("\ud800", "half")):
        with pytest.raises(RequestError, match=words):
            shared.generate([prompt], max_new_tokens=2)
    assert shared.complete(["The"], Sampling(500, fit=True))[0].finish_reason in ("length", "stop")
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        shared.complete(["The"], Sampling(5), cancel=cancel)
    with pytest.raises(ZeroDivisionError):  # what a stream raises ends it
        shared.generate(["The"], max_new_tokens=5, stream=lambda *_: 1 / 0)
