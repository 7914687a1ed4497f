"""``comeba doctor`` tells the truth about compiled kernels on each kind of machine."""

import pytest
import torch

from comeba_ext.doctor import examine, examine_model
from comeba_ext.kernels import build, loader
from comeba_ext.kernels.build import BuildFailure

FACTS = {"version": "2.13.0", "cuda": "13.0", "hip": None, "folder": "/nowhere/torch", "cxx11_abi": True}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Factory: a machine with these GPUs, this torch and this nvcc, and a doctor's visit to it."""

    def make(gpu: bool, cuda: str | None, nvcc: str | None):
        for name in loader.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("COMEBA_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(loader, "_states", {})
        monkeypatch.setattr(build, "_versions", {})
        monkeypatch.setattr(build, "torch_facts", lambda: FACTS | {"cuda": cuda})
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(build, "find_compiler", lambda: "/usr/bin/g++")
        path = None
        if nvcc is not None:
            path = tmp_path / "bin" / "nvcc"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
            path.chmod(0o755)
        monkeypatch.setattr(build, "find_nvcc", lambda: None if path is None else str(path))
        return examine()

    return make


def test_neither_gpu_nor_nvcc(machine):
    seen = machine(gpu=False, cuda=None, nvcc=None)
    assert seen["found"]["nvcc"] == "none" and seen["found"]["gpus"] == "none"
    assert seen["found"]["compiled operations"] == "unavailable: torch is a CPU build"
    assert not seen["problems"] and len(seen["hints"]) == 1  # what to expect, and no advice to buy anything


def test_a_gpu_without_nvcc(machine):
    seen = machine(gpu=True, cuda="13.0", nvcc=None)
    assert seen["found"]["compiled operations"] == "unavailable: no nvcc was found"
    assert not seen["problems"]  # plain torch works
    assert seen["hints"] == [
        "Hooks and key memory run in plain torch: no nvcc was found. Install the CUDA 13 toolkit, or set CUDA_HOME to it."
    ]


def test_nvcc_without_a_gpu(machine):
    seen = machine(gpu=False, cuda="13.0", nvcc="13.0")
    assert seen["found"]["compiled operations"] == "not compiled: no GPU is visible"
    assert seen["found"]["nvcc"].startswith("13.0 (")
    assert len(seen["hints"]) == 1 and not seen["problems"]


def test_both(machine, monkeypatch, tmp_path):
    seen = machine(gpu=True, cuda="13.0", nvcc="13.0")
    assert seen["found"]["compiled operations"] == "not compiled yet"
    assert seen["hints"] == ["CUDA kernels are compiled on first use, once, in about a minute."]
    assert not (tmp_path / "cache").exists()  # the doctor only looks
    library = loader._library(build.recipe(False, ("90a",)))
    library.parent.mkdir(parents=True)
    library.touch()
    assert examine()["found"]["compiled operations"] == f"cached ({library})"
    monkeypatch.setenv("COMEBA_DISABLE_EXTENSION", "1")
    seen = examine()
    assert seen["found"]["compiled operations"] == "disabled: COMEBA_DISABLE_EXTENSION is set"
    assert "COMEBA_DISABLE_EXTENSION=1" in seen["found"]["settings"]


def test_versions_that_do_not_fit(machine):
    seen = machine(gpu=True, cuda="12.8", nvcc="13.0")
    assert "nvcc is CUDA 13.0" in seen["hints"][0] and "CUDA 12 toolkit" in seen["hints"][0]


def test_a_compile_that_failed(machine, monkeypatch, tmp_path):
    machine(gpu=True, cuda="13.0", nvcc="13.0")
    log = tmp_path / "log.txt"
    log.touch()
    failure = BuildFailure("compiling ran out of memory", "Set MAX_JOBS=1 and try again", log)
    monkeypatch.setattr(loader, "_states", {"cuda": loader.State(False, "failed", failure=failure)})
    seen = examine()
    assert seen["found"]["compiled operations"] == "failed: compiling ran out of memory"
    assert "MAX_JOBS=1" in seen["hints"][0] and str(log) in seen["hints"][1]


def test_what_editing_a_model_would_mean(tiny_model, tokenizer):
    from test_cli import output

    from comeba_ext import EditConfig, Editor

    found = output("doctor", "testbed")["model"]
    assert "5 blocks" in found["model"] and "1408 → 256" in found["edited projections"]
    model = tiny_model("llama", num_hidden_layers=8)
    seen, hints = examine_model(model, tokenizer)
    editor = Editor(model, tokenizer)
    layer = next(iter(editor.layers.values()))
    assert (
        seen["score"] == EditConfig.for_model(model).scope and f"{layer.in_features} → {layer.out_features}" in seen["edited projections"]
    )
    width = layer.in_features + layer.out_features
    assert f"{8 * (width + layer.in_features) / 1e3:.0f} kB in the model" in seen["an edit takes"]  # two keys in one layer, float32
    assert f"{editor.config.lam_of(layer.in_features):g} = d_in / 32" in seen["λ"] and seen["start token"] == "no" and hints
