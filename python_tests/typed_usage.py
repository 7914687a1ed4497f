"""What a user writes, for the type checker: test_public_types.py compares what it finds here. Never run."""

from pathlib import Path

import torch
from torch import nn

from comeba_ext import (
    EditConfig,
    Editor,
    EditReport,
    EditRequest,
    HookedLinear,
    Method,
    Score,
    active_edits,
    edit_sets,
    evaluate,
    load_edits,
    push_to_hub,
    read_easyedit,
    register_method,
    register_score,
    set_edits,
)


def usage(model: nn.Module, tokenizer, texts: list[str]) -> None:
    config: EditConfig = EditConfig.for_model(model, layers=(3,))
    editor = Editor(model, tokenizer, config, method="GRACE")
    editor.collect_covariance(texts, tokens=1000, path=Path("x"))
    report: EditReport = editor.edit([EditRequest("{} is", "Ann", "tall"), {"prompt": "{} is", "subject": "Bob", "target_new": "old"}])
    reveal_type(report.answered)  # noqa: F821
    for step in editor.edit_all([], batch_size=10):
        reveal_type(step.losses)  # noqa: F821
    reveal_type(editor.target_values([]))  # noqa: F821
    reveal_type(editor.method)  # noqa: F821
    reveal_type(editor.key_memory)  # noqa: F821
    editor.retract("edit-0")
    editor.rollback(0)
    editor.save_pretrained("folder", inference_only=True)
    reveal_type(Editor.from_pretrained(model, tokenizer, "folder"))  # noqa: F821
    reveal_type(load_edits(model, "folder"))  # noqa: F821
    reveal_type(load_edits(model, "user/name", name="one", revision="main"))  # noqa: F821
    reveal_type(set_edits(model, ["one"]))  # noqa: F821
    reveal_type(active_edits(model))  # noqa: F821
    reveal_type(edit_sets(model))  # noqa: F821
    reveal_type(push_to_hub("folder", "user/name"))  # noqa: F821
    reveal_type(EditConfig.from_easyedit("x.yaml", model))  # noqa: F821
    reveal_type(read_easyedit("x.yaml").method)  # noqa: F821
    reveal_type(evaluate(model, tokenizer, []))  # noqa: F821
    layer = HookedLinear(nn.Linear(2, 2), scope="zscore", alpha=2.2)
    reveal_type(layer.scores(torch.zeros(1, 1, 2)))  # noqa: F821


@register_method
class MyMethod(Method):
    name = "mine"


@register_score
class MyScore(Score):
    name = "mine"


def wrong(model: nn.Module, tokenizer) -> None:
    Editor(model, tokenizer).edit(3)
    Editor(model, tokenizer).rollback("one")
    EditRequest(prompt="{} is", subject="Ann")
