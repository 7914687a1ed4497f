"""Ten thousand generated bad inputs: each a clear error of ours or a sound result, nothing changed.

Good input is taken apart: one value of a record, a configuration, a manifest is replaced by any JSON value or dropped, one file
of a folder is cut, stretched or overwritten. What may come out is named in every test; any other exception fails it.
"""

import contextlib
import copy
import functools
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_saved_edits import files, logits, make_editor, small_model

from comeba_ext import EditConfig, Editor, load_edits
from comeba_ext.data import read_requests, read_texts
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.experiments.definition import load as load_definition
from comeba_ext.layers.attachment import detach
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.text.request import EditRequest

# The same examples as long as nothing that they are drawn from changes; what is new is looked for with derandomize=False, by hand.
cases = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(), max_size=12)  # any code point, halves of characters among them
number = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1, 2**31, 1e308, 1e-308]))
ODD = ("", " ", "{}", "{} {}", "../x", "/dev/zero", "\0", "\ud800", "nan", "inf", "1e999", "true", "x" * 300)
scalar = st.one_of(st.none(), st.booleans(), number, text, st.sampled_from(ODD))
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6)


def places(tree, path=()):
    """The path of every value in JSON."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


def damaged(draw, tree):
    """A copy with one value replaced by any other, dropped, or repeated under another name."""
    path = draw(st.sampled_from([p for p in places(tree) if p]))
    tree = copy.deepcopy(tree)
    *above, last = path
    holder = functools.reduce(lambda part, key: part[key], above, tree)
    what = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
    if what == "drop":
        del holder[last]
    elif what == "replace":
        holder[last] = draw(value)
    elif isinstance(holder, dict):
        holder[draw(text)] = draw(value)
    else:
        holder.append(draw(value))
    return tree


RECORDS = [
    {
        "prompt": "The mother tongue of {} is",
        "subject": "A B",
        "target_new": "x",
        "ground_truth": "y",
        "rephrase_prompts": ["A B speaks"],
        "locality_prompts": [["C is", "z"]],
        "request_id": "r",
        "wordings": ["What does A B speak?"],
        "fact_token": "subject_last",
    },
    {
        "case_id": 1,
        "requested_rewrite": {"prompt": "{} is", "subject": "A", "target_new": {"str": "x"}, "target_true": {"str": "y"}},
        "paraphrase_prompts": ["So A is"],
        "neighborhood_prompts": ["B is"],
    },
    {
        "subject": "A",
        "src": "Who is A?",
        "alt": "x",
        "answers": ["y"],
        "rephrase": "And A?",
        "loc": "nq question: who is B",
        "loc_ans": "z",
    },
    {
        "prompt": "Who is A?",
        "subject": "A",
        "target_new": "x",
        "rephrase_prompt": "And A?",
        "locality": {"Other": {"prompt": ["B?"], "ground_truth": ["z"]}},
    },
]


@cases(max_examples=3000)
@given(st.data())
def test_records(data):
    record = damaged(data.draw, data.draw(st.sampled_from(RECORDS)))
    try:
        found = EditRequest.from_record(record, 0)
    except RequestError as error:
        assert str(error)
        return
    assert found.text and found.subject in found.text and found.target_new.strip()
    assert EditRequest.from_record(json.loads(json.dumps(found.to_record()))) == found


@cases(max_examples=1500)
@given(st.data())
def test_files_of_records(tmp_path, data):
    records = [data.draw(st.one_of(value, st.sampled_from(RECORDS))) for _ in range(data.draw(st.integers(0, 3)))]
    content = json.dumps(data.draw(st.one_of(st.just(records), value)), ensure_ascii=True).encode()
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / data.draw(st.sampled_from(["a.json", "a.jsonl", "a"]))
    path.write_bytes(content[:cut] + data.draw(st.one_of(st.just(b""), st.binary(max_size=8))))
    try:
        found = read_requests(path)
    except StorageError as error:
        assert str(path) in str(error)
        return
    assert found.read == len(found.requests) + len(found.skipped) and all(skip["reason"] for skip in found.skipped)


@cases(max_examples=500)
@given(st.data())
def test_files_of_texts(tmp_path, data):
    path = tmp_path / data.draw(st.sampled_from(["a.txt", "a.csv", "a.jsonl"]))
    start = {".txt": b"", ".csv": b"id,text\n1,a b\n", ".jsonl": b'{"text": "a b"}\n'}[path.suffix]
    path.write_bytes(start + data.draw(st.binary(max_size=40)))
    try:
        assert all(isinstance(found, str) and found.strip() for found in read_texts(path))
    except StorageError as error:
        assert str(path) in str(error)


CONFIG = EditConfig(layers=(0, 1)).to_dict()
ONE_TEXT = ("The mother tongue of Danielle Darrieux is",)  # that an edit answers: the models are asked some two thousand times


@cases(max_examples=2500)
@given(st.data())
def test_configurations(data):
    values = damaged(data.draw, CONFIG)
    try:
        found = EditConfig.from_dict(values, "here")
    except ConfigError as error:
        assert str(error).startswith("here: ")
        return
    assert EditConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.lam_of(32) > 0 and 0 < found.margin <= 1


@cases(max_examples=1000)
@given(st.data())
def test_files_of_settings(tmp_path, data):
    path = tmp_path / data.draw(st.sampled_from(["a.yaml", "a.json"]))
    good = json.dumps(data.draw(st.sampled_from([CONFIG, {"layers": [0], "lam": 1.0}]))).encode()
    at = data.draw(st.integers(0, len(good)))
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=12)) + good[at + data.draw(st.integers(0, 3)) :])
    try:
        EditConfig.from_file(path)
    except ConfigError as error:
        assert str(path) in str(error)
    with pytest.raises(ComebaError):  # no experiment looks like this
        load_definition(path)


@pytest.fixture(scope="module", params=["zscore", "nearest"])
def folder(request, tmp_path_factory):
    """Saved edits, to be damaged; the model, its tokenizer, what it says unedited, and its tensors."""
    from shared_fixtures import tiny_model, tokenizer

    words = tokenizer.__wrapped__()
    make = tiny_model.__wrapped__(words)
    path = tmp_path_factory.mktemp(request.param)
    make_editor(make, words, scope=request.param).save_pretrained(path)
    model = small_model(make)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert hooks(model) == []
    return path, model, words, logits(model, words, ONE_TEXT), state


def hooks(model) -> list:
    """What is called around its forward passes."""
    return [hook for module in model.modules() for kind in (module._forward_hooks, module._forward_pre_hooks) for hook in kind.values()]


def refused(folder) -> bool:
    """Load the damaged folder for use and to go on editing: either works on sound numbers, or it is refused and the model as it was."""
    path, model, words, before, state = folder
    found = sorted((file.name, file.stat().st_size) for file in files(path))
    errors = 0
    for read in (lambda: load_edits(model, path), lambda: Editor.from_pretrained(model, words, path).model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                edited = read()
                assert all(torch.isfinite(x).all() for x in logits(edited, words, ONE_TEXT))
            except ComebaError as error:
                assert str(error)
                assert not any(isinstance(module, HookedLinear) for module in model.modules())
                errors += 1
            finally:
                detach(model)
        own = model.state_dict()
        assert own.keys() == state.keys() and all(torch.equal(tensor, state[name]) for name, tensor in own.items())
        assert hooks(model) == []
    assert all(torch.equal(a, b) for a, b in zip(logits(model, words, ONE_TEXT), before, strict=True))
    assert sorted((file.name, file.stat().st_size) for file in files(path)) == found
    return errors == 2


@contextlib.contextmanager
def replaced(file, content):
    """A file of the folder, until the end of the block."""
    sound = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(sound)


@cases(max_examples=600)
@given(st.data())
def test_manifests(folder, data):
    (manifest,) = [file for file in files(folder[0]) if file.suffix == ".json"]
    sound = json.loads(manifest.read_text())
    with replaced(manifest, json.dumps(damaged(data.draw, sound)).encode()):
        refused(folder)


@cases(max_examples=150)
@given(st.data())
def test_files_of_a_folder(folder, data):
    file = data.draw(st.sampled_from(sorted(files(folder[0]))))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    cut = content[:at] if data.draw(st.booleans()) else content + data.draw(st.binary(min_size=1, max_size=9))
    with replaced(file, cut):
        refused(folder)


def test_the_sound_folder_loads(folder):
    assert not refused(folder)


def test_what_the_damage_starts_from_is_sound():
    assert [EditRequest.from_record(record, n).subject for n, record in enumerate(RECORDS)] == ["A B", "A", "A", "A"]
    assert EditConfig.from_dict(CONFIG).to_dict() == CONFIG
