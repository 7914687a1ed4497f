"""The opponent: consecutive batch editing written plainly from the paper, one request at a time and nothing reused.

Per request, every context prefix goes through every layer at each optimiser step, with logits at every position, and
once more a log-probability at every position for the loss, as the published procedure does. Keys and current hidden
states come from one full forward pass a text and edited layer; each layer and batch costs a dense float64 solve.
It serves as the baseline of ``bench_editing.py`` in the same run, and as the oracle of the equality tests. It shares
the tokenisation (``rows``) and the hook layers with the product, so that both edit the same model with the same texts.
"""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.partial import hidden_of, with_hidden
from comeba_ext.layers import hooked_linear
from comeba_ext.text.encoding import input_device, pad_id
from comeba_ext.text.request import as_requests
from comeba_ext.text.rows import batch_inputs, essence_rows, prompt_rows, target_rows

clock = time.perf_counter  # a benchmark on a busy machine may set processor time


def target_value(model, tokenizer, config, request, prefixes, logits_twice: bool = True):
    """``v*`` of one request (paper section 3.1; DESIGN §3 step 1).

    Args:
        logits_twice: take the loss from a second application of the head to all positions, as published; without it
            the model's own logits serve both terms.

    Returns:
        ``(v* (d_model,), final loss, optimiser steps)``.
    """
    architecture = Architecture.of(model, config.blocks, config.projection)
    site = architecture.block(model, config.value_layer)
    if "post_feedforward_layernorm" in dict(site.named_children()):  # Gemma 2 and 3, OLMo 2: δ before the norm
        site = model.get_submodule(architecture.projection_name(config.value_layer))
    decoder, head = model.get_submodule(architecture.decoder), architecture.head(model)
    rows = [*target_rows(tokenizer, [request], prefixes, wordings=True), *essence_rows(tokenizer, [request])]
    inputs = batch_inputs(rows, pad_id(tokenizer), input_device(model))
    last = [row.subject_last for row in rows]
    delta = h = before = optimiser = None
    seen = {}

    def add_delta(module, args, output):
        nonlocal delta, h, optimiser
        hidden = hidden_of(output)
        if delta is None:
            h = hidden[0, last[0]].detach().clone()  # the first row has the empty prefix
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            delta = torch.zeros_like(h, requires_grad=True)
            rate = config.lr * (h.norm().item() / len(h) ** 0.5 if config.lr_unit == "hidden_rms" else 1.0)
            optimiser = torch.optim.Adam([delta], lr=rate)
        hidden = hidden.clone()
        for n, position in enumerate(last):
            hidden[n, position] += delta.to(hidden.dtype)
        return with_hidden(output, hidden)

    handles = [
        site.register_forward_hook(add_delta),
        decoder.register_forward_hook(lambda module, args, output: seen.__setitem__("out", output[0])),
    ]
    trained = {p: p.requires_grad for p in model.parameters()}
    steps = 0
    try:
        for p in trained:
            p.requires_grad_(False)
        for step in range(config.steps):
            logits = model(**inputs, use_cache=False).logits
            wide = torch.promote_types(logits.dtype, torch.float32)
            log_p = F.log_softmax(head(seen["out"]) if logits_twice else logits, dim=-1, dtype=wide)
            nll = 0.0
            for n, row in enumerate(rows[:-1]):
                token = [log_p[n, p, t] for p, t in zip(row.predicts, row.target, strict=True)]
                nll = nll - sum(token) / len(token) / (len(rows) - 1)
            now = F.log_softmax(logits[-1, last[-1]], dim=-1, dtype=wide)
            before = now.detach() if before is None else before
            kl = (now.exp() * (now - before)).sum()
            loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / h.norm() ** 2
            if loss.item() < config.early_stop or step == config.steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
            with torch.no_grad():
                bound = config.clamp * h.norm()
                if delta.norm() > bound:
                    delta.mul_(bound / delta.norm())
    finally:
        for p, flag in trained.items():
            p.requires_grad_(flag)
        for handle in handles:
            handle.remove()
    return (h + delta).detach(), loss.item(), steps


class PlainEditor:
    """The whole step by the plain procedure.

    Args:
        covariance: layer name to ``C0``, ``(d_in, d_in)``.
        prefixes: the empty one first.
    """

    def __init__(self, model, tokenizer, config, covariance, prefixes):
        self.model, self.tokenizer, self.config, self.prefixes = model, tokenizer, config, prefixes
        self.architecture = Architecture.of(model, config.blocks, config.projection)
        names = [self.architecture.projection_name(n) for n in config.layers]
        self.layers = hooked_linear.install(model, names, self.architecture.decoder, config.scope, config.alpha)
        self.c0 = {name: covariance[name].double() for name in names}
        self.memory = {name: config.lam_of(len(c0)) * c0 for name, c0 in self.c0.items()}
        if config.scope == "nearest":
            for name, layer in self.layers.items():
                layer.score.fit(self.c0[name])
        self.seconds = dict.fromkeys(("values", "keys", "update", "calibrate"), 0.0)

    def edit(self, requests, target_values=None):
        """One consecutive batch."""
        requests = as_requests(requests)
        with self._timed("values"):
            values = target_values
            if values is None:
                found = [target_value(self.model, self.tokenizer, self.config, r, self.prefixes) for r in requests]
                values = torch.stack([value for value, *_ in found])
        for layer in self.layers.values():
            layer.mode = "temporary"
        for number, (name, layer) in enumerate(self.layers.items()):
            with self._timed("keys"):
                keys, hidden, prompts = self._read(layer, requests)
            with self._timed("update"):
                residual = (values.double() - hidden) / (len(self.layers) - number)
                self.memory[name] = self.memory[name] + keys.mT @ keys
                layer.delta += (residual.mT @ torch.linalg.solve(self.memory[name], keys.mT).mT).to(layer.delta)
            layer.mode = "validated"
            with self._timed("calibrate"):
                if layer.scope == "nearest":
                    layer.score.add_keys(keys)
                if layer.scope == "reference":
                    scale = torch.trace(layer.delta.double() @ self.c0[name] @ layer.delta.double().mT)
                    if layer.score.scale > 0:
                        layer.alpha.mul_(layer.score.scale / scale)
                    layer.score.scale.copy_(scale)
                lowest = min(layer.scores(x[None]).max().item() for x in prompts)
                layer.alpha.fill_(min(layer.alpha.item(), self.config.margin * lowest))

    @torch.no_grad()
    def _read(self, layer, requests):
        """Keys ``(u, d_in)``, hidden states ``(u, d_model)`` in float64, and the layer's input for every prompt."""
        seen = {}
        block = self.architecture.block(self.model, self.config.value_layer)
        handles = [
            layer.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0])),
            block.register_forward_hook(lambda module, args, output: seen.__setitem__("h", hidden_of(output))),
        ]

        def run(row):
            self.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            return seen["x"].reshape(len(row.ids), -1), seen["h"].reshape(len(row.ids), -1)

        keys, hidden, prompts = [], [], []
        try:
            for request in requests:
                rows = prompt_rows(self.tokenizer, [request], self.prefixes)
                keys.append(sum(run(row)[0][row.subject_last].double() for row in rows) / len(rows))
                x, h = run(rows[0])
                hidden.append(h[rows[0].subject_last].double())
                prompts.append(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(keys), torch.stack(hidden), prompts

    def _timed(self, name):
        return _Timer(self.seconds, name)


class _Timer:
    def __init__(self, seconds, name):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.start = clock()

    def __exit__(self, *_):
        self.seconds[self.name] += clock() - self.start
