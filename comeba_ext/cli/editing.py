"""Commands that change what a model says, and show it: ``demo``, ``edit``, ``generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Config, Device, Dtype, Edits, Json, Limit, Model, Scope, Trust, Unstructured, app
from comeba_ext.cli.inputs import (
    check_folder,
    check_same,
    check_settings,
    continued,
    covariance_source,
    edits_folder,
    loaded,
    requests_of,
    settings_of,
    size_of_edits,
    some_usable,
)
from comeba_ext.cli.records import clashes, say_clashes, say_left_out, to_make
from comeba_ext.cli.runs import Saves, say_unanswered, unanswered, unsuited
from comeba_ext.cli.terminal import METRICS, bytes_as_text, counted, metric_table, reporting, say_counts, say_settings, size_of
from comeba_ext.errors import ComebaError

DEMO_TOKENS = 12  # an answer of the embedded model's is a word or two


@app.command()
def demo(
    edits: Annotated[int, typer.Option(min=1, help="number of facts to change")] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 10,
    scope: Annotated[Optional[str], typer.Option(help="zscore, reference or nearest (default: the model's own)")] = None,
    out: Annotated[Optional[Path], typer.Option(help="also save the edits to this folder")] = None,
    as_json: Json = False,
) -> None:
    """Change facts in the embedded model, batch after batch, and measure after every batch."""
    from comeba_ext import testbed
    from comeba_ext.editing.config import EditConfig
    from comeba_ext.editor import Editor
    from comeba_ext.evaluation import Writing, evaluate, predict_base
    from comeba_ext.evaluation.ways import FORCED, WRITTEN

    start = time.perf_counter()
    with reporting(as_json) as report, edits_folder(out):
        model, tokenizer = testbed.load()
        requests = testbed.facts()[:edits]
        if len(requests) < edits:
            raise ComebaError(f"the embedded model knows {len(requests)} facts; ask for at most that many --edits")
        config = EditConfig.for_model(model, **({"scope": scope} if scope else {}))
        editor = Editor(model, tokenizer, config)
        report.say(
            f"Embedded model: {size_of(model)}; editing blocks {list(config.layers)}, score {config.scope}, "
            f"{edits} facts in batches of {batch_size}.\n"
        )
        editor.set_covariance(testbed.covariance(model, tokenizer, progress=not as_json))
        base = predict_base(model, tokenizer, requests, generate=False)
        shown = requests[:: max(1, len(requests) // 6)][:6]
        before = continued(model, tokenizer, [r.text for r in shown], 6)
        rows, seconds = [], 0.0
        report.table_head("batch", "edits", *METRICS, "edits/s", "loss")
        for batch in editor.edit_all(requests, batch_size, progress=False):
            took = sum(batch.seconds.values())
            seconds += took
            done = requests[: min(batch.step * batch_size, edits)]
            # After every batch: everything edited so far, at most 50 of it while on the way.
            sample = done if len(done) == edits else done[:: max(1, len(done) // 50)]
            scores = evaluate(model, tokenizer, sample, base, generate=False)
            rows.append(
                {
                    "batch": batch.step,
                    "edits": len(done),
                    **{m: scores[m] for m in METRICS},
                    "seconds": took,
                    "loss": sum(batch.losses) / len(batch.losses),
                }
            )
            report.table_row(
                str(batch.step),
                str(len(done)),
                *(f"{scores[m]:.3f}" for m in METRICS),
                f"{len(batch.request_ids) / took:.1f}",
                f"{rows[-1]['loss']:.3f}",
            )
        final = evaluate(model, tokenizer, requests, generate=True, writing=Writing(DEMO_TOKENS))
        after = continued(model, tokenizer, [r.text for r in shown], 6)
        examples = [
            {"prompt": r.text, "wanted": r.target_new, "before": b, "after": a} for r, b, a in zip(shown, before, after, strict=True)
        ]
        report.say("\nWhat the model writes (greedy):")
        report.table(
            ("prompt", "before", "edited to say", "after"), [(e["prompt"], e["before"], e["wanted"], e["after"]) for e in examples]
        )
        report.say(f"\nAll {edits} edits, measured at the end (95 % interval), locality against the unedited model:")
        for ways in (WRITTEN, FORCED):
            metric_table(report, final, METRICS, ways, explained=ways is WRITTEN)
        if out is not None:
            editor.save_pretrained(out)
            report.say(f"\nSaved to {out}.")
        report.say(
            f"\n{edits} edits in {seconds:.1f} s of editing ({edits / seconds:.1f} edits/s), {time.perf_counter() - start:.0f} s in all."
        )
        report.result = {
            **final.to_dict(),
            "edits": edits,
            "batches": rows,
            "examples": examples,
            "config": config.to_dict(),
            "records": {"read": edits, "used": edits, "skipped": []},
            "edit_seconds": seconds,
            "seconds": time.perf_counter() - start,
            "out": str(out) if out else None,
        }


@app.command()
def edit(
    model: Model,
    records: Annotated[Optional[Path], typer.Argument(help="JSON, JSONL or CSV: CounterFact, ZsRE, QAEdit, EasyEdit, your own")] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for the edits")] = ...,
    prompt: Annotated[Optional[str], typer.Option(help="instead of a file, one edit: a text with {} for the subject")] = None,
    subject: Annotated[Optional[str], typer.Option(help="with --prompt")] = None,
    target: Annotated[Optional[str], typer.Option(help="with --prompt: what the model is to say behind it")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 10,
    method: Annotated[Optional[str], typer.Option(help="COMEBA-HK (default), MEMIT, ROME, FT …")] = None,
    scope: Scope = None,
    editor_folder: Annotated[Optional[Path], typer.Option("--editor", help="made by 'comeba train', for methods that are trained")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="for instruct models: the edits hold in the chat template too")] = False,
    config: Config = None,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance'")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus to collect the covariance from instead")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on with the edits in --out: of the records about a fact those up to the last one that is live there are left out, "
            "and what was declined; what was retracted, rolled back or superseded since is made again",
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="batches between saves of --out, which is saved every minute too")] = 10,
    inference_only: Annotated[
        bool, typer.Option("--inference-only", help="save in the end only what using the edits needs: a small folder, final")
    ] = False,
    unstructured: Unstructured = False,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Edit a model with the records of a file, in consecutive batches, and save the edits."""
    from comeba_ext.editor import Editor
    from comeba_ext.methods import method_named
    from comeba_ext.storage import MANIFEST

    with reporting(as_json, parallel=True) as report, edits_folder(out, resume, report.first):
        # What needs no model comes before the model, and what needs no covariance before the covariance: both may take long.
        read, what = requests_of(records, limit, prompt, subject, target, unstructured), records or "the edit"
        some_usable(what, read.read, read.requests, read.skipped)
        kind = method_named(method or "COMEBA-HK")
        begun = resume and (out / MANIFEST).exists()
        if begun:
            kind = check_folder(out, kind if method else None, covariance, texts)
        check_settings(config, kind, scope, editor_folder, chat)
        if not begun and editor_folder is not None:
            kind.implied({"editor": str(editor_folder)})  # reads it
        if resume and not begun:
            report.say(f"{out} holds no edits yet; beginning anew.")
        source = covariance_source(model, covariance, texts, not as_json) if kind.needs_covariance and not begun else None
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        if begun:
            editor = Editor.from_pretrained(net, tokenizer, out)
            check_same(editor, out, kind, config, scope, editor_folder, chat, covariance, texts)
        else:
            editor = Editor(net, tokenizer, settings_of(net, config, kind, scope, editor_folder, chat), method=kind)
            editor.method.ready()
        used, skipped = read.usable(lambda _, request: editor.check([request]), progress=not as_json and report.first)
        some_usable(what, read.read, used, skipped)
        if not begun and editor.method.takes_values and not editor.config.chat and getattr(tokenizer, "chat_template", None):
            report.say("This model has a chat template; with --chat the edits hold there as well.")
        chosen = set(map(id, used))
        clashing = clashes((place, request) for place, request in read.placed() if id(request) in chosen)
        say_clashes(report, clashing)
        plan = to_make(used, editor, again=prompt is not None)
        todo, steps = plan.requests, []
        if todo:
            editor.method.ready()
        saves = Saves(editor, out, save_every, report, begun)
        if source:
            source(editor)
            if covariance is None:  # what was collected is kept, whatever comes
                saves.save(steps)
        complete = False
        try:
            for step in editor.edit_all(todo, batch_size, progress=not as_json and report.first) if todo else ():
                steps.append(step.to_dict())
                saves.after_batch(steps)
            complete = True
        finally:  # an interruption keeps the last complete batch, and what is needed to go on
            if todo or inference_only:
                saves.save(steps, inference_only and complete)
        size = size_of_edits(out) if report.first else None
        counts = read.counts(used, skipped) | clashing.counts
        seconds = sum(sum(s["seconds"].values()) for s in steps)
        answered, declined = sum(sum(s["answered"]) for s in steps), [d for s in steps for d in s["declined"]]
        missed = unanswered(editor, steps) if report.first else []
        moved, rewritten = (list(dict.fromkeys(name for s in steps for name in s[what])) for what in ("moved", "rewritten"))
        done = f"{counted(len(todo), 'edit')} in {counted(len(steps), 'batch', 'batches')}, {seconds:.1f} s"
        report.say(f"{done}; saved to {out}, {bytes_as_text(size or 0)}.")
        if inference_only:
            report.say("Saved for inference only: these edits can be used, not gone on with, listed or taken back.")
        say_left_out(report, plan)
        if todo:
            verb, whose = ("is", "its prompt") if len(todo) == 1 else ("are", "their prompts")
            report.say(f"{answered} of {len(todo)} {verb} answered behind {whose} right after the batch.")
            say_unanswered(report, missed)
            say_settings(report, editor, steps)
        if rewritten:
            report.say(f"{counted(len(rewritten), 'earlier edit')} of the same subjects found anew together with them.")
        if moved:
            report.say(f"Edited at the prompt's end, for that prompt only, as the subject's own place says nothing: {', '.join(moved)}.")
        for entry in declined:
            report.say(f"! declined {entry['request_id']} ({entry['prompt']!r}): {entry['reason']}")
        say_counts(report, counts)
        if 2 * answered < len(todo) and unsuited(editor, len(todo)):
            few = "None" if not answered else "Fewer than half"
            tuned = " (layers, λ, score). 'comeba tune' finds some that do." if editor.method.scored else "; see --config."
            report.say(f"! {few} of the edits took: these settings of {editor.method.name} do not suit this model{tuned}")
        report.code = 1 if todo and not answered else 0
        report.result = {
            "records": counts,
            "edits": len(todo),
            "answered": answered,
            "unanswered": missed,
            "declined": declined,
            "moved": moved,
            "rewritten": rewritten,
            "earlier_edits": plan.live + plan.declined,
            "repeated": plan.repeated,
            "contradicting": clashing.contradicting,
            "duplicates": clashing.duplicates,
            "steps": steps,
            "seconds": seconds,
            "out": str(out),
            "bytes": size,
            "inference_only": inference_only,
            "config": editor.config.to_dict(),
        }


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    edits: Edits = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    chat: Annotated[bool, typer.Option("--chat", help="ask in the model's chat template, instead of continuing")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue prompts greedily, with and without saved edits."""
    from comeba_ext.layers.attachment import disabled

    with reporting(as_json) as report:
        net, tokenizer = loaded(model, device, dtype, edits, trust=trust)
        after = continued(net, tokenizer, prompts, max_new_tokens, chat)
        with disabled(net):
            before = continued(net, tokenizer, prompts, max_new_tokens, chat) if edits else [None] * len(prompts)
        rows = [{"prompt": p, "text": a, "unedited": b} for p, a, b in zip(prompts, after, before, strict=True)]
        columns = {"prompt": "prompt", **({"unedited": "unedited", "edited": "text"} if edits else {"text": "text"})}
        report.table(tuple(columns), [tuple(row[key] or "(ends at once)" for key in columns.values()) for row in rows])
        report.result = {"generations": rows, "records": {"read": len(rows), "used": len(rows), "skipped": []}}
