"""Does a model's state at a prompt's last token tell what is asked about a subject?

    python bench/question_states.py models/smollm2-135m-instruct --other other_relations.json

Other wordings of edited prompts against other questions about the same subjects, by nearness (``forward/question_states.py``), with what is
usually asked of a subject in a prompt's own form taken off, and with the openings of statements taken off for both forms. Three kinds of
pairs: openings in CounterFact's own wordings, with other relations' openings against them (``--other``, of ``other_relations.py``; its
wordings stand behind other text); openings and the question for them (``counterfact_qna.json``, of training records); questions
and their rephrases (ZsRE from the 600th on). Against the latter two stand questions of other records, with this subject in them, that share
no word.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from common import DATA, finish
from rewordings import facts_of
from tqdm.auto import tqdm

from comeba_ext.data import read_requests
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.question_states import Asked, asked_about, form_of, nearness, place_of, question_states, sentence_of
from comeba_ext.loading import load_model

STOP = {"what", "is", "the", "of", "{}", "in", "was", "which", "who", "did", "does", "by", "where", "to"}
OTHERS = 4


def words(template: str) -> set[str]:
    return set(template.lower().replace("?", "").split()) - STOP


def others_of(template: str, templates: list[str], draw: random.Random) -> list[str]:
    return list(dict.fromkeys(t for t in draw.sample(templates, len(templates)) if not words(t) & words(template)))[:OTHERS]


def pairs(other: Path | None, count: int) -> dict[str, list[tuple[str, str, list[str], list[str]]]]:
    """By kind: subject, edited prompt, other wordings, other questions."""
    draw, found = random.Random(0), {}
    if other is not None:
        found["opening, opening"] = [
            (r.subject, r.text, list(r.rephrase_prompts), [asked for asked, _ in r.locality_prompts])
            for r in read_requests(other, count).requests
        ]
    records = json.loads((DATA / "zsre" / "zsre_mend_eval_portability_gpt4.json").read_text(encoding="utf-8"))[600:]
    for kind, made in (
        ("opening, question", [(f["subject"], f["statement"], f["question"]) for f in facts_of("train")]),
        (
            "question, question",
            [(r["subject"], r["src"], r["rephrase"]) for r in records if all(r["subject"] in r[k] for k in ("src", "rephrase"))],
        ),
    ):
        draw.shuffle(made)
        questions = [(question if kind.startswith("opening") else prompt).replace(s, "{}") for s, prompt, question in made]
        found[kind] = [
            (s, prompt.replace("{}", s), [question], [t.replace("{}", s) for t in others_of(mine, questions, draw)])
            for (s, prompt, question), mine in zip(made[:count], questions, strict=False)
        ]
    return found


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    """Under the ROC curve: how often another wording is nearer than another question."""
    return float((inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--other", type=Path, help="records that other_relations.py wrote")
    parser.add_argument("--count", type=int, default=40, help="records of each kind")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    architecture = Architecture.of(model)
    reading = model.get_submodule(architecture.decoder), place_of(model, architecture)[0], tokenizer
    rows = []
    for kind, records in pairs(args.other, args.count).items():
        found: dict[str, tuple[list[float], list[float]]] = {"own form": ([], []), "openings alone": ([], [])}
        for subject, prompt, *texts in tqdm(records, desc=kind, disable=args.json):
            own = asked_about(*reading, [prompt], subject)
            openings = own.usual[:, :1].expand_as(own.usual)
            alone = Asked(own.asked + own.usual[:, form_of(prompt)] - openings[:, 0], openings, own.form)
            for n, group in enumerate(texts):
                states = question_states(*reading, [sentence_of(text, subject) for text in group])
                for text, state in zip(group, states, strict=True):
                    found["own form"][n].append(nearness(text, state, own).item())
                    found["openings alone"][n].append(nearness(text, state, alone).item())
        for taken, (inside, outside) in found.items():
            inside, outside = np.array(inside), np.array(outside)
            row = {"pairs": kind, "taken off": taken, "area": area(inside, outside), "wordings": len(inside), "others": len(outside)}
            row["others where 0.9 of the wordings pass"] = float((outside >= np.quantile(inside, 0.1)).mean())
            row |= {f"at {floor}": [float((own >= floor).mean()) for own in (inside, outside)] for floor in (0.0, 0.1, 0.15, 0.2, 0.3)}
            rows.append(row)
            if not args.json:
                shown = ", ".join(f"{a:.2f} / {b:.2f} {k}" for k, (a, b) in ((k, v) for k, v in row.items() if k.startswith("at ")))
                print(f"{kind}; {taken}: area {row['area']:.3f}, {row['others where 0.9 of the wordings pass']:.2f} at 0.9; {shown}")
    finish(rows, [], args.json)


if __name__ == "__main__":
    with torch.no_grad():
        main()
