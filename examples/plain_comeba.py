"""COMEBA-HK top to bottom, as the paper tells it (arXiv 2403.05330, algorithm 1), with nothing but torch: a road into the package.

    python examples/plain_comeba.py

No batching, no caches, no rollback, no saving: one text at a time, dense float64 solves, the paper's z-score. What the package does
instead, and where, is said beside each step. A test compares its edits with the package's.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext import EditRequest, testbed


class PlainHook(nn.Module):
    """Step 0. A layer and its edited output, and the choice between the two, token by token (section 3.3).

    In the package: ``layers/hooked_linear.py``; the score is a module of its own (``scores/zscore.py``), computed by fused kernels.
    """

    def __init__(self, base: nn.Linear, alpha: float):
        super().__init__()
        self.base, self.alpha, self.editing = base, alpha, False
        self.delta = torch.zeros_like(base.weight)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Z-score of every token's response ‖delta·x‖ among those of its text, ``(tokens,)`` (equation 9: std with n − 1)."""
        response = (x @ self.delta.T).norm(dim=-1)
        if len(response) == 1:  # one alone stands out from nothing
            return torch.zeros_like(response)
        return (response - response.mean()) / response.std().clamp(min=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        edited = self.base(x) + x @ self.delta.T
        if self.editing:
            return edited
        inside = torch.stack([self.scores(row) >= self.alpha for row in x])
        return torch.where(inside[..., None], edited, self.base(x))


class PlainComeba:
    """Edits a Llama- or Qwen-like model (``model.model.layers[n].mlp.down_proj``)."""

    def __init__(self, model, tokenizer, layers, lam: float, alpha: float = 2.2, prefixes=("",)):
        self.model, self.tokenizer, self.layers, self.prefixes = model, tokenizer, list(layers), list(prefixes)
        self.hooks = []
        for n in self.layers:
            mlp = model.model.layers[n].mlp
            mlp.down_proj = PlainHook(mlp.down_proj, alpha)
            self.hooks.append(mlp.down_proj)
        self.lam, self.memory = lam, []

    # -- what the model sees --------------------------------------------------------------------------------------

    def run(self, text: str, stop_at: int | None = None):
        """Every edited layer's input, the value layer's hidden states, and the logits, for one text.

        In the package: ``forward/``, where many texts share a pass, and a pass ends where nothing more is read.
        """
        seen = {}
        handles = [
            hook.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0][0])) for i, hook in enumerate(self.hooks)
        ]
        handles.append(
            self.model.model.layers[self.layers[-1]].register_forward_hook(
                lambda m, args, out: seen.__setitem__("h", (out[0] if isinstance(out, tuple) else out)[0])
            )
        )
        try:
            seen["logits"] = self.model(torch.tensor([self.tokenizer(text)["input_ids"]])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def last_of(self, text: str, end: int) -> int:
        """The token that holds character ``end - 1`` of a text: the subject's last one. In the package: ``text/encoding.py``."""
        offsets = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return max(i for i, (a, b) in enumerate(offsets) if a < end and b > a)

    def collect(self, texts) -> None:
        """Step 1, once a model: C = λ·E[k kᵀ] over ordinary text. In the package: ``covariance/``, resumable, shared among processes."""
        sums, tokens = [torch.zeros(hook.base.in_features, hook.base.in_features).double() for hook in self.hooks], 0
        with torch.no_grad():
            for text in texts:
                seen = self.run(text)
                tokens += len(seen[0])
                for i, own in enumerate(sums):
                    own += (seen[i].T @ seen[i]).double()
        self.memory = [self.lam * own / tokens for own in sums]

    # -- one consecutive batch ------------------------------------------------------------------------------------

    def value(self, request: EditRequest, steps=25, lr=0.5, kl=0.0625, decay=0.5, clamp=4.0) -> torch.Tensor:
        """Step 2, section 3.1: v* = h + δ, with which the model says the new object behind the prompt under every prefix.

        In the package: ``editing/target_values.py`` (all requests at once, logits where they are read, only the blocks above).
        """
        before = request.prompt.split("{}")[0]
        rows = [(prefix + request.text + " " + request.target_new, len(prefix + before + request.subject)) for prefix in self.prefixes]
        essence = (f"{request.subject} is a", len(request.subject))
        target = len(self.tokenizer(" " + request.target_new)["input_ids"])
        place, state = [0], {}

        def add(module, args, out):
            hidden = out[0] if isinstance(out, tuple) else out
            if not state:
                state["h"] = hidden[0, place[0]].detach().clone()
                state["delta"] = torch.zeros_like(state["h"], requires_grad=True)
                state["adam"] = torch.optim.Adam([state["delta"]], lr=lr)
            hidden = hidden.clone()
            hidden[0, place[0]] += state["delta"]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = self.model.model.layers[self.layers[-1]].register_forward_hook(add)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        first = None
        for step in range(steps):
            nll = 0.0
            for text, end in rows:
                place[0] = self.last_of(text, end)
                ids = torch.tensor(self.tokenizer(text)["input_ids"])
                log_p = self.run(text)["logits"].log_softmax(-1)
                nll = nll - log_p[range(len(ids) - target - 1, len(ids) - 1), ids[-target:]].mean() / len(rows)
            place[0] = self.last_of(*essence)
            now = self.run(essence[0])["logits"][place[0]].log_softmax(-1)
            first = now.detach() if first is None else first
            h, delta = state["h"], state["delta"]
            loss = nll + kl * F.kl_div(first, now, log_target=True, reduction="sum") + decay * delta.norm() / h.norm() ** 2
            if loss < 0.05 or step == steps - 1:
                break
            state["adam"].zero_grad()
            loss.backward()
            state["adam"].step()
            with torch.no_grad():
                delta *= (clamp * h.norm() / delta.norm()).clamp(max=1)
        handle.remove()
        return (state["h"] + state["delta"]).detach()

    @torch.no_grad()
    def edit(self, requests: list[EditRequest], values: list[torch.Tensor]) -> None:
        """Steps 3 to 5 for every layer: keys, least squares, threshold.

        In the package: ``methods/comeba_hk.py``; the key memory keeps an inverse that is updated (``memory/``), and a ledger of keys
        and responses, from which single edits can be taken back.
        """
        for hook in self.hooks:
            hook.editing = True
        for number, hook in enumerate(self.hooks):
            keys, residuals, prompts = [], [], []
            for request, value in zip(requests, values, strict=True):
                before = request.prompt.split("{}")[0]
                own = []
                for prefix in self.prefixes:
                    text, end = prefix + request.text, len(prefix + before + request.subject)
                    seen, last = self.run(text), self.last_of(text, end)
                    own.append(seen[number][last].double())
                    if prefix == "":
                        residuals.append((value - seen["h"][last]).double() / (len(self.hooks) - number))  # the layers left share it
                        prompts.append(seen[number])
                keys.append(sum(own) / len(own))
            K, R = torch.stack(keys, 1), torch.stack(residuals, 1)  # (d_in, u), (d_out, u)
            self.memory[number] += K @ K.T  # C ← C + K Kᵀ: later batches are to leave these keys alone
            hook.delta += (R @ torch.linalg.solve(self.memory[number], K).T).to(hook.delta)  # delta ← delta + R Kᵀ C⁻¹
            hook.editing = False
            hook.alpha = min(hook.alpha, min(hook.scores(x).max().item() for x in prompts))  # every edited prompt is in scope


def main(edits: int = 4, texts: int = 300) -> list[tuple[str, str, str]]:
    """Prompt, object asked for, and what the model says then."""
    model, tokenizer = testbed.load()
    editor = PlainComeba(model, tokenizer, layers=range(4), lam=1_500.0)
    editor.collect(itertools.islice(testbed.texts(), texts))
    requests = [EditRequest.from_record(record) for record in testbed.facts()[:edits]]
    editor.edit(requests, [editor.value(request) for request in requests])
    with torch.no_grad():
        return [(r.text, r.target_new, tokenizer.decode(editor.run(r.text)["logits"][-1].argmax()).strip()) for r in requests]


if __name__ == "__main__":
    for prompt, wanted, said in main():
        print(f"{prompt} … wanted {wanted!r}, says {said!r}")
