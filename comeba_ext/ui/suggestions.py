"""What the page proposes, so that a first edit needs one click: examples, the subject of a sentence, texts to compare on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from comeba_ext import testbed
from comeba_ext.testbed.templates import TEMPLATES
from comeba_ext.text.names import places_of
from comeba_ext.text.request import SLOT
from comeba_ext.tuning import probes

FAVOURITES = ("Logic Pro", "Werner Heisenberg", "Dmitry Medvedev", "Harry Nilsson", "World Trade Organization", "Yogi Berra",
              "Franz Liszt", "Sushi", "MacBook Pro", "Catherine Deneuve", "Avi Wigderson", "Cape Town")  # fmt: skip
_NAME = r"[^\W\d_a-zà-öø-ÿ][\w'’.&-]*|\d[\w.-]*"  # begins with a capital letter, or a digit
_INSIDE = "of|the|and|de|del|della|der|di|du|da|dos|la|le|van|von|for|in|on|&"  # small words that a name may hold
_RUN = re.compile(rf"(?:{_NAME})(?:\s+(?:(?:{_INSIDE})\s+){{0,2}}(?:{_NAME}))*")
_QUOTED = re.compile(r"[\"“«„]([^\"“”«»„]{2,60})[\"”»“]")
_OPENERS = frozenset(
    "a an the what who whose where when which why how in on at of from by to for as is was are were do does did can could "
    "if this that these those it he she they we you i please tell name".split()
)


@dataclass(frozen=True)
class Relation:
    """Prompts with a slot that say the same, and the objects of the subjects they can be asked of."""

    prompts: tuple[str, ...]
    objects: dict[str, str]


@dataclass(frozen=True)
class Example:
    """What the form holds once an example has been clicked."""

    prompt: str
    subject: str
    target_new: str
    wordings: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.subject} → {self.target_new}"


def relations_of(model: str) -> list[Relation]:
    """What is known of a model's knowledge: of the embedded one all it was taught, of others what most models know."""
    found: dict[str, dict[str, str]] = {}
    if home := testbed.folder_of(model):
        for fact in testbed.raw_facts(home):
            found.setdefault(fact["relation"], {})[fact["subject"]] = fact["object"]
        return [Relation(TEMPLATES[name], objects) for name, objects in found.items()]
    prompts = {}
    for fact in probes.shipped():
        found.setdefault(fact.group, {})[fact.subject] = fact.answer
        prompts[fact.group] = (fact.prompt, *fact.others)
    return [Relation(prompts[name], objects) for name, objects in found.items()]


def examples(relations: list[Relation], count: int = 6) -> list[Example]:
    """One of each of the first relations, about a subject that most people know where there is one."""
    found = []
    for relation in relations:
        subject = next((name for name in FAVOURITES if name in relation.objects), None)
        if subject is not None:
            others = [answer for answer in dict.fromkeys(relation.objects.values()) if answer != relation.objects[subject]]
            prompt = next((own for own in relation.prompts if not own.startswith(SLOT)), relation.prompts[0])
            wordings, neighbours = beside(prompt, subject, others[0], relations)
            found.append(Example(prompt, subject, others[0], wordings, neighbours))
    return found[:count]


def beside(prompt: str, subject: str, target_new: str, relations: list[Relation]) -> tuple[list[str], list[str]]:
    """Two other wordings of a prompt with a slot, and three other subjects it can be asked of, which have other objects than the new one
    and than each other; none where the prompt is not known."""
    relation = next((own for own in relations if prompt.strip() in own.prompts), None)
    if relation is None:
        return [], []
    others: dict[str, str] = {}  # by object
    for name, answer in reversed(relation.objects.items()):  # the last ones first: examples and tests edit the others
        if name != subject and answer != target_new:
            others.setdefault(answer, name)
    return [own for own in relation.prompts if own != prompt.strip()][:2], list(others.values())[:3]


def subject_of(text: str, known: Iterable[str] = ()) -> str | None:
    """What a sentence is probably about: a known subject, what stands in quotation marks, or the longest name in it.

    Args:
        known: subjects to look for first; the longest one in the text is taken.
    """
    inside = [name for name in known if any(places_of(name, text))]
    if inside:
        return max(inside, key=len)
    if quoted := _QUOTED.search(text):
        return quoted[1].strip()
    runs = []
    for found in _RUN.finditer(text):
        words = found[0].split()
        first = not text[: found.start()].strip()
        while first and words and words[0].lower() in _OPENERS:
            words = words[1:]
        name = re.sub(r"['’]s$", "", " ".join(words)).strip(".,;:!?'’")
        if name:
            runs.append((len(name.split()), not first, name))
    return max(runs, key=lambda run: run[:2])[2] if runs else None
