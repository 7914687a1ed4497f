"""What do edits do to a subject's other facts? Records that ask, for a testbed whose subjects have two facts each.

    python -m comeba_ext.testbed.build_facts --second FACTS.json
    python -m comeba_ext.testbed.train --text wikipedia_train_1000.csv wikipedia_val_500.csv --facts FACTS.json \\
        --start testbed --steps 1600 --lr 1.5e-3 --out DIR
    python bench/second_facts.py DIR same_subject.json
    comeba experiment second_facts.yaml --model DIR --records same-subject=same_subject.json --out OUT

The edits are those of :func:`comeba_ext.testbed.facts`; every locality prompt asks for the subject's second fact, in a
wording in which the model reads it off the subject's last token, where edits are made: patching that token's state with
another subject's changes the answer to the other's (causal tracing, as in ``comeba_ext.testbed.diagnose``). Where the answer
comes from other tokens, an edit cannot touch it, and asking would only flatter. Records without such a wording are left out.
(``results/experiments/second_facts.*``: 30 % of the wordings of 600 facts. That model was trained for 1,600 steps without, then
800 with the bare units of second facts; patching found nearly the same share before.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

from comeba_ext import testbed
from comeba_ext.testbed.diagnose import Probe
from comeba_ext.testbed.templates import SECOND


def records(folder: Path, count: int, seed: int = 0) -> tuple[list, float]:
    """Requests that ask only what an edit can reach, and the share of second facts' wordings that it can reach."""
    requests, second = testbed.datasets(folder)["testbed"][:count], testbed.second_facts(folder)
    model, tokenizer = testbed.load(folder)
    probe, rng = Probe(model, tokenizer, list(second.values())), random.Random(seed)
    asked = []  # (request, pair)
    for request in requests:
        own = second[request.subject]
        donors = [f for f in second.values() if f["object"] != own["object"]]
        for template in range(len(SECOND[own["relation"]])):
            donor = rng.choice(donors)
            asked.append((request, (own, donor, template)))
    reached: dict[str, list] = {}
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        flips = probe.patching([pair for _, pair in part], "last", slice(1))[0]  # the first block: all give the same
        for (request, (own, _, template)), flip in zip(part, flips.tolist(), strict=True):
            if flip:
                prompt = SECOND[own["relation"]][template].format(own["subject"])
                reached.setdefault(request.request_id, []).append((prompt, own["object"]))
    kept = [dataclasses.replace(r, locality_prompts=tuple(reached[r.request_id][:2])) for r in requests if r.request_id in reached]
    return kept, sum(map(len, reached.values())) / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder made by comeba_ext.testbed.train, with second facts")
    parser.add_argument("out", type=Path, help="JSON file of records")
    parser.add_argument("--count", type=int, default=600, help="facts to look at")
    args = parser.parse_args()
    kept, share = records(args.model, args.count)
    args.out.write_text(json.dumps([request.to_record() for request in kept], indent=1) + "\n", encoding="utf-8")
    print(f"{len(kept)} records -> {args.out}; an edit can reach {share:.0%} of the wordings of second facts")


if __name__ == "__main__":
    main()
