"""Files: atomic writes, checked reads, and the identity of a base model.

A folder of several files is replaced atomically by writing every file under a fresh name and then one JSON file, the
*manifest*, that names them: a kill at any moment leaves the old manifest with the old files or the new one with the new.
Who reads while another process writes reads again, until what the manifest names was all there. Two that write one folder
are kept apart by a lock.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from comeba_ext.errors import StorageError
from comeba_ext.row_blocks import KIND, join, split


def make_folder(path: str | Path) -> Path:
    """The folder, made with those above it where it is missing, and found to take a file: better before long work than after.

    Raises:
        StorageError: it cannot be made, or nothing can be written there.
    """
    path = Path(path)
    probe = path / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot be a folder to write to ({error.strerror})") from None
    return path


def writable(path: str | Path) -> Path:
    """A file's path, found to be one that can be written.

    Raises:
        StorageError: it is a folder, or its folder is missing or takes no file.
    """
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: the folder {path.parent} does not exist")
    make_folder(path.parent)
    return path


@contextmanager
def alone(folder: str | Path):
    """Inside, no other process is in here with the same folder, which is made where it is missing, and is gone again afterwards
    if it was and nothing came into it. What a killed writer left there is gone.

    Raises:
        StorageError: another process is, or nothing can be written there.
    """
    folder = Path(folder)
    made, lock = not folder.exists(), FileLock(folder / LOCK, timeout=0, is_singleton=True)
    outermost = not lock.is_locked
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StorageError(f"{folder}: another process is writing there; wait for it, or choose another folder") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be a folder to write to ({error.strerror})") from None
    try:
        if outermost:  # what is inside clears up after itself
            with suppress(OSError, StorageError):
                _clear(folder, files_of(read_manifest(folder)) if (folder / MANIFEST).exists() else set())
        yield
    finally:
        lock.release()
        if made and [file.name for file in folder.iterdir()] in ([], [LOCK]):
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


LOCK = ".comeba.lock"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; the folder must exist."""
    _replace(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> None:
    """Write a safetensors file atomically; ``metadata`` is stored as JSON."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    meta = {"comeba_ext": json.dumps(metadata or {})}
    _replace(Path(path), lambda temporary: save_file(tensors, temporary, metadata=meta))


def _replace(path: Path, write) -> None:
    """Written beside, in a folder of its own (safetensors has temporary files too), and put in place when it is whole."""
    sweep(path)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    staging.mkdir()
    lock = FileLock(staging / LOCK, timeout=0)
    try:
        lock.acquire()
        temporary = staging / path.name
        write(temporary)
        settle(temporary)
        os.replace(temporary, path)
    finally:
        lock.release()
        shutil.rmtree(staging, ignore_errors=True)


def settle(file: Path) -> None:
    """See a file onto the disk, for everybody to read that the process lets: safetensors' own files are for their owner alone."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    os.chmod(file, 0o666 & ~_umask())


def sweep(path: Path) -> None:
    """Remove what writers of this file (or folder) left when they were killed; one that is still at work holds its lock."""
    for staging in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        with suppress(OSError, Timeout):
            if (staging / LOCK).exists():
                with FileLock(staging / LOCK, timeout=0):
                    shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a safetensors file this package wrote.

    Raises:
        StorageError: missing, truncated or foreign.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("comeba_ext")
            if metadata is None:
                raise StorageError(f"{path} was not written by comeba_ext")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata)  # noqa: SIM118  (not a mapping)
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} is truncated or not a safetensors file ({error})") from None


