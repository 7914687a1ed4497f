"""Tables in blocks of rows: what is read is what was written, and only what is new is written."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_editor import TEXTS, assert_same, make_editor, small_model, snapshot, some_requests

from comeba_ext import Editor, row_blocks, storage
from comeba_ext.errors import StorageError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


def table(rows, width, dtype=torch.float32, seed=0):
    shape = (rows, *((width,) if width else ()))
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_blocks, "BYTES", 256)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t) for n, t in expected.items()
    )


def blocks_in(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("comeba_rows-*")}


@given(sizes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40), st.sampled_from(DTYPES)), max_size=4))
@settings(deadline=None, max_examples=60)
def test_split_and_join(sizes):
    tensors = {f"t{n}": table(*size, seed=n) for n, size in enumerate(sizes)} | {"scalar": torch.tensor(3.0)}
    rest, digests, blocks = row_blocks.split(tensors)
    assert same(row_blocks.join(rest, digests, blocks.__getitem__), tensors)
    assert {name for own in digests.values() for name in own} == set(blocks)
    for n, (count, width, dtype) in enumerate(sizes):
        each = max(1, 256 // (max(1, width) * dtype.itemsize))  # rows a block
        assert len(rest[f"t{n}"]) == count % each and len(digests.get(f"t{n}", [])) == count // each


def test_only_what_is_new_is_written(tmp_path):
    whole = table(100, 8)  # 8 rows a block

    def save(tensor):
        storage.write_folder(
            tmp_path, {"format": 1}, {"adapter": {"a": tensor}, "state": {"b": tensor, "n": torch.tensor(1)}}, {"log": "x"}
        )
        manifest, (adapter, state, log) = storage.read_folder(tmp_path, "adapter", "state", "log")
        assert same(adapter, {"a": tensor}) and same(state, {"b": tensor, "n": torch.tensor(1)}) and log == "x"
        assert manifest["format"] == (3 if len(tensor) >= 8 else 1)
        files = blocks_in(tmp_path)
        assert files.keys() == {f"comeba_rows-{digest}.safetensors" for digest in manifest.get("blocks", [])}
        assert {path.name for path in tmp_path.iterdir()} == {*manifest["files"].values(), *files, storage.MANIFEST, storage.LOCK}
        return files

    first = save(whole[:50])
    assert len(first) == 6  # shared by both files
    second = save(whole[:70])
    assert len(second) == 8 and first.items() <= second.items()  # the same files, not such with the same name
    changed = whole[:70].clone()
    changed[40] += 1
    third = save(changed)
    assert len(third) == 8 and len(third.keys() & second.keys()) == 7
    assert len(save(whole[:70][torch.arange(70) != 20])) == 8 and save(whole[:5]) == {}


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    before, after = {"a": table(40, 8)}, {"a": table(80, 8, seed=1)}
    storage.write_folder(tmp_path, {"format": 1}, {"adapter": before}, {})
    files, write = blocks_in(tmp_path), storage.write_tensors
    for allowed in range(11):
        calls = iter(range(99))

        def some(path, *args, calls=calls, allowed=allowed):
            if next(calls) == allowed:
                raise OSError("disk full")
            write(path, *args)

        monkeypatch.setattr(storage, "write_tensors", some)
        with pytest.raises(StorageError, match="could not be written"):
            storage.write_folder(tmp_path, {"format": 1}, {"adapter": after}, {})
        assert same(storage.read_folder(tmp_path, "adapter")[1][0], before) and blocks_in(tmp_path) == files
    monkeypatch.setattr(storage, "write_tensors", write)
    storage.write_folder(tmp_path, {"format": 1}, {"adapter": after}, {})
    assert same(storage.read_folder(tmp_path, "adapter")[1][0], after) and not blocks_in(tmp_path).keys() & files.keys()


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "other dtype", "other width", "a number", "not named", "named otherwise", "no list"]
)
def test_damaged_blocks_are_one_error(tmp_path, damage):
    storage.write_folder(tmp_path, {"format": 1}, {"adapter": {"a": table(40, 8)}}, {})
    block = sorted(tmp_path.glob("comeba_rows-*"))[0]
    if damage == "missing":
        block.unlink()
    elif damage == "truncated":
        block.write_bytes(block.read_bytes()[:100])
    elif damage in ("not named", "named otherwise", "no list"):
        path = tmp_path / storage.MANIFEST
        manifest, digest = json.loads(path.read_text()), block.stem[-32:]
        manifest["blocks"].remove(digest)
        manifest["blocks"] += ["../" + digest[3:]] if damage == "named otherwise" else []
        path.write_text(json.dumps(manifest | ({"blocks": 5} if damage == "no list" else {})))
    else:
        other = {"other dtype": table(8, 8, torch.int64), "other width": table(8, 9), "a number": torch.tensor(1.0)}[damage]
        storage.write_tensors(block, {"rows": other})
    with pytest.raises(StorageError):
        storage.read_folder(tmp_path, "adapter")


def test_edits_go_on_from_blocks(tiny_model, tokenizer, tmp_path):
    model, requests = small_model(tiny_model), some_requests(6)
    editor = make_editor(model, tokenizer, scope="nearest", steps=2)
    editor.edit(requests[:3])
    editor.save_pretrained(tmp_path)
    first = blocks_in(tmp_path)
    editor.save_pretrained(tmp_path)
    assert first and blocks_in(tmp_path) == first
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path)
    assert_same(snapshot(again), snapshot(editor))
    for own in (editor, again):
        own.edit(requests[3:])
    assert_same(*({**snapshot(own), "log": None} for own in (editor, again)))  # which tells how long it took
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    assert torch.equal(again.model(**ids).logits, model(**ids).logits)
