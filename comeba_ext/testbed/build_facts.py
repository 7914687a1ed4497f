"""Choose the facts of the embedded model: ``python -m comeba_ext.testbed.build_facts --relations DIR``.

Reads the ``samples`` of relation files (MIT licensed, subject/object pairs) and writes ``facts.json`` into the model's
folder. A fact is kept when its subject is unique over all relations, short enough to be gathered by the model's first
block, and its object is shared by at least three subjects (so that a same-relation replacement exists) but by no more
than ``--per-object`` (so that guessing the most frequent object does not pay).

``--second FILE`` writes the embedded model's facts once more, and after them an invented one about every subject: the
month of its anniversary.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from comeba_ext import testbed
from comeba_ext.testbed.templates import SECOND, TEMPLATES

FACTS_FILE = testbed.FOLDER / testbed.FACTS
STATED = 5  # templates a fact is trained on; the other three stay held out
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")


def choose(relations: Path, per_relation: int, per_object: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    samples = {}
    for relation in sorted(TEMPLATES):
        (path,) = relations.glob(f"*/{relation}.json")
        samples[relation] = [(s["subject"].strip(), s["object"].strip()) for s in json.loads(path.read_text())["samples"]]
    uses = Counter(subject.lower() for pairs in samples.values() for subject in {s for s, _ in pairs})
    facts = []
    for relation, pairs in samples.items():
        pairs = [
            (s, o)
            for s, o in dict(pairs).items()
            if uses[s.lower()] == 1
            and 3 < len(s) <= 24
            and len(s.split()) <= 4
            and s.replace(" ", "").isascii()
            and o.isascii()
            and "{" not in s
            and o.lower() not in s.lower()
        ]
        rng.shuffle(pairs)
        kept: Counter[str] = Counter()
        chosen = []
        for subject, obj in pairs:
            if kept[obj] < per_object:
                kept[obj] += 1
                chosen.append((subject, obj))
        chosen = [(s, o) for s, o in chosen if kept[o] >= 3][:per_relation]
        final = Counter(o for _, o in chosen)
        for subject, obj in chosen:
            if final[obj] < 2:
                continue
            order = rng.sample(range(len(TEMPLATES[relation])), len(TEMPLATES[relation]))
            facts.append({"subject": subject, "relation": relation, "object": obj, "stated": sorted(order[:STATED])})
    return facts


def with_second(facts: list[dict], seed: int = 0) -> list[dict]:
    """The facts, and after them one more about each of their subjects."""
    rng = random.Random(seed)
    ((relation, templates),) = SECOND.items()
    second = [
        {
            "subject": fact["subject"],
            "relation": relation,
            "object": rng.choice(MONTHS),
            "stated": sorted(rng.sample(range(len(templates)), STATED)),
        }
        for fact in facts
    ]
    return facts + second


def write(facts: list[dict], path: Path) -> None:
    lines = ",\n".join(json.dumps(f, ensure_ascii=False) for f in facts)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--relations", type=Path, help="folder with */RELATION.json files")
    what.add_argument("--second", type=Path, metavar="FILE", help="where to write the facts with a second one a subject")
    parser.add_argument("--per-relation", type=int, default=240)
    parser.add_argument("--per-object", type=int, default=40)
    args = parser.parse_args()
    if args.second:
        path, facts = args.second, with_second(testbed.all_facts())
    else:
        path, facts = FACTS_FILE, choose(args.relations, args.per_relation, args.per_object)
    write(facts, path)
    print(f"{len(facts)} facts, {len({f['object'] for f in facts})} objects -> {path}")
    for relation, count in Counter(f["relation"] for f in facts).items():
        print(f"  {relation}: {count} facts, {len({f['object'] for f in facts if f['relation'] == relation})} objects")


if __name__ == "__main__":
    main()
