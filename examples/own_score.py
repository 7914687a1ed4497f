"""A score of your own: which tokens of a hooked layer take their edit is decided by one class.

    python examples/own_score.py

This one asks how large a token's edit is beside what the layer says anyway, ‖delta·x‖ / ‖W·x‖.
"""

import math

from torch.nn import functional as F

from comeba_ext import EditConfig, Editor, Score, evaluate, register_score, testbed


@register_score
class ShareScore(Score):
    name = "share"  # as in EditConfig(scope="share"), --scope share
    start = math.inf  # α before any edit: nothing is in scope
    margin = 0.5  # α is lowered to half of the lowest score of an edited prompt

    def scores(self, x, layer, mask=None, past=None):
        edit, plain = F.linear(x, layer.delta), layer.base_layer(x)
        return edit.norm(dim=-1).float() / plain.norm(dim=-1).float().clamp(min=1e-6), None


def main(edits: int = 20) -> dict:
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope="share"))
    editor.set_covariance(testbed.covariance(model, tokenizer))
    facts = testbed.facts()[:edits]
    for _ in editor.edit_all(facts, batch_size=10, progress=False):
        pass
    found = evaluate(model, tokenizer, facts)
    return {name: found[name] for name in ("reliability", "generality", "locality")}


if __name__ == "__main__":
    print(main())