def digest_of(file: str | Path) -> str:
    """Sixteen digits that tell what a file holds from whatever else it may come to hold.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    found = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while part := opened.read(1 << 20):
                found.update(part)
    except OSError as error:
        raise StorageError(f"{file}: {str(error.strerror).lower()}") from None
    return found.hexdigest()[:16]


MANIFEST = "comeba_edits.json"
CARD = "README.md"  # beside it, which says the same to people
# That can be read; in 2 some edits are kept in shards, in 3 large tables in blocks, which versions that know less would leave out.
FORMATS = (1, 2, 3)
# What earlier saves left: their files, and temporary ones where a save was killed.
_DIGEST = "[0-9a-f]{32}"
_KIND_FILE = r"comeba_[a-z]+-[0-9a-f]{8}\.(safetensors|jsonl)"
_FILE = rf"{_KIND_FILE}|comeba_{KIND}-{_DIGEST}\.safetensors"
_OURS = re.compile(rf"{_FILE}|\.({_FILE}|{re.escape(MANIFEST)}|{re.escape(CARD)})\.[0-9a-f]{{8}}\.tmp")


def _block_file(digest: str) -> str:
    return f"comeba_{KIND}-{digest}.safetensors"


def file_patterns(*kinds: str) -> list[str]:
    """What the names of a save's files of some kinds look like, for :mod:`fnmatch`; large tables of other kinds among them."""
    return [f"comeba_{kind}-*" for kind in (*kinds, KIND)]


def files_of(manifest: dict) -> set[str]:
    """The names of a save's files."""
    return {*manifest["files"].values(), *map(_block_file, manifest.get("blocks", []))}


def write_folder(folder: str | Path, manifest: dict, tensors: dict[str, dict], texts: dict[str, str]) -> None:
    """Replace a folder's contents of ours in one step; other files in it are left alone.

    Args:
        manifest: JSON-serialisable; gains ``"files"``, the kind-to-name table, and ``"blocks"``, the digests of large tables' blocks.
        tensors: kind to tensors, each a safetensors file, with what is large beside it (:mod:`comeba_ext.row_blocks`).
        texts: kind to text, each a ``.jsonl`` file.

    Raises:
        StorageError: it cannot be written, or another process is writing there; the folder holds what it held.
    """
    folder = Path(folder)
    stamp = uuid.uuid4().hex[:8]
    files = {kind: f"comeba_{kind}-{stamp}.safetensors" for kind in tensors}
    files |= {kind: f"comeba_{kind}-{stamp}.jsonl" for kind in texts}
    with alone(folder):
        complete = False
        try:
            for kind, content in tensors.items():
                rest, digests, blocks = split(content)
                for digest, block in blocks.items():
                    if not (folder / _block_file(digest)).is_file():
                        write_tensors(folder / _block_file(digest), {KIND: block})
                write_tensors(folder / files[kind], rest, {KIND: digests} if digests else None)
                if digests:
                    manifest = {**manifest, "format": FORMATS[-1], "blocks": sorted({*manifest.get("blocks", []), *blocks})}
            for kind, content in texts.items():
                write_text(folder / files[kind], content)
            manifest = {**manifest, "files": files}
            write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            complete = True
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{folder}: could not be written ({error}); what was saved there before is as it was") from None
        finally:
            # Of the new files those of a save that failed, else of the old ones: whatever the manifest does not name.
            with suppress(OSError, StorageError):
                _clear(folder, files_of(manifest if complete else read_manifest(folder)))


