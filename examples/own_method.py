"""A method of your own: how facts get into a model is one class.

    python examples/own_method.py

This one adds, at the prompt's last token, a fixed vector to a late block's MLP output for every fact: the gradient of the new object's
log-probability, once. It is no good method, and all there is to write of one.
"""

import torch

from comeba_ext import Editor, evaluate, register_method, testbed
from comeba_ext.layers.attachment import Attachment
from comeba_ext.methods import Snapshots
from comeba_ext.methods.row_passes import TrainingRows, inputs_of
from comeba_ext.text.rows import answer_rows


class Steered(Attachment):
    """A layer that adds a vector where its input is one that was edited."""

    precise = ("keys", "vectors")  # stay float32 when the model's dtype changes

    def __init__(self, base):
        super().__init__(base)
        for name, width in (("keys", base.in_features), ("vectors", base.out_features)):
            self.register_buffer(name, torch.zeros(0, width))
        self.trained = None

    def forward(self, x):
        output, vectors = self.base_layer(x), self.vectors if self.trained is None else self.trained
        if self.mode == "off" or not len(self.keys):
            return output
        same = torch.cdist(x.float(), self.keys) < 1e-2  # (batch, seq, edits)
        return output + (same.float() @ vectors).to(output.dtype)


@register_method
class OneStep(Snapshots):
    name = "one gradient step"  # as in Editor(method="one gradient step"), --method "one gradient step"

    @classmethod
    def build(cls, model, config, architecture):
        return {name: Steered(model.get_submodule(name)) for name in cls.targets(config, architecture)[-1:]}

    def apply(self, batch, phases, on_progress):
        ((_, layer),) = self.attachments.items()
        rows = answer_rows(self.session.tokenizer, [(request.text, request.target_new) for request in batch])
        keys = [x[row.predicts.start] for x, row in zip(inputs_of(self.session, layer, rows), rows, strict=True)]
        layer.keys = torch.cat([layer.keys, torch.stack(keys)])
        layer.vectors = torch.cat([layer.vectors, torch.zeros(len(batch), layer.vectors.shape[1])])
        layer.trained = layer.vectors.clone().requires_grad_(True)
        losses = TrainingRows(self.session, rows, self.config.layers[-1]).losses(backward=True)
        layer.vectors, layer.trained = layer.vectors - 30 * torch.nn.functional.normalize(layer.trained.grad, dim=1), None
        return losses, [1] * len(batch)


def main(edits: int = 20) -> dict:
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, method="one gradient step")
    facts = testbed.facts()[:edits]
    for _ in editor.edit_all(facts, batch_size=10, progress=False):
        pass
    found = evaluate(model, tokenizer, facts)
    return {name: found[name] for name in ("reliability", "generality", "locality")}


if __name__ == "__main__":
    print(main())
