"""Does an edit carry to other forms of the question, beside what the unedited model manages in them?

    python bench/rewordings.py models/smollm2-135m-instruct --covariance smol.cov

Facts of CounterFact for which there is a question (``counterfact_qna.json``) and whose *true* object the unedited model writes
behind the statement: what it does not know, no form can ask for. They are edited in batches of ten, each from the unedited model,
once as statements alone, once with the question as a further wording (``EditRequest.wordings``) in one of its forms, and once as
statements in the chat template too (``EditConfig.chat``). Then the model writes 16 tokens behind every form; counted is whether they
hold the object, the true one before, the new one after. The form
that was a wording is no test, and is marked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from common import DATA, counterfact, finish, target
from tqdm.auto import tqdm

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.covariance import Covariance
from comeba_ext.loading import load_model

SHOT = "Question: What is the capital of Norway?\nAnswer: Oslo\n\n"
TOKENS, BATCH = 16, 10
CHAT = "in the chat template"


def forms_of(tokenizer) -> dict:
    """Name to the text that asks for a fact, given its statement and its question."""
    forms = {
        "statement": lambda statement, question: statement,
        "bare question": lambda statement, question: question,
        "question and answer": lambda statement, question: f"Question: {question}\nAnswer:",
        "after an example": lambda statement, question: f"{SHOT}Question: {question}\nAnswer:",
    }
    if tokenizer.chat_template:
        chat = lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)  # noqa: E731
        forms["chat, question"] = lambda statement, question: chat(question)
        forms["chat, statement"] = lambda statement, question: chat(f"Complete: {statement}")
    return forms


@torch.no_grad()
def written(model, tokenizer, texts: list[str]) -> list[str]:
    """What the model writes behind each text, greedily; rows of a batch are padded on the left."""
    found = []
    tokenizer.padding_side = "left"
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        ids = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens="<|im_start|>" not in part[0]).to(model.device)
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found += tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def holds(answers: list[str], objects: list[str]) -> list[bool]:
    return [wanted.lower() in answer.lower() for answer, wanted in zip(answers, objects, strict=True)]


def facts_of(part: str) -> list[dict]:
    """Statement, question, subject, new and true object."""
    known = {(record["subject"], record["target_new"]): record for record in counterfact(part)}
    found = []
    for asked in json.loads((DATA / "counterfact" / "counterfact_qna.json").read_text()):
        record = known.get((asked["subject"], asked["answer"]))
        if record is not None and asked["subject"] in asked["qna_question"]:
            found.append(
                {
                    "statement": record["prompt"],
                    "question": asked["qna_question"],
                    "subject": asked["subject"],
                    "new": record["target_new"],
                    "true": record["ground_truth"],
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--part", default="edit", choices=["edit", "train"], help="of CounterFact")
    parser.add_argument("--limit", type=int, default=60, help="known facts")
    parser.add_argument("--wordings", nargs="*", default=["none", "question and answer", CHAT])
    parser.add_argument("--quick", action="store_true", help="four facts, as statements")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.limit, args.wordings = 4, ["none"]
    model, tokenizer = load_model(args.model)
    forms = forms_of(tokenizer)
    facts, unknown, candidates = [], 0, facts_of(args.part)
    for start in tqdm(range(0, len(candidates), BATCH), desc="known", unit="batch"):
        part = candidates[start : start + BATCH]
        right = holds(written(model, tokenizer, [fact["statement"] for fact in part]), [fact["true"] for fact in part])
        facts += [fact for fact, known in zip(part, right, strict=True) if known]
        unknown += right.count(False)
        if len(facts) >= args.limit:
            break
    facts = facts[: args.limit]
    asked = {name: [form(fact["statement"], fact["question"]) for fact in facts] for name, form in forms.items()}
    share = lambda values: sum(values) / len(values)  # noqa: E731
    true = {name: holds(written(model, tokenizer, texts), [fact["true"] for fact in facts]) for name, texts in asked.items()}
    rows = [{"edited as": "unedited, true object", **{name: share(found) for name, found in true.items()}}]
    covariance = Covariance.load(args.covariance)
    for wording in [name for name in args.wordings if name in ("none", CHAT) or name in forms]:
        editor = Editor(model, tokenizer, EditConfig.for_model(model, chat=wording == CHAT))
        editor.set_covariance(covariance)
        found: dict[str, list[bool]] = {name: [] for name in forms}
        seconds = 0.0
        for start in tqdm(range(0, len(facts), BATCH), desc=wording, unit="batch"):
            part = slice(start, start + BATCH)
            requests = [
                EditRequest(
                    fact["statement"], fact["subject"], fact["new"], wordings=(asked[wording][start + n],) if wording in asked else ()
                )
                for n, fact in enumerate(facts[part])
            ]
            began = time.perf_counter()
            editor.edit(requests)
            seconds += time.perf_counter() - began
            for name, texts in asked.items():
                found[name] += holds(written(model, tokenizer, texts[part]), [fact["new"] for fact in facts[part]])
            editor.rollback(0)
        editor.close()
        # Of the facts that the form could ask for before.
        answerable = {name: [hit for hit, could in zip(found[name], true[name], strict=True) if could] for name in forms}
        label = "statement" if wording == "none" else f"and {wording}"
        rows.append({"edited as": label, "seconds an edit": seconds / len(facts), **{name: share(hits) for name, hits in found.items()}})
        rows.append(
            {
                "edited as": f"{label}, where the true object was written",
                **{name: share(hits) if hits else None for name, hits in answerable.items()},
            }
        )
    if not args.json:
        print(f"{len(facts)} facts of {len(facts) + unknown} asked for are known; {TOKENS} tokens written; share that holds the object")
        print("| edited as |", " | ".join(forms), "|")
        print("|---" * (len(forms) + 1) + "|")
        for row in rows:
            print("|", row["edited as"], "|", " | ".join("—" if row[name] is None else f"{row[name]:.2f}" for name in forms), "|")
    statement = rows[1]["statement"]
    finish(
        [{"facts": len(facts), "not known": unknown}, *rows], [target("edited statements", statement, 0.95, statement >= 0.95)], args.json
    )


if __name__ == "__main__":
    main()
