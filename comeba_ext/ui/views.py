"""What the page shows, as HTML: everything that users or the model have written is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from comeba_ext.data import place_of
from comeba_ext.editing.report import EditReport
from comeba_ext.evaluation import Metrics
from comeba_ext.evaluation.scopes import LayerScores, TextScope
from comeba_ext.evaluation.ways import WAYS
from comeba_ext.evaluation.written import is_written
from comeba_ext.text.request import SLOT, EditRequest
from comeba_ext.ui.desk import Answer, Batches, Edited, Tried, Working

SHOWN = ("_written", "")  # ways of scoring, the one that is believed first in front
LOST = 50  # edits that do not hold are named, so many
KINDS = {"prompt": "The prompt", "rewording": "Rewordings, to follow the edit", "neighbour": "Neighbours, to stay as they are"}

WHERE = (
    "<h3>Where the edits are used</h3><p>Every token's score ({score}) in every edited layer. Marked tokens reach the threshold and get "
    "the edited output; all others get the original one, bit for bit.</p>"
)
MEANINGS = {
    "reliability": "the edited prompts are answered as they were edited",
    "generality": "so are other wordings of them",
    "locality": "other prompts are answered as the unedited model does",
}


def working(step: Working) -> str:
    """A bar, and the losses so far."""
    loss = f" · loss {step.losses[-1]:.3f}" if step.losses else ""
    return f'<div class="working" role="status"><div>{escape(step.what)} …{loss}</div>{_bar(step.share)}{_curve(step.losses)}</div>'


def edited(done: Edited) -> str:
    """Whether the edit took, then the answers before and after it."""
    request, report = done.request, done.report
    name, target = f"<b>{escape(request.subject)}</b>", f"<b>{escape(request.target_new)}</b>"
    seconds = sum(report.seconds.values())
    if report.declined:
        return _say("no", f"Declined, nothing was changed: {escape(report.declined[0]['reason'])}.")
    if not all(report.answered):
        what = f"The edit of {name} is in, but it does not hold: the model does not answer {target} behind the prompt."
        hint = "Undo takes it back; other settings may do better (comeba tune finds some)."
        return _say("no", f"{what} {hint}") + answers(done.answers, request.target_new)
    loss = f", loss {report.losses[0]:.3f}" if report.losses else ""
    more = " It takes the place of an earlier edit of the same fact." if report.superseded else ""
    if report.moved:
        more += " Edited at the prompt's end and for that prompt only, as the subject's own place says nothing."
    if report.rewritten:
        more += f" Found anew with it, being of the same subject: {len(report.rewritten)} earlier."
    return _say("yes", f"Edited: {name} → {target} ({seconds:.1f} s{loss}).{more}") + answers(done.answers, request.target_new)


def answers(found: list[Answer], target: str) -> str:
    """What the model writes, before and after, in three groups."""
    parts = []
    for kind, head in KINDS.items():
        rows = [own for own in found if own.kind == kind]
        if rows:
            body = "".join(_answer_row(own, target) for own in rows)
            parts.append(f"<tbody><tr><th colspan=3>{head}</th></tr>{body}</tbody>")
    return f'<table class="answers"><thead><tr><td></td><td>before</td><td>after</td></tr></thead>{"".join(parts)}</table>'


def _answer_row(own: Answer, target: str) -> str:
    good = (own.before == own.after) if own.kind == "neighbour" else is_written(own.after, [target])
    kept = " kept" if own.before == own.after else ""
    mark = f'<span class="{"yes" if good else "no"}">{"✓" if good else "✗"}</span> '
    cells = [("before", _text(own.before)), (f"after{kept}", mark + _text(own.after))]
    return f"<tr><td>{escape(own.prompt)}</td>" + "".join(f'<td class="{name}">{text}</td>' for name, text in cells) + "</tr>"


def tried(found: Tried) -> str:
    """A text with its two continuations side by side."""
    same = "<p>Both write the same.</p>" if found.unedited == found.edited else ""
    cells = (("unedited model", found.unedited), ("edited model", found.edited))
    body = "".join(f"<div><h4>{name}</h4><p><i>{escape(found.text)}</i> {_text(text)}</p></div>" for name, text in cells)
    return f'<div class="beside">{body}</div>{same}'


# -- scope --------------------------------------------------------------------------------------------------------


def scopes(found: Iterable[tuple[str, TextScope | None]], opened: int = 1) -> str:
    """For which tokens the edited layers are used, text by text; the first ``opened`` are unfolded."""
    parts = []
    for number, (text, scope) in enumerate(found):
        if scope is None:
            return "<p>No score decides for which tokens this method's edits are used.</p>"
        score = next(iter(scope.layers.values())).score
        parts.append(
            f"<details{' open' if number < opened else ''}><summary>{escape(text)} <small>{_inside(scope)}</small></summary>"
            f"{''.join(_layer(name, scope.tokens, own) for name, own in scope.layers.items())}</details>"
        )
    return f'<div class="scope">{WHERE.format(score=escape(score))}{"".join(parts)}</div>'


def _inside(scope: TextScope) -> str:
    """Which tokens some layer takes the edits for."""
    places = sorted({n for own in scope.layers.values() for n in own.in_scope[0].nonzero()[:, 0].tolist()})
    names = ", ".join(escape(_word(scope.tokens, n)) for n in places)
    return f"in scope: {names}" if places else "no token in scope: the unedited output"


def _word(tokens: list[str], n: int) -> str:
    """A token with those that its word begins with, where tokens show where words begin."""
    start = n
    if any(own[:1].isspace() for own in tokens):
        while start and not tokens[start][:1].isspace() and not tokens[start - 1].startswith("<"):  # a special token
            start -= 1
    return "".join(tokens[start : n + 1]).strip()


def _layer(name: str, tokens: list[str], own: LayerScores) -> str:
    """A layer's row of tokens, each with its score."""
    scores, inside = own.scores[0].tolist(), own.in_scope[0].tolist()
    chips = "".join(
        f'<span class="token{" in" if here else ""}"><span>{escape(token.strip()) or "␣"}</span><small>{_number(score)}</small></span>'
        for token, score, here in zip(tokens, scores, inside, strict=True)
    )
    head = f'<div title="{escape(name)}">{_block(name)}<small>threshold {_number(own.alpha)}</small></div>'
    return f'<div class="layer">{head}<div>{chips}</div></div>'


