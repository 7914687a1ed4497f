"""Shared fixtures: a small tokenizer, tiny random models of a few families, the folder of real data."""

import functools
import gc
import os
from pathlib import Path

import pytest
import small_testbed
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from comeba_ext import testbed
from comeba_ext.kernels.loader import cache_folder

SENTENCES = [
    "The mother tongue of Danielle Darrieux is French.",
    "The capital of Norway is Oslo, and the capital of Peru is Lima.",
    "Angola is located in Africa. Its people speak the language of Portugal.",
    "Marie Curie was born in Warsaw and worked in the field of physics.",
    "The Eiffel Tower stands in the city of Paris; who built it?",
    "John Lennon performs on the guitar, Toko Yasuda plays the piano.",
]


def pytest_configure(config):
    """The covariance of the embedded model is collected anew, once a run, by the code that is tested; its facts are put together once
    a process."""
    facts = testbed.facts
    known = functools.cache(facts)
    testbed.facts = lambda folder=testbed.FOLDER, **how: list((known if folder == testbed.FOLDER else facts)(folder, **how))
    if getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0":  # tests begin when all of the workers have found them
        for kept in cache_folder().glob("covariance-*"):
            kept.unlink(missing_ok=True)


def pytest_collection_finish():
    """What was imported stays: looking through all of it for garbage, again and again, took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items):
    """Tests marked ``cuda`` need a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of a few hundred tokens with ``<pad>`` (id 0) and ``<eos>`` (id 1)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


@pytest.fixture
def tiny_model(tokenizer):
    """Factory ``tiny_model(family, seed=0, **config)``: 2 layers, width 32, float32, eval mode, random weights.

    The weights are larger than usual, so that different prompts have different argmaxes. The same arguments give the
    same weights; the global generator is left alone.
    """

    def make(family: str, seed: int = 0, **overrides):
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        common = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "tie_word_embeddings": False} | ids
        if family == "llama":
            common |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            common |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
            model_class, config_class = LlamaForCausalLM, LlamaConfig
        elif family == "opt":
            common |= {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            common |= {"word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.3}
            model_class, config_class = OPTForCausalLM, OPTConfig
        else:
            common |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
            common |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
            if family == "gptj":
                common |= {"rotary_dim": 8}
            model_class, config_class = {
                "gpt2": (GPT2LMHeadModel, GPT2Config),
                "gptj": (GPTJForCausalLM, GPTJConfig),
            }[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config_class(**(common | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets: ``COMEBA_TEST_DATA``, or ``../shared/data`` from the project root."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COMEBA_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set COMEBA_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def barely_trained(tmp_path_factory):
    """Options that name an embedded model of a tenth of the facts and a fraction of the size, and its covariance: for what asks little
    of answers."""
    model, covariance = small_testbed.make(tmp_path_factory.mktemp("barely_trained"))
    return "--model", model, "--covariance", covariance


@pytest.fixture
def undrawn(request, monkeypatch):
    """Plots are files with nothing in them: to draw them takes a third of a small experiment, for nothing where nobody looks. Tests marked
    ``drawn`` do."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())


@pytest.fixture(scope="module")
def one_block():
    """The embedded model's settings name the last of its edited blocks alone, which is quicker: for tests of what lies around an edit."""
    real = testbed.load

    def load(*args, **options):
        model, tokenizer = real(*args, **options)
        settings = model.config.comeba_ext
        model.config.comeba_ext = settings | {"layers": settings["layers"][-1:]}
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testbed, "load", load)
        yield
