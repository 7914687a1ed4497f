"""What do edits do to everything else about their subjects? CounterFact records that ask it, for any model.

    python bench/other_relations.py counterfact_500.json other_relations.json --without counterfact-train.json
    comeba experiment bench/experiments/other_relations.yaml --records other=other_relations.json --model MODEL --out OUT

From CounterFact in its original form, which names relations. Each record's locality prompts ask about its own subject what subjects of its
kind (people, works, organisations, places) are asked in other relations. What may follow from the edited relation is not asked: who now
speaks English may have been born elsewhere, but writes in English too. The right answers are not known: locality compares with what the
unedited model says. ``--without``: records that something was trained on; their subjects are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# What is asked, and the relations that it is not asked beside.
QUESTIONS = {
    "people": {
        "The mother tongue of {} is": ("P103", "P1412"),
        "The occupation of {} is": ("P106", "P101", "P39", "P413", "P641", "P1303"),
        "{} was born in the city of": ("P19", "P27"),
        "{} died in the city of": ("P20",),
        "{} worked in the city of": ("P937", "P108"),
        "The religion of {} is": ("P140",),
    },
    "works": {
        "{} was created in the country of": ("P495",),
        "The original language of {} is": ("P364", "P407"),
        "{} was released by the company": ("P178", "P176", "P449"),
        "The year in which {} came out is": (),
    },
    "organisations": {
        "The headquarters of {} are in": ("P159", "P740"),
        "{} is owned by": (),
        "The year in which {} was founded is": (),
    },
    "places": {
        "The official language of {} is": ("P37",),
        "The twin city of {} is": ("P190",),
        "{} lies in the country of": ("P17", "P30", "P131", "P276", "P36"),
        "{} is famous for its": (),
    },
}
KIND_OF = {relation: kind for kind, asked in QUESTIONS.items() for relations in asked.values() for relation in relations}
ASKED = 3  # questions a record, at most


def records(found: list[dict], known: set[str]) -> list[dict]:
    """Those of a known kind whose subject is not known already, in the fields of :class:`~comeba_ext.EditRequest`."""
    kept = []
    for record in found:
        rewrite = record["requested_rewrite"]
        relation, subject = rewrite["relation_id"], rewrite["subject"]
        if relation not in KIND_OF or subject in known:
            continue
        others = [prompt for prompt, relations in QUESTIONS[KIND_OF[relation]].items() if relation not in relations]
        kept.append(
            {
                "prompt": rewrite["prompt"],
                "subject": subject,
                "target_new": rewrite["target_new"]["str"],
                "ground_truth": rewrite["target_true"]["str"],
                "rephrase_prompts": record["paraphrase_prompts"],
                "locality_prompts": [prompt.replace("{}", subject) for prompt in others[:ASKED]],
            }
        )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counterfact", type=Path, help="CounterFact in its original form")
    parser.add_argument("out", type=Path, help="JSON file of records")
    parser.add_argument("--without", type=Path, help="JSON file of records whose subjects are left out")
    args = parser.parse_args()
    found = json.loads(args.counterfact.read_text(encoding="utf-8"))
    known = {record["subject"] for record in json.loads(args.without.read_text(encoding="utf-8"))} if args.without else set()
    kept = records(found, known)
    args.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    asked = sum(len(record["locality_prompts"]) for record in kept)
    print(f"{len(kept)} of {len(found)} records -> {args.out}; {asked} other questions about their subjects")


if __name__ == "__main__":
    main()
