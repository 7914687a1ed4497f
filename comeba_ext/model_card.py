"""The model card of a folder of edits, ``README.md``: what was edited, how, how well it took, and on which base model.

It is written by every save. One that somebody has made their own, by taking out the line ``MARK``, is left alone.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.errors import StorageError
from comeba_ext.hub import is_hub_name
from comeba_ext.memory.ledger import Ledger
from comeba_ext.methods.base import Method
from comeba_ext.storage import CARD, write_text

log = logging.getLogger(__name__)

MARK = "<!-- comeba_ext writes this file whenever the edits are saved; without this line it leaves it alone -->"
SHOWN = 20  # edits
LONGEST = 160  # characters of a text in a table
SCORES = "## Scores\n"


def card(model: nn.Module, method: type[Method], config: EditConfig, ledger: Ledger, log: list[dict]) -> str:
    """The card's text; the same for the same edits, settings and model.

    Args:
        model: with the edits; its configuration says where it came from.
        log: of the editor, for which edits the model answered.
    """
    live = [entry.request for entry in ledger.live()]
    base = base_of(model)
    count = f"{len(live)} edited fact{'s' * (len(live) != 1)}"
    about = {
        "library_name": "comeba_ext",
        **({"base_model": base["id"], "base_model_relation": "adapter"} if "id" in base else {}),
        **base["licence"],
        "tags": ["knowledge-editing", "model-editing", method.name.lower().replace(" ", "-")],
    }
    shape = model.config.get_text_config()
    licence = base["licence"].get("license")
    rows = [(request.text, request.target_new) for request in live[:SHOWN]]
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n{MARK}\n\n# {count}\n",
        f"Made with {method.name} by `comeba_ext`, for {_code(base['name'])} ({shape.model_type}, {shape.num_hidden_layers} blocks of "
        f"width {shape.hidden_size}) and no other model; the base weights are not in here, and are not changed.\n",
        _how_to_load(_literal(base.get("id", "path/to/the/base/model")), method.in_prompt or config.question_floor is not None),
        f"The base model's licence ({licence}) holds for the edited model as well.\n"
        if licence
        else "The base model's licence, which is not known here, holds for the edited model as well.\n",
        "## Edits\n",
        *([_table(("prompt", "answer"), rows)] if rows else ["None.\n"]),
        *([f"and {len(live) - SHOWN} more.\n"] if len(live) > SHOWN else []),
        SCORES,
        _answered(live, log),
        "## Settings\n",
        f"```yaml\n{yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)}```\n",
    ]
    return "\n".join(parts)


def _how_to_load(base: str, reads: bool) -> str:
    """Python that does; edits that go by the prompt need the tokenizer, for ``generate`` to read it."""
    classes = ["AutoModelForCausalLM", *(["AutoTokenizer"] if reads else [])]
    lines = [
        "from comeba_ext import load_edits",
        f"from transformers import {', '.join(classes)}",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base})",
        *([f"tokenizer = AutoTokenizer.from_pretrained({base})"] if reads else []),
        f'load_edits(model, "path/to/this/folder"{", tokenizer=tokenizer" if reads else ""})  # or its name on the hub',
    ]
    return "\n".join(["```python", *lines, "```\n"])


def write_card(folder: str | Path, text: str) -> None:
    """Write a folder's card, unless there is one of somebody's own. The edits are saved already: what goes wrong here is logged."""
    path = Path(folder) / CARD
    try:
        if not path.exists() or MARK in path.read_text(encoding="utf-8"):
            write_text(path, text)
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s could not be written (%s); the edits are saved", path, error)


def add_scores(folder: str | Path, scores: Mapping[str, object], data: str) -> None:
    """Put scores into a folder's card, in place of what an earlier call put there; the next save, of other edits, leaves them out.

    Args:
        scores: numbers by name, such as ``evaluate(...)`` returns; an interval ``<name>_interval`` goes with its name, and what is no
            fraction (counts, lists) is left out.
        data: what they were measured on, in a few words.

    Raises:
        StorageError: there is no card of ours.
    """
    path = Path(folder) / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path} cannot be read ({error}); save the edits first") from None
    start = text.find(f"\n{SCORES}")
    if MARK not in text or start < 0:
        raise StorageError(f"{path} is a card of somebody's own; write the scores there by hand")
    start, end = start + 1 + len(SCORES), text.index("\n## ", start + 2) + 1
    own = re.split(r"(?m)^Measured on ", text[start:end])[0]
    rows = []
    for name, value in scores.items():
        if isinstance(value, float) and not name.startswith("_"):
            low_high = scores.get(f"{name}_interval")
            between = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if isinstance(low_high, (list, tuple)) else ""
            rows.append((name, f"{value:.3f}{between}"))
    measured = f"Measured on {_plain(data)} (95 % interval):\n\n{_table(('score', 'value'), rows)}\n"
    write_text(path, text[:start] + own + measured + text[end:])


def base_of(model: nn.Module) -> dict:
    """``name`` of a base model, its ``id`` on the hub where it has one, and what its own card says of its ``licence``; nothing is
    looked up outside of this machine."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    path = str(getattr(inner.config, "_name_or_path", "") or "")
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", path)
    found: dict = {"name": Path(path).name or type(inner).__name__, "licence": {}}
    if cached or is_hub_name(path):
        found["id"] = found["name"] = f"{cached[1]}/{cached[2]}" if cached else path
    try:
        from huggingface_hub import metadata_load, try_to_load_from_cache

        file = Path(path) / CARD if path and Path(path).is_dir() else None
        if file is None and "id" in found:
            there = try_to_load_from_cache(found["id"], CARD)
            file = Path(there) if isinstance(there, str) else None
        about = metadata_load(file) if file is not None and file.is_file() else None
        names = ("license", "license_name", "license_link")
        found["licence"] = {name: about[name] for name in names if isinstance((about or {}).get(name), str)}
    except Exception as error:  # somebody else's card may be anything
        log.debug("no licence found of %s: %s", path, error)
    return found


def _answered(live: list, log: list[dict]) -> str:
    """How many of the live edits were answered when they were made."""
    found: dict[str, bool] = {}
    for record in log:
        if record["event"] == "edit":
            found |= dict(zip(record["request_ids"], record["answered"]))
    known = [found[request.request_id] for request in live if request.request_id in found]
    if not known:
        return "Not measured.\n"
    return f"{sum(known)} of {len(known)} were answered behind their own prompts right after they were edited.\n"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]]) + "\n"


def _plain(text: str) -> str:
    """A text in one line of Markdown, in which it means nothing but itself."""
    text = " ".join(str(text).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return re.sub(r"([\\`*_{}\[\]()#+!|~$@])", r"\\\1", html.escape(text, quote=False))


def _code(text: str) -> str:
    return f"`{_plain(text)}`" if not re.fullmatch(r"[\w./-]+", text) else f"`{text}`"


def _literal(text: str) -> str:
    return f'"{text}"'