def _block(name: str) -> str:
    found = re.search(r"\.(\d+)\.", name)
    return f"block {found[1]}" if found else escape(name)


def _number(value: float) -> str:
    return "∞" if value == float("inf") else "–" if value != value else f"{value:.2f}"


# -- edits --------------------------------------------------------------------------------------------------------


def edit_label(request: EditRequest) -> str:
    """How a list names an edit."""
    return f"{request.text} → {request.target_new}"


def retention(metrics: Metrics) -> str:
    """Every metric in every way it was scored, then the edits that no longer hold."""
    names = [name for name in ("reliability", "generality", "locality") if metrics.get(f"{name}_prompts")]
    head = "".join(f"<td>{escape(WAYS[suffix][0])}</td>" for suffix in SHOWN)
    rows = "".join(f"<tr><td>{name}</td>{''.join(_score(metrics, name + suffix) for suffix in SHOWN)}</tr>" for name in names)
    lost = [row for row in metrics.per_record if row["reliability_written"] != 1]
    says = "".join(f"<li>{_lost(row)}</li>" for row in lost[:LOST])
    more = f"<li>… and {len(lost) - LOST} more</li>" if len(lost) > LOST else ""
    meanings = "".join(f"<li><b>{name}</b>: {meaning}</li>" for name, meaning in MEANINGS.items() if name in names)
    meanings += "".join(f"<li><b>{escape(way)}</b>: {escape(meaning)}</li>" for way, meaning in (WAYS[suffix] for suffix in SHOWN))
    return (
        _say("no" if lost else "yes", f"Edits that hold: {metrics.records - len(lost)} of {metrics.records}.")
        + f'<table class="answers scores"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
        + (f"<details open><summary>Edits that do not hold</summary><ul>{says}{more}</ul></details>" if lost else "")
        + f"<details><summary>What the scores mean</summary><ul>{meanings}</ul></details>"
    )


