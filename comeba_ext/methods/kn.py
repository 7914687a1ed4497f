"""Knowledge neurons: find the few inputs of MLP output projections that a fact hangs on, and change what they write (Dai et al. 2022,
arXiv 2104.08696)."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.forward.logits import logits_at
from comeba_ext.forward.partial import evaluating, frozen, run_until
from comeba_ext.forward.past import Past, cache_name, each
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.deltas import Deltas
from comeba_ext.text.encoding import encode
from comeba_ext.text.request import EditRequest


@dataclass(frozen=True)
class KNConfig(EditConfig):
    """Settings of knowledge neurons; ``steps`` are those of the integral.

    Args:
        adaptive_threshold: share of a prompt's largest attribution that a neuron must exceed, and
        agreement: share of the prompts (one a context prefix) in which it must.
        strength: λ, how much of the two objects' embeddings is put into a neuron's column; 2 is EasyEdit's.
    """

    steps: int = 20
    adaptive_threshold: float = 0.2
    agreement: float = 0.4
    strength: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("strength",), shares=("adaptive_threshold", "agreement"))


class KN(Deltas):
    """A neuron's attribution is the integrated gradient of the old object's probability (its first token's) along the neuron's
    activation at the prompt's last token, ``a · ∫₀¹ ∂P(α·a)/∂a dα`` (equation 4). To the column of each neuron that is kept,
    ``λ·(e_new − e_old)`` is added, the word embeddings of the objects' first tokens, as EasyEdit does. (The paper, on BERT:
    ``λ₂·e_new − λ₁·e_old`` with λ₁ = 1 and λ₂ = 8, which its code takes in units of the column's norm over the embedding's.)

    The old object is the record's ``ground_truth``, or, without one, what the model says. A request for which no neuron is kept leaves
    the model as it is; the report says that it is not answered.
    """

    name = "KN"
    config_class = KNConfig

    def blank(self) -> dict:
        return {"edits": {}}  # request id to the neurons it has changed, and the two tokens

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        model = self.session.model
        for done, request in enumerate(batch, 1):
            with phases("values"), evaluating(model), frozen(model):
                neurons, old, new = self._find(request)
            with phases("update"):
                self.notes["edits"][request.request_id] = {"neurons": neurons, "old": old, "new": new}
                self._write(request.request_id, 1)
            on_progress(done, float(len(neurons)))
        return [], []

    def take_out(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._write(entry.request.request_id, -1)
            del self.notes["edits"][entry.request.request_id]

    def _write(self, request_id: str, sign: int) -> None:
        edit, words = self.notes["edits"][request_id], self.session.model.get_input_embeddings().weight
        change = sign * self.config.strength * (words[edit["new"]] - words[edit["old"]]).detach()
        for layer in dict.fromkeys(name for name, _ in edit["neurons"]):
            delta = self.masters[layer].clone()
            delta[:, [neuron for name, neuron in edit["neurons"] if name == layer]] += change.to(delta)[:, None]
            self.write(layer, delta)

    def _find(self, request: EditRequest) -> tuple[list[tuple[str, int]], int, int]:
        """The neurons of a request, and the first tokens of its old and its new object."""
        tokenizer, prompts = self.session.tokenizer, [prefix + request.text for prefix in self.session.prefixes]
        new = encode(tokenizer, request.text, request.target_new).target_ids[0]
        old = self._said(request.text) if not request.ground_truth else encode(tokenizer, request.text, request.ground_truth).target_ids[0]
        counts: dict[tuple[str, int], int] = {}
        for prompt in prompts:
            found = self.attributions(prompt, old)
            least = self.config.adaptive_threshold * max(own.max().item() for own in found.values())
            for name, own in found.items():
                for neuron in (own > max(least, 0.0)).nonzero()[:, 0].tolist():
                    counts[name, neuron] = counts.get((name, neuron), 0) + 1
        kept = [neuron for neuron, count in counts.items() if count >= self.config.agreement * len(prompts)]
        return kept, old, new

    def attributions(self, prompt: str, token: int) -> dict[str, torch.Tensor]:
        """Of every input of every layer, ``(d_in,)`` each, for the probability of a token behind a prompt.

        An activation at the last token moves nothing before it, so the tokens before run once for all layers and steps; those of several
        layers are rows of one pass, each with its own activation in its own layer.
        """
        session, steps = self.session, self.config.steps
        ids = torch.tensor([encode(session.tokenizer, prompt).ids], device=session.device)
        activations: dict[str, torch.Tensor] = {}

        def note(name: str, x: torch.Tensor) -> None:
            activations[name] = x.reshape(ids.shape[1], -1)[-1]

        taps = {layer: functools.partial(note, name) for name, layer in self.layers.items()}
        whole, cache = Past({}, 0), cache_name(session.decoder)
        run_until(session.decoder, session.blocks[-1], {"input_ids": ids, cache: whole}, taps)
        past = Past(each(whole.new, lambda states: states[:, :, :-1]), ids.shape[1] - 1)
        shares = torch.arange(1, steps + 1, device=session.device)[:, None] / steps
        names, together, found = list(self.layers), max(1, session.max_tokens // (steps * ids.shape[1])), {}
        for group in (names[start : start + together] for start in range(0, len(names), together)):
            scaled = [(shares.to(activations[name]) * activations[name]).requires_grad_(True) for name in group]  # (steps, d_in)
            rows = steps * len(group)
            with ExitStack() as stack:
                for n, name in enumerate(group):
                    put = functools.partial(_instead, scaled[n], n * steps)
                    stack.callback(self.layers[name].register_forward_pre_hook(put).remove)
                inputs = {"input_ids": ids[:, -1:].expand(rows, -1), cache: past.rows(torch.zeros(rows, dtype=torch.long))}
                logits = logits_at(session.model, inputs, [[0]] * rows)
            chances = torch.cat(logits).float().softmax(-1)[:, token]
            for name, gradient in zip(group, torch.autograd.grad(chances.sum(), scaled), strict=True):
                found[name] = (activations[name] * gradient.mean(0)).detach()
        return found

    def _said(self, prompt: str) -> int:
        """The token that the model puts behind a prompt."""
        ids = torch.tensor([encode(self.session.tokenizer, prompt).ids], device=self.session.device)
        with torch.no_grad():
            return logits_at(self.session.model, {"input_ids": ids}, [[ids.shape[1] - 1]])[0].argmax().item()


def _instead(scaled: torch.Tensor, start: int, layer: torch.nn.Module, args: tuple) -> tuple:
    """A layer's arguments with other inputs in the rows from ``start`` on."""
    x = args[0]
    return torch.cat((x[:start], scaled.reshape(-1, *x.shape[1:]), x[start + len(scaled) :])), *args[1:]
