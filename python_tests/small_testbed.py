"""An embedded model of another shape, of two steps of training: how to make one, for the tests that take one."""

from pathlib import Path

from comeba_ext import Editor, testbed
from comeba_ext.testbed import build_facts, train

SMALL_SHAPE = ("--width", "64", "--mlp", "96", "--vocabulary", "600")


def two_steps(folder: Path, facts) -> list[str]:
    """How to train on some facts for two steps, but for where to and the shape; writes what that reads into a folder."""
    (folder / "texts.csv").write_text("text\n" + "The town lies on a river and has a market. Many people go there.\n" * 20)
    build_facts.write(facts, folder / "facts.json")
    return ["--text", str(folder / "texts.csv"), "--facts", str(folder / "facts.json"), "--steps", "2", "--batch-size", "4"]


def make(folder: Path) -> tuple[Path, Path]:
    """One of a tenth of the facts, and its covariance."""
    model, covariance = folder / "model", folder / "covariance.safetensors"
    train.main([*two_steps(folder, testbed.all_facts()[::10]), "--out", str(model), *SMALL_SHAPE])
    Editor(*testbed.load(model)).collect_covariance(testbed.texts(folder=model), tokens=3000, path=covariance, progress=False)
    return model, covariance