def _clear(folder: Path, named: set[str]) -> None:
    """Remove our files that a manifest does not name."""
    for old in folder.iterdir():
        if not _OURS.fullmatch(old.name) or old.name in named:
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a folder written by :func:`write_folder`.

    Raises:
        StorageError: missing, truncated, or not ours.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(_regular(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise StorageError(f"{path} is nested too deeply to be ours") from None
    except OSError:
        raise StorageError(f"{folder} holds no edits: {MANIFEST} is missing") from None
    except ValueError as error:
        raise StorageError(f"{path} is truncated or not JSON ({error})") from None
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") in FORMATS else None
    if not isinstance(files, dict) or not isinstance(manifest.get("blocks", []), list):
        raise StorageError(f"{path} was not written by this version of comeba_ext")
    for form, names in ((_KIND_FILE, files.values()), (_DIGEST, manifest.get("blocks", []))):
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(form, name):
                raise StorageError(f"{path} names {name!r}, which is no file of ours")
    return manifest


def read_folder(folder: str | Path, *kinds: str) -> tuple[dict, list]:
    """The manifest and the files of some kinds, all of one save, whoever writes there meanwhile.

    Raises:
        StorageError: as :func:`read_manifest`; a file is missing, truncated or foreign.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            return manifest, [read_file(folder, manifest, kind) for kind in kinds]
        except StorageError:
            if files_of(read_manifest(folder)) == files_of(manifest):
                raise


def read_file(folder: str | Path, manifest: dict, kind: str) -> dict[str, torch.Tensor] | str:
    """Tensors or text of one kind."""
    folder, name = Path(folder), manifest["files"].get(kind)
    if name is None:
        raise StorageError(f"{folder} has no {kind}: it was saved for inference only, so editing cannot go on from it")
    path = folder / name
    if path.suffix == ".safetensors":

        def block(digest: str) -> torch.Tensor:
            if digest not in known:
                raise StorageError(f"{folder} has no block {digest} of its tables")
            return read_tensors(_regular(folder / _block_file(digest)))[0][KIND]

        known = set(manifest.get("blocks", []))
        tensors, metadata = read_tensors(_regular(path))
        try:
            return join(tensors, metadata.get(KIND, {}), block)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} is damaged: {error}") from None
    try:
        return _regular(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read ({error})") from None


def _regular(path: Path) -> Path:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise StorageError(f"{path} is not a regular file")
    return path


def identity(model: nn.Module, layers: list[str]) -> dict:
    """What tells one base model from another: its shape, some weights of the named layers, and a few of matrices elsewhere.

    Weights are sampled at fixed places and compared up to half-precision rounding, so that edits made on a float32 copy
    fit the bfloat16 one, but a fine-tuned sibling of the same shape is refused. Weights that PEFT adds count for nothing.
    """
    matrices = [(name, weight) for name, weight in _weights(model).items() if weight.dim() > 1]
    elsewhere = {name: _sample(weight, 4) for name, weight in matrices[:: -(-len(matrices) // 64) or 1]}
    return {**_shape(model), "layers": _of_layers(model, layers), "elsewhere": elsewhere}


def check_identity(found: dict, model: nn.Module, what: str) -> None:
    """Refuse what belongs to another model.

    Raises:
        StorageError: shapes or sampled weights differ.
    """
    try:
        layers = _of_layers(model, found["layers"])
    except AttributeError as error:
        raise StorageError(f"{what} belongs to another model: {error}") from None
    for key, value in _shape(model).items():
        if found.get(key) != value:
            raise StorageError(f"{what} belongs to another model: {key} is {found.get(key)} there and {value} here")
    weights = _weights(model)
    samples = [(name, theirs, layers[name]) for name, theirs in found["layers"].items()]
    samples += [(name, theirs, _sample(weights[name], 4)) for name, theirs in found.get("elsewhere", {}).items() if name in weights]
    for name, theirs, ours in samples:
        if theirs is None or ours is None:  # quantised weights cannot be compared
            continue
        a, b = torch.tensor(theirs), torch.tensor(ours)
        if a.shape != b.shape or ((a - b).abs() > 2**-7 * a.abs() + 1e-7).any():
            raise StorageError(f"{what} belongs to another model: the weights of {name} differ")


def _shape(model: nn.Module) -> dict:
    config = model.config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_blocks": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def _of_layers(model: nn.Module, names: Iterable[str]) -> dict[str, list[float] | None]:
    return {name: _sample(_weight(model.get_submodule(name))) for name in names}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights by the names they have without hooks and PEFT."""
    plain = lambda name: name.removeprefix("base_model.model.").replace(".base_layer", "")  # noqa: E731
    return {plain(name): weight for name, weight in model.named_parameters()}


def _weight(layer: nn.Module) -> torch.Tensor | None:
    while hasattr(layer, "base_layer"):  # hooked or LoRA-wrapped
        layer = layer.base_layer
    return getattr(layer, "weight", None)


def _sample(weight: torch.Tensor | None, count: int = 64) -> list[float] | None:
    if not isinstance(weight, torch.Tensor):  # a function, where weights are packed
        return None
    if not weight.is_floating_point() or weight.device.type == "meta" or weight.dtype.itemsize < 2:
        return None
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
    return flat[places].float().tolist()
