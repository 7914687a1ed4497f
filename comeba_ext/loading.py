"""From what a user calls a model (a folder, a hub name, a ``.gguf`` file, ``testbed``) to model and tokenizer.

A GGUF file holds quantised weights; Transformers writes them out as dense ones (extra ``gguf``). It leaves its marks of
quantisation on the model, with which Transformers refuses to save or train it; they no longer say anything and are
taken off, so that the result is a model like any other.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from comeba_ext import testbed
from comeba_ext.errors import ComebaError, StorageError
from comeba_ext.hub import is_hub_name, where_to_load
from comeba_ext.storage import MANIFEST, read_manifest

GGUF = ".gguf"


def load_model(name: str | Path, dtype: str | torch.dtype = "auto", device_map: str | None = None, *, trust_remote_code: bool = False):
    """``(model, tokenizer)``, the model in eval mode.

    Args:
        name: a local folder, a hub name, a ``.gguf`` file, or ``"testbed"`` (or a folder that its ``train.py`` made).
        dtype: of the weights; ``"auto"``: as they are stored, float32 for a ``.gguf`` file and the embedded model.
        device_map: accelerate's; ``None``: all on the CPU.
        trust_remote_code: run code that comes with the model, where it brings some; never asked for.

    Raises:
        ComebaError: it cannot be loaded; the message names the first cause.
    """
    try:
        home, is_file = testbed.folder_of(str(name)), Path(name).is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ComebaError(f"cannot load a model from {str(name)[:100]!r}: {getattr(error, 'strerror', None) or error}") from None
    if home:
        model, tokenizer = testbed.load(home)
        return (model if dtype == "auto" else model.to(dtype)), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, where = Path(name), {}
    if is_file and path.suffix.lower() != GGUF:
        raise ComebaError(f"cannot load a model from {str(name)!r}: it is a file; give the model's folder, or a {GGUF} file")
    if path.suffix.lower() == GGUF:
        if not is_file:
            raise ComebaError(f"cannot load a model from {str(name)!r}: no such file")
        _check_gguf(path)
        name, where = path.parent, {"gguf_file": path.name}
        dtype = torch.float32 if dtype == "auto" else dtype
    else:
        name = _checked(path, str(name))
    try:
        where |= {"trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **where)
    except Exception as error:  # what a damaged file makes its reader raise is of no particular kind
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            cause = "it brings code of its own; add --trust-remote-code (trust_remote_code=True) if you trust it"
        raise ComebaError(f"cannot load a model from {str(path)!r}: {cause}") from None
    if "gguf_file" in where:
        _dense(model)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ComebaError(f"{str(path)!r}: its tokenizer has {tokenizer.vocab_size} tokens and its model {rows}: not of one model")
    return model.eval(), tokenizer


def _checked(path: Path, name: str) -> str:
    """What ``from_pretrained`` is to be given for a folder or a name on the hub.

    Raises:
        ComebaError: it is no folder of a model, or a name that cannot be asked for now.
    """
    try:
        if path.is_dir():
            _check_folder(path)
            return name
        if is_hub_name(name) or "/" not in name.strip("."):
            return where_to_load(name)
        raise ComebaError("no such folder")
    except ComebaError as error:
        raise ComebaError(f"cannot load a model from {name!r}: {error}") from None


def _check_folder(path: Path) -> None:
    if (path / MANIFEST).is_file():
        found = {}
        with contextlib.suppress(StorageError):
            found = read_manifest(path).get("model", {})
        whose = f" of a {found['model_type']} model of {found['num_blocks']} blocks" if {"model_type", "num_blocks"} <= found.keys() else ""
        raise ComebaError(f"it holds edits{whose}; give the base model, and this folder with --edits (load_edits)")
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ComebaError("it holds no config.json, so it is no folder of a model")


def _check_gguf(path: Path) -> None:
    """Raises :class:`ComebaError` where the file is no GGUF or what reads it is not installed."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ComebaError(f"{path} is not a GGUF file, whatever its name says")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ComebaError(f"reading {GGUF} files needs {error.name}: pip install 'comeba_ext[gguf]'") from None


def _dense(model) -> None:
    """Take off the marks of quantisation of a model whose weights have been dequantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
