"""MEND: a network that turns fine-tuning's gradient into an edit (Mitchell et al. 2022, arXiv 2110.11309)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError
from comeba_ext.forward.logits import logits_at
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.trained import Learner, Trained, added, check_editor
from comeba_ext.methods.training import TrainingRows, factors_of
from comeba_ext.text.episodes import Episode
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, answer_rows, batch_inputs

CLOSE = 1e-7  # added to a spread that is divided by
HELD = 8192  # tokens of which running statistics are taken


@dataclass(frozen=True)
class MendConfig(EditConfig):
    """Settings of MEND; ``layers`` are the blocks whose MLP it writes.

    Args:
        editor: folder of a trained editor (``comeba train MEND``).
        parts: linear layers inside a block that it writes beside the MLP output projection, such as ``mlp.up_proj``.
        rank: of the networks' layers, at most half of their width.
        edit_rate: α of every layer at the start; they are learned.
        edit_weight, locality_weight: of the loss's two parts, c_edit and 1 in the paper.
    """

    editor: str | None = None
    parts: tuple[str, ...] = ()
    rank: int = 1920
    edit_rate: float = 1e-4
    edit_weight: float = 0.1
    locality_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_editor(self)
        if not isinstance(self.parts, (list, tuple)) or not all(isinstance(part, str) for part in self.parts):
            raise ConfigError(f"parts must be a list of names of layers inside a block, got {self.parts!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        check_fields(self, positive=("edit_rate", "edit_weight", "locality_weight"), counts=("rank",))


class Transform(nn.Module):
    """The network of all layers of one shape: two low-rank layers with residuals, the identity at the start, with every layer's own
    scales and offsets (section 3.2, equation 3)."""

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        rank = min(rank, width // 2)
        self.down = nn.ParameterList([nn.init.xavier_normal_(torch.empty(rank, width)) for _ in range(2)])
        self.up = nn.ParameterList([torch.zeros(width, rank) for _ in range(2)])
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.ParameterList([torch.ones(layers, width) for _ in range(2)])
        self.offset = nn.ParameterList([torch.zeros(layers, width) for _ in range(2)])
        for name in ("mean", "squares"):
            self.register_buffer(name, torch.zeros(layers, width))
        self.register_buffer("count", torch.zeros(layers))

    def forward(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """``(tokens, width)``, inputs and gradients side by side, of the layer of this number."""
        if self.count[layer] > 1:  # normalised by what was seen in training
            spread = (self.squares[layer] / (self.count[layer] - 1)).sqrt()
            z = (z - self.mean[layer]) / (spread + CLOSE)
        for n in range(2):
            inner = z @ self.down[n].mT @ self.up[n].mT
            inner = inner + self.bias if n == 0 else inner
            z = z + F.relu(self.scale[n][layer] * inner + self.offset[n][layer])
        return z

    @torch.no_grad()
    def note(self, layer: int, z: torch.Tensor) -> None:
        """Take tokens into the running mean and spread (Welford's, of a batch)."""
        if self.count[layer] >= HELD:
            return
        count = self.count[layer] + len(z)
        mean = self.mean[layer] + (z - self.mean[layer]).sum(0) / count
        self.squares[layer] += ((z - self.mean[layer]) * (z - mean)).sum(0)
        self.count[layer], self.mean[layer] = count, mean


class MendLearner(Learner):
    """Networks that rewrite a weight's gradient ``Σ g xᵀ`` factor by factor, and each layer's rate α:
    ``W ← W − α Σ g̃ x̃ᵀ`` with ``x̃, g̃`` from the network (equations 3 and 4)."""

    def __init__(self, session: Session, layers: dict[str, nn.Module]):
        super().__init__(session, layers)
        config: MendConfig = session.config
        shapes = {name: shape_of(getattr(layer, "base_layer", layer)) for name, layer in layers.items()}
        kinds = list(dict.fromkeys(shapes.values()))
        alike = {shape: [name for name in layers if shapes[name] == shape] for shape in kinds}
        self.places = {name: (kinds.index(shape), alike[shape].index(name)) for name, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.networks = nn.ModuleList([Transform(sum(shape), len(alike[shape]), config.rank) for shape in kinds])
        self.rates = nn.Parameter(torch.full((len(layers),), config.edit_rate))
        self.to(session.device)

    def changes(self, rows: list[Row], note: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What each layer's weight changes by, as factors ``x̃ (tokens, d_in)`` and ``−α g̃ (tokens, d_out)``.

        Args:
            rows: of edits that are made together; a row's gradient is that of its own loss.
            note: take what was seen into the running statistics first.
        """
        with evaluating(self.session.model), frozen(self.session.model), torch.enable_grad():
            factors, _ = factors_of(self.session, self.layers, rows, everywhere=True)
        found = {}
        for (name, (x, g)), rate in zip(factors.items(), self.rates, strict=True):
            z = torch.cat([x.float(), g.float() * len(rows)], 1)
            z = z[(g != 0).any(1)]  # tokens that the loss does not depend on say nothing
            kind, number = self.places[name]
            if note:
                self.networks[kind].note(number, z)
            x, g = self.networks[kind](number, z).split([x.shape[1], g.shape[1]], 1)
            found[name] = x, -rate * g
        return found

    def forward(self, episodes: list[Episode]) -> tuple[torch.Tensor, dict[str, float]]:
        edit, far, _ = self._run(episodes, note=self.training)
        config = self.session.config
        loss = config.edit_weight * edit + config.locality_weight * far
        return loss, {"loss": loss.item(), "edit": edit.item(), "locality": far.item()}

    @torch.no_grad()
    def measure(self, episode: Episode) -> dict[str, float]:
        edit, far, shares = self._run([episode], note=False)
        config = self.session.config
        return {"loss": (config.edit_weight * edit + config.locality_weight * far).item(), **shares}

    def _run(self, episodes: list[Episode], note: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Mean NLL of edits and their other wordings, KL of unrelated prompts, and what share of tokens is right or as before."""
        session = self.session
        tokenize = lambda asked: answer_rows(session.tokenizer, asked)  # noqa: E731
        own = tokenize([(e.request.text, e.request.target_new) for e in episodes])
        reworded = tokenize([(e.wording, e.request.target_new) for e in episodes])
        apart = tokenize([(prompt, answer or ".") for prompt, answer in (e.unrelated for e in episodes)])
        with torch.no_grad(), evaluating(session.model):
            before = self._logits(apart)
        changes = self.changes(own, note)
        with evaluating(session.model), frozen(session.model), added(self.layers, changes):
            after, *asked = self._logits(apart), self._logits(own), self._logits(reworded)
        targets = [[torch.tensor(row.target, device=session.device) for row in rows] for rows in (own, reworded)]
        nll = [F.cross_entropy(logits, target) for each, theirs in zip(asked, targets) for logits, target in zip(each, theirs)]
        kl = [F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True) for a, b in zip(after, before)]
        share = lambda pairs: sum((a.argmax(-1) == b).float().mean().item() for a, b in pairs) / len(episodes)  # noqa: E731
        shares = {
            "reliability": share(zip(asked[0], targets[0])),
            "generality": share(zip(asked[1], targets[1])),
            "locality": share((a, b.argmax(-1)) for a, b in zip(after, before)),
        }
        return sum(nll) / len(nll), sum(kl) / len(kl), shares

    def _logits(self, rows: list[Row]) -> list[torch.Tensor]:
        inputs = batch_inputs(rows, self.session.pad_token, self.session.device)
        return [own.float() for own in logits_at(self.session.model, inputs, [row.predicts for row in rows])]

    def groups(self) -> list[dict]:
        """The rates learn with a rate of their own, as published."""
        return [{"params": list(self.networks.parameters())}, {"params": [self.rates], "lr": self.session.config.edit_rate}]


class MEND(Trained):
    """Writes the MLP weights of some blocks by a network that was trained to rewrite fine-tuning's gradient: its factors at every
    token, normalised by what training saw, through two low-rank layers with residuals, shared by layers of one shape, and a learned
    rate a layer. The edits of a batch are summed. Trained on ``edit_weight`` times the NLL of the edit and of another wording, plus the
    KL of an unrelated prompt, after one batch of edits into the unedited model; nothing prepares it for a second one.

    Published: rates of 1e-6 for the networks, a hundred thousand steps and more, running statistics over all layers of a shape (here
    each layer has its own). ``rank`` is half of the width at most.
    """

    name = "MEND"
    config_class = MendConfig
    learner = MendLearner

    @classmethod
    def targets(cls, config: MendConfig, architecture) -> list[str]:
        blocks = [(block, f"{architecture.blocks}.{block}") for block in config.layers]
        return [name for n, prefix in blocks for name in (*(f"{prefix}.{part}" for part in config.parts), architecture.projection_name(n))]

    @classmethod
    def check(cls, config: MendConfig, model: nn.Module, architecture) -> None:
        super().check(config, model, architecture)
        known = dict(model.named_modules())
        for name in cls.targets(config, architecture):
            if name not in known:
                raise ConfigError(f"parts: the model has no {name!r}; see model.named_modules()")

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        learner = self.needed()
        rows = answer_rows(self.session.tokenizer, [(request.text, request.target_new) for request in batch])
        with phases("keys"), torch.no_grad():
            changes = learner.changes(rows)
        with phases("update"), torch.no_grad():
            for name, (x, g) in changes.items():
                master = self.masters[name]
                self.write(name, master + (g.mT @ x).to(master))
            losses = TrainingRows(self.session, rows, self.config.layers[0]).losses()
        on_progress(len(batch), sum(losses) / len(losses))
        return losses, [1] * len(batch)
