"""What a model can do beside its edits: perplexity on plain text, predictions that stay, lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from comeba_ext.errors import ComebaError
from comeba_ext.evaluation.base import unedited
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.logits import room_for_logits
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import attachments
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.text.encoding import input_device, micro_batches, pad, pad_id
from comeba_ext.text.request import EditRequest

IN_PROMPT = (
    "these edits stand in the prompt, where a likelihood of plain text never meets them: measured so, it would be the unedited model's"
)
TEXT_TOKENS = 10_000  # of unrelated text: a share of 0.005 is then known to 0.0007
MAX_NLL = 700.0  # whose exponential is still a float64


@dataclass
class Reading:
    """What a model says to plain texts.

    Attributes:
        perplexity: ``exp(mean NLL of a token given those before it)`` over all tokens but the first of every piece; at most
            e⁷⁰⁰, which a destroyed model reaches.
        next_tokens: the greedy next token at every position, flat int64 in a fixed order: two models' readings compare.
    """

    perplexity: float
    next_tokens: torch.Tensor


@torch.no_grad()
def read_text(
    model: torch.nn.Module,
    tokenizer,
    texts: Iterable[str],
    *,
    tokens: int | None = None,
    max_tokens: int = 4096,
    progress: bool = False,
) -> Reading:
    """Run a model over plain texts, once.

    Args:
        texts: those longer than the model's context are cut into pieces of that length.
        tokens: read that many at most, whole texts from the first on and the last one cut; default all.
        max_tokens: padded tokens in one forward pass.
        progress: show a progress bar.

    Raises:
        ComebaError: no text has two tokens; or the model's edits stand in the prompt, and would before one of these texts.
    """
    texts = list(texts)
    if (rewrite := prompt_rewriter(model)) is not None and any(rewrite(text) != text for text in texts):
        raise ComebaError(IN_PROMPT)
    limit = context_length(model) or 512
    rows, left = [], math.inf if tokens is None else tokens
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        ids = ids[: int(min(left, len(ids)))]
        rows += [ids[i : i + limit] for i in range(0, len(ids), limit)]
        left -= len(ids)
        if left <= 0:
            break
    device = input_device(model)
    total, count, found = 0.0, 0, []
    with evaluating(model), tqdm(total=sum(map(len, rows)), unit="token", desc="text", disable=not progress) as bar:
        for group in micro_batches([len(row) for row in rows], room_for_logits(model, max_tokens)):
            ids, mask = pad([rows[i] for i in group], pad_id(tokenizer), device=device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            real = mask[:, 1:].bool()
            wide = torch.promote_types(logits.dtype, torch.float32)
            nll = F.cross_entropy(logits[:, :-1][real].to(wide), ids[:, 1:][real], reduction="sum")
            total, count = total + nll.item(), count + int(real.sum())
            found.append(logits.argmax(-1)[mask.bool()].cpu())
            bar.update(int(mask.sum()))
    if not count:
        raise ComebaError("no text of two tokens or more to measure perplexity on")
    nll = total / count
    return Reading(math.exp(nll if nll < MAX_NLL else MAX_NLL), torch.cat(found))  # also where it is no number


class UnrelatedText:
    """What edits did to plain text that names none of their subjects; what is said of those may change.

    Args:
        texts: plain texts, in order.
        tokens: how many of theirs are read at most.
        progress: show a progress bar.
    """

    def __init__(self, texts: Sequence[str], tokens: int = TEXT_TOKENS, progress: bool = False):
        self.texts, self.tokens, self.progress = texts, tokens, progress
        self.before: dict[tuple[str, ...], Reading] = {}  # by texts, what the unedited model says

    def __call__(self, model: torch.nn.Module, tokenizer, requests: Iterable[EditRequest]) -> dict:
        """``texts`` and ``text_tokens`` read, ``perplexity`` and ``perplexity_before``, and ``text_changed``, the share of positions at
        which the next token would be another.

        Raises:
            ComebaError: every text names an edited subject.
        """
        chosen = self._chosen(requests)
        after = self._read(model, tokenizer, chosen)
        self._know(model, tokenizer, chosen)
        before = self.before[chosen]
        return {
            "texts": len(chosen),
            "text_tokens": len(after.next_tokens),
            "perplexity": after.perplexity,
            "perplexity_before": before.perplexity,
            "text_changed": (after.next_tokens != before.next_tokens).float().mean().item(),
        }

    def read_base(self, model: torch.nn.Module, tokenizer, requests: Iterable[EditRequest]) -> None:
        """Let the unedited model read them, where the edited one holds no edits that could be switched off: then before it is called.

        Raises:
            ComebaError: every text names an edited subject.
        """
        self._know(model, tokenizer, self._chosen(requests))

    def _chosen(self, requests: Iterable[EditRequest]) -> tuple[str, ...]:
        subjects = {request.subject for request in requests}
        chosen = tuple(text for text in self.texts if not any(subject in text for subject in subjects))
        if not chosen:
            raise ComebaError(f"each of the {len(self.texts)} texts names an edited subject; more texts are needed")
        return chosen

    def _know(self, model: torch.nn.Module, tokenizer, chosen: tuple[str, ...]) -> None:
        if chosen not in self.before:
            with unedited(model):
                self.before[chosen] = self._read(model, tokenizer, chosen)

    def _read(self, model: torch.nn.Module, tokenizer, chosen: tuple[str, ...]) -> Reading:
        return read_text(model, tokenizer, chosen, tokens=self.tokens, progress=self.progress)


def perplexity(model: torch.nn.Module, tokenizer, texts: Iterable[str], **options) -> float:
    """:func:`read_text`'s perplexity."""
    return read_text(model, tokenizer, texts, **options).perplexity


def check_harness(model: torch.nn.Module) -> None:
    """Raises a ComebaError where the harness would measure a model without its edits."""
    if prompt_rewriter(model) is not None:
        raise ComebaError(IN_PROMPT)


def harness(model: torch.nn.Module, tokenizer, tasks: list[str], folder: str | Path | None = None, **options) -> dict:
    """Results of EleutherAI's lm-evaluation-harness on the model as it stands, edits included.

    Args:
        tasks: the harness's task names; it loads their data itself.
        folder: of task files of one's own (YAML), whose tasks may be named too.
        options: passed to ``lm_eval.simple_evaluate`` (``limit``, ``num_fewshot``, ``batch_size`` …). The batch size is 1
            whatever is asked for where padding would be scored (edits with the scope zscore).

    Returns:
        task to its metrics, e.g. ``{"hellaswag": {"acc,none": 0.4, "acc_stderr,none": 0.005, …}}``.

    Raises:
        ComebaError: the harness is not installed, or knows no such task; or the model's edits stand in the prompt.
    """
    check_harness(model)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ComebaError("lm-evaluation-harness is not installed: pip install 'comeba_ext[harness]'") from None
    unknown_to = lambda manager: [task for task in tasks if not manager.match_tasks([task])]  # noqa: E731
    own = None if folder is None else str(folder)
    # A folder alone first: the harness's own tasks are thousands of files, which take it seconds to list.
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if own is not None and unknown_to(manager):
        manager = TaskManager(include_path=own)
    if unknown := unknown_to(manager):
        raise ComebaError(f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}; see 'lm_eval --tasks list'")
    # The harness pads its batches without a mask, which a score relative to the sequence (zscore) would count.
    relative = any(layer.reads_sequence for layer in attachments(model).values())
    asked = options.pop("batch_size", 8)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1 if relative else asked)
        return lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, **options)["results"]
