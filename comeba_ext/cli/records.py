"""The records of a file beside one another, and beside the edits that a folder holds: which are made, and which stand in others' way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from comeba_ext.cli.terminal import Report, counted

if TYPE_CHECKING:
    from comeba_ext.editor import Editor
    from comeba_ext.text.request import EditRequest

Fact = tuple[str, str]  # text and subject


@dataclass
class Todo:
    """What is made of a file's requests.

    Attributes:
        requests: those that are edited.
        live, declined, repeated: how many are left out because they are live, or behind them in time; were declined before; or say what
            the request before them about the same fact says.
    """

    requests: list[EditRequest] = field(default_factory=list)
    live: int = 0
    declined: int = 0
    repeated: int = 0


def to_make(requests: list[EditRequest], editor: Editor, again: bool = False) -> Todo:
    """Which requests are still to be made of an editor that has made some.

    Of the requests about a fact, all are left out up to the last one whose new object is live. So a run that is gone on with makes what
    comes behind, the same run again makes nothing, however often a fact changes in its file, and what was retracted, rolled back or
    superseded from elsewhere is made again.

    Args:
        again: try again what was declined.
    """
    from comeba_ext.editing.batches import declined_in

    standing: dict[Fact, str] = {entry.request.asked[:2]: entry.request.target_new for entry in editor.ledger.live()}
    declined = set() if again else declined_in(editor.log)
    reached = {request.asked[:2]: n for n, request in enumerate(requests) if standing.get(request.asked[:2]) == request.target_new}
    todo = Todo()
    for n, request in enumerate(requests):
        fact = request.asked[:2]
        if n <= reached.get(fact, -1):
            todo.live += 1
        elif request.asked in declined:
            todo.declined += 1
        elif standing.get(fact) == request.target_new:
            todo.repeated += 1
        else:
            todo.requests.append(request)
            standing[fact] = request.target_new
    return todo


def say_left_out(report: Report, todo: Todo) -> None:
    if todo.live:
        report.say(f"{counted(todo.live, 'record')} left out: live there already, or overtaken by a record that is.")
    if todo.declined:
        report.say(f"{counted(todo.declined, 'record')} left out: declined before (--prompt tries one again).")


@dataclass
class Clashes:
    """Records about the same fact: ``contradicting`` with several new objects, ``duplicates`` with one and the same; and ``counts`` of
    those that a later one overtakes and those that repeat the one before, where there are any."""

    contradicting: list[dict]
    duplicates: list[dict]
    counts: dict[str, int]


def clashes(placed: Iterable[tuple[int, EditRequest]]) -> Clashes:
    """Of requests with their records' positions in the file."""
    facts: dict[Fact, list[tuple[int, str]]] = {}
    for place, request in placed:
        facts.setdefault(request.asked[:2], []).append((place, request.target_new))
    found, overtaken, repeated = Clashes([], [], {}), 0, 0
    for (text, _), own in facts.items():
        targets: dict[str, list[int]] = {}
        for place, target in own:
            targets.setdefault(target, []).append(place)
        if len(targets) > 1:
            last = own[-1][1]
            names = [*(target for target in targets if target != last), last]
            found.contradicting.append({"prompt": text, "records": [place for place, _ in own], "targets": names})
        found.duplicates += [{"prompt": text, "records": p, "target": t} for t, p in targets.items() if len(p) > 1]
        overtaken += sum(target != own[-1][1] for _, target in own)
        repeated += sum(before == after for (_, before), (_, after) in pairwise(own))
    found.counts = {name: count for name, count in (("overtaken", overtaken), ("repeated", repeated)) if count}
    return found


def say_clashes(report: Report, found: Clashes) -> None:
    """One line about each kind."""
    for own in found.contradicting[:1]:
        *others, last = map(repr, own["targets"])
        said = f"{own['prompt']!r} -> {', '.join(others)}, then {last}, which holds in the end{_more(len(found.contradicting) - 1)}"
        report.say(f"! Records {_listed(own['records'])} contradict each other: {said}.")
    for own in found.duplicates[:1]:
        said = f"{own['prompt']!r} -> {own['target']!r}{_more(len(found.duplicates) - 1)}"
        report.say(f"! Records {_listed(own['records'])} say the same: {said}.")


def _listed(places: list[int]) -> str:
    """Counted from 1, as all that is printed of records."""
    *others, last = [str(place + 1) for place in places]
    return f"{', '.join(others)} and {last}"


def _more(number: int) -> str:
    return f" (and so in {counted(number, 'more case')}, all with --json)" if number else ""