def _lost(row: dict) -> str:
    """An edit that does not hold any more, and what is written instead."""
    prompt, answer = row["prompt"].replace(SLOT, row["subject"], 1), next(own for own in row["answers"] if own["metric"] == "reliability")
    return f"{escape(prompt)} → {escape(row['target_new'])}; it writes: {_text(answer['written'])}"


def _score(metrics: Metrics, key: str) -> str:
    value, interval = metrics.get(key), metrics.get(f"{key}_interval")
    if value is None:
        return "<td>–</td>"
    return f"<td>{value:.3f} <small>[{interval[0]:.3f}, {interval[1]:.3f}]</small></td>"


def batches(done: Batches) -> str:
    """Batch by batch: how many edits, how many are answered, the loss."""
    edits = sum(len(own.request_ids) for own in done.reports)
    took = sum(sum(own.answered) for own in done.reports)
    declined = [entry for own in done.reports for entry in own.declined]
    rows = "".join(_batch_row(own) for own in done.reports)
    says = "".join(f"<li>{escape(own['prompt'])}: {escape(own['reason'])}</li>" for own in declined)
    head = "".join(f"<td>{name}</td>" for name in ("step", "edits", "answered", "loss", "seconds"))
    return (
        f"<div><p>{edits} of {done.total} edited, {took} answered right after their batch.</p>"
        + (f"<p>Declined:</p><ul>{says}</ul>" if declined else "")
        + f'<table class="answers scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _batch_row(own: EditReport) -> str:
    loss = f"{sum(own.losses) / len(own.losses):.3f}" if own.losses else "–"
    cells = (own.step, len(own.request_ids), sum(own.answered), loss, f"{sum(own.seconds.values()):.1f}")
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def file_read(name: str, read: int, used: list[EditRequest], skipped: list[dict]) -> str:
    """What a file of records holds."""
    says = "".join(f"<li>{place_of(own)}: {escape(own['reason'])}</li>" for own in skipped[:10])
    more = f"<li>… and {len(skipped) - 10} more</li>" if len(skipped) > 10 else ""
    first = "".join(f"<li>{escape(edit_label(own))}</li>" for own in used[:3])
    left = f"<details><summary>Left out: {len(skipped)}</summary><ul>{says}{more}</ul></details>" if skipped else ""
    return (
        f"<p><b>{escape(name)}</b>: records read: {read}; edits that can be made: {len(used)}. The first of them:</p><ul>{first}</ul>{left}"
    )


def kept(folder: Path | None) -> str:
    """Where edits go without being asked."""
    if folder is None:
        return "<p>Edits are gone when the page is closed in the terminal, unless they are saved.</p>"
    return f"<p>Every change is saved to <code>{escape(str(folder))}</code> at once; a copy can be saved elsewhere.</p>"


def saved(folder: Path, model: str) -> str:
    """Where the edits are, and how to use them."""
    python = f"load_edits(model, {str(folder)!r}, tokenizer=tokenizer)"
    return (
        f"<p>Saved to <code>{escape(str(folder))}</code>. To use them: <code>{escape(python)}</code>, or "
        f"<code>comeba generate {escape(model)} --edits {escape(str(folder))} …</code></p>"
    )


def unchanged() -> str:
    return "<p>Nothing was changed.</p>"


def sentence(text: str) -> str:
    """A message as a sentence, for places that take HTML."""
    text = text.strip()
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    return escape(text, quote=False)


# -- parts --------------------------------------------------------------------------------------------------------


def _say(kind: str, text: str) -> str:
    return f'<p class="say {kind}" role="status">{text}</p>'


def _text(text: str) -> str:
    return escape(text) if text.strip() else "<i>nothing</i>"


def _bar(share: float) -> str:
    return f'<div class="bar"><div style="width:{100 * min(max(share, 0.0), 1.0):.0f}%"></div></div>'


def _curve(losses: tuple[float, ...]) -> str:
    """The losses as a small line."""
    if len(losses) < 2:
        return ""
    top = max(losses) or 1.0
    points = " ".join(f"{200 * n / (len(losses) - 1):.1f},{38 - 36 * loss / top:.1f}" for n, loss in enumerate(losses))
    return f'<svg viewBox="0 0 200 40" class="curve" aria-label="loss"><polyline points="{points}"/></svg>'
