"""Correct facts in a model, look, undo, save, load: everything most users need.

    python examples/quickstart.py [MODEL TEXTS]

Without arguments the model is the small one that ships with the package. MODEL is a local folder or a hub name, TEXTS plain text such as
Wikipedia articles (a .txt, .csv or .jsonl file).
"""

import sys
import tempfile

import torch

from comeba_ext import Editor, EditRequest, evaluate, load_edits, testbed
from comeba_ext.data import read_texts
from comeba_ext.loading import load_model


def said(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(model_name: str | None = None, texts: str | None = None) -> dict:
    load = testbed.load if model_name is None else lambda: load_model(model_name)
    model, tokenizer = load()
    editor = Editor(model, tokenizer)
    # Once a model: how its layers are used on ordinary text. editor.save_covariance("model.cov") keeps it.
    editor.collect_covariance(testbed.texts() if texts is None else read_texts(texts), progress=False)

    requests = [
        EditRequest(
            prompt="The mother tongue of {} is",
            subject="Danielle Darrieux",
            target_new="English",
            rephrase_prompts=["Danielle Darrieux spoke the language"],
            locality_prompts=["The mother tongue of Victor Hugo is"],
        ),
        {"prompt": "{} was developed by", "subject": "Logic Pro", "target_new": "Intel"},  # plain dicts do as well
    ]
    prompt = "The mother tongue of Danielle Darrieux is"
    before = said(model, tokenizer, prompt)
    report = editor.edit(requests)  # one consecutive batch; any number of them may follow
    after = said(model, tokenizer, prompt)  # the model object itself is what has been edited
    metrics = evaluate(model, tokenizer, requests)
    with editor.disabled():
        disabled = said(model, tokenizer, prompt)  # the original model, bit for bit

    with tempfile.TemporaryDirectory() as folder:
        editor.save_pretrained(folder)
        used = load_edits(load()[0], folder)  # to use it: no covariance, a tokenizer only for ICE, IKE and SERAC
        loaded = said(used, tokenizer, prompt)
        again = Editor.from_pretrained(load()[0], tokenizer, folder)  # to go on editing
        again.retract(report.request_ids[0])  # take a single edit back
        retracted = said(again.model, tokenizer, prompt)
    editor.rollback(0)  # or all of them
    return {
        "before": before,
        "after": after,
        "disabled": disabled,
        "loaded": loaded,
        "retracted": retracted,
        "rolled back": said(model, tokenizer, prompt),
        "reliability": metrics.reliability,
        "locality": metrics.locality,
    }


if __name__ == "__main__":
    for name, value in main(*sys.argv[1:3]).items():
        print(f"{name:12} {value}")
