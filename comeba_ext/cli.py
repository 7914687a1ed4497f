"""The command line: ``comeba demo | edit | eval | ability | covariance | tune | generate | experiment | doctor``.

Every command takes ``--json`` and then prints exactly one JSON object on stdout. Exit codes: 0 done; 1 the input was
unusable (one clear message, or ``{"error": ...}``); 2 wrong usage; 3 ``doctor`` found something missing; 130 interrupted.

``covariance`` and ``edit`` share their work when ``torchrun`` or ``accelerate launch`` starts several processes; the first
one prints and saves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext import __version__
from comeba_ext.errors import ComebaError, ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Correct facts in a Hugging Face language model without retraining it.")  # fmt: skip

Model = Annotated[str, typer.Argument(help="local model folder, hub name, or 'testbed' for the embedded model")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Edits = Annotated[Optional[Path], typer.Option("--edits", help="folder of saved edits to put onto the model")]
Config = Annotated[
    Optional[Path], typer.Option("--config", help="settings as JSON or YAML, those that differ from the model's defaults")
]
Scope = Annotated[Optional[str], typer.Option("--scope", help="nearest, reference or zscore (the paper's)")]
Limit = Annotated[Optional[int], typer.Option("--limit", min=1, help="read at most this many records")]
Device = Annotated[
    Optional[str], typer.Option("--device", help="cpu, cuda, …; auto: spread over all (default: cuda where there is one)")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that the model's folder or hub page brings")]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = Annotated[str, typer.Option("--dtype", help=", ".join(DTYPES))]

METRICS = ("reliability", "generality", "locality")
PLAIN_TEXTS = 400  # at most, to measure perplexity on in experiments


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
    from comeba_ext.editing.editor import Editor
    from comeba_ext.evaluation import evaluate, predict_base

    start = time.perf_counter()
    with _reporting(as_json) as report, _edits_folder(out):
        model, tokenizer = testbed.load()
        requests = testbed.facts()[:edits]
        if len(requests) < edits:
            raise ComebaError(f"the embedded model knows {len(requests)} facts; ask for at most that many --edits")
        config = EditConfig.for_model(model, **({"scope": scope} if scope else {}))
        editor = Editor(model, tokenizer, config)
        report.say(f"Embedded model: {_size(model)}; editing blocks {list(config.layers)}, score {config.scope}, "
                   f"{edits} facts in batches of {batch_size}.\n")  # fmt: skip
        editor.collect_covariance(testbed.texts(), progress=not as_json)
        base = predict_base(model, tokenizer, requests, generate=False)
        shown = requests[:: max(1, len(requests) // 6)][:6]
        before = _continue(model, tokenizer, [r.text for r in shown], 6)
        rows, seconds = [], 0.0
        report.table_head("batch", "edits", *METRICS, "edits/s", "loss")
        for batch in editor.edit_all(requests, batch_size, progress=False):
            took = sum(batch.seconds.values())
            seconds += took
            done = requests[: min(batch.step * batch_size, edits)]
            # After every batch: everything edited so far, at most 50 of it while on the way.
            sample = done if len(done) == edits else done[:: max(1, len(done) // 50)]
            scores = evaluate(model, tokenizer, sample, base, generate=False)
            rows.append({"batch": batch.step, "edits": len(done), **{m: scores[m] for m in METRICS},
                         "seconds": took, "loss": sum(batch.losses) / len(batch.losses)})  # fmt: skip
            report.table_row(str(batch.step), str(len(done)), *(f"{scores[m]:.3f}" for m in METRICS),
                             f"{len(batch.request_ids) / took:.1f}", f"{rows[-1]['loss']:.3f}")  # fmt: skip
        final = evaluate(model, tokenizer, requests, generate=True)
        after = _continue(model, tokenizer, [r.text for r in shown], 6)
        examples = [
            {"prompt": r.text, "wanted": r.target_new, "before": b, "after": a}
            for r, b, a in zip(shown, before, after, strict=True)
        ]
        report.say("\nWhat the model writes (greedy):")
        report.table(("prompt", "before", "edited to say", "after"),
                     [(e["prompt"], e["before"], e["wanted"], e["after"]) for e in examples])  # fmt: skip
        report.say(f"\nAll {edits} edits, measured at the end (95 % interval), locality against the unedited model:")
        report.table(("", "teacher-forced", "exact", "greedy generation"), [_metric_row(final, m) for m in METRICS])
        if out is not None:
            editor.save_pretrained(out)
            report.say(f"\nSaved to {out}.")
        report.say(f"\n{edits} edits in {seconds:.1f} s of editing ({edits / seconds:.1f} edits/s), "
                   f"{time.perf_counter() - start:.0f} s in all.")  # fmt: skip
        report.result = {
            **final.to_dict(), "edits": edits, "batches": rows, "examples": examples, "config": config.to_dict(),
            "records": {"read": edits, "used": edits, "skipped": []}, "edit_seconds": seconds,
            "seconds": time.perf_counter() - start, "out": str(out) if out else None,
        }  # fmt: skip


@app.command()
def edit(
    model: Model,
    records: Annotated[
        Optional[Path], typer.Argument(help="JSON or JSONL: CounterFact, ZsRE, QAEdit, EasyEdit or own records")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for the edits")] = ...,
    prompt: Annotated[Optional[str], typer.Option(help="instead of a file, one edit: a text with {} for the subject")] = None,
    subject: Annotated[Optional[str], typer.Option(help="with --prompt")] = None,
    target: Annotated[Optional[str], typer.Option(help="with --prompt: what the model is to say behind it")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 10,
    method: Annotated[Optional[str], typer.Option(help="COMEBA-HK (default), MEMIT, ROME, FT …")] = None,
    scope: Scope = None,
    config: Config = None,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance'")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus to collect the covariance from instead")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the edits in --out: what was edited or declined there is left out")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="batches between saves of --out")] = 10,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Edit a model with the records of a file, in consecutive batches, and save the edits."""
    from comeba_ext import methods
    from comeba_ext.storage import MANIFEST

    with _reporting(as_json, parallel=True) as report, _edits_folder(out, resume, report.first):
        read = _requests(records, limit, prompt, subject, target)
        kind = methods.get(method or "COMEBA-HK")
        net, tokenizer = _load(model, device, dtype, trust=trust)
        if resume and (out / MANIFEST).exists():
            editor = methods.load(net, tokenizer, out)
            _check_same(editor, out, kind if method else None, config, scope, covariance, texts)
        else:
            editor = kind(net, tokenizer, _config(net, config, kind, scope))
            if kind.needs_covariance:
                _provide_covariance(editor, model, covariance, texts, not as_json)
        used, skipped = read.usable(lambda _, request: editor.check([request]), progress=not as_json and report.first)
        if not used:
            what = records or "the edit"
            raise ComebaError(f"{what}: none of {_count(read.read, 'record')} can be used; first reason: {skipped[0]['reason']}")
        earlier, todo = editor.handled(), []
        for request in used:
            if earlier[request.asked]:
                earlier[request.asked] -= 1
            else:
                todo.append(request)
        steps = []
        if todo:
            try:
                for step in editor.edit_all(todo, batch_size, progress=not as_json and report.first):
                    steps.append(step.to_dict())
                    if len(steps) % save_every == 0 and report.first:
                        editor.save_pretrained(out)
            finally:  # an interruption keeps the last complete batch
                if report.first:
                    editor.save_pretrained(out)
        counts = {"read": read.read, "used": len(used), "skipped": skipped}
        seconds = sum(sum(s["seconds"].values()) for s in steps)
        answered, declined = sum(sum(s["answered"]) for s in steps), [d for s in steps for d in s["declined"]]
        moved, rewritten = (list(dict.fromkeys(name for s in steps for name in s[what])) for what in ("moved", "rewritten"))
        report.say(f"{_count(len(todo), 'edit')} in {_count(len(steps), 'batch', 'batches')}, {seconds:.1f} s; saved to {out}.")
        if len(todo) < len(used):
            report.say(f"{_count(len(used) - len(todo), 'record')} had been edited or declined there before.")
        if todo:
            verb, whose = ("is", "its prompt") if len(todo) == 1 else ("are", "their prompts")
            report.say(f"{answered} of {len(todo)} {verb} answered behind {whose} right after the batch.")
            _say_settings(report, editor, steps)
        if rewritten:
            report.say(f"{_count(len(rewritten), 'earlier edit')} of the same subjects found anew together with them.")
        if moved:
            report.say(f"Edited at the prompt's end, for that prompt only, as the subject's own place says nothing: {', '.join(moved)}.")
        for entry in declined:
            report.say(f"! declined {entry['request_id']} ({entry['prompt']!r}): {entry['reason']}")
        _say_counts(report, counts)
        if todo and 2 * answered < len(todo):
            few = "None" if not answered else "Fewer than half"
            report.say(f"! {few} of the edits took: these settings do not suit this model (layers, λ, score). 'comeba tune' finds some that do.")
            report.code = 0 if answered else 1
        report.result = {"records": counts, "edits": len(todo), "answered": answered, "declined": declined, "moved": moved,
                         "rewritten": rewritten, "earlier_edits": len(used) - len(todo), "steps": steps, "seconds": seconds,
                         "out": str(out), "config": editor.config.to_dict()}  # fmt: skip


@app.command(name="eval")
def evaluate_(
    model: Model,
    records: Annotated[Path, typer.Argument(help="JSON or JSONL records")],
    edits: Edits = None,
    generate: Annotated[bool, typer.Option(help="also measure greedy generation")] = True,
    predictions: Annotated[Optional[Path], typer.Option(help="write every record's scores and texts as JSONL")] = None,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Reliability, generality and locality of a model, with or without saved edits, on the records of a file."""
    from comeba_ext.data import read_requests
    from comeba_ext.evaluation import evaluate
    from comeba_ext.storage import write_text

    with _reporting(as_json) as report:
        if predictions is not None and not predictions.parent.is_dir():
            raise ComebaError(f"--predictions {predictions}: there is no folder {predictions.parent}")
        read = read_requests(records, limit)
        net, tokenizer = _load(model, device, dtype, edits, trust=trust)
        used, skipped = _fitting(net, tokenizer, read)
        if not used:
            raise ComebaError(f"{records}: none of {read.read} records can be used; first reason: {skipped[0]['reason']}")
        metrics = evaluate(net, tokenizer, used, generate=generate, progress=not as_json)
        if predictions is not None:
            write_text(predictions, "".join(json.dumps(row) + "\n" for row in metrics.per_record))
        names = [m for m in (*METRICS, "portability") if metrics.get(m) is not None]
        report.table(("", "teacher-forced", "exact", "greedy generation"), [_metric_row(metrics, m) for m in names])
        counts = {"read": read.read, "used": len(used), "skipped": skipped}
        _say_counts(report, counts)
        report.result = {**metrics.to_dict(), "records": counts, "edits_folder": str(edits) if edits else None}


@app.command()
def ability(
    model: Model,
    edits: Edits = None,
    texts: Annotated[Optional[Path], typer.Option(help="plain texts, as for covariance: perplexity")] = None,
    tasks: Annotated[Optional[str], typer.Option(help="lm-evaluation-harness tasks, e.g. hellaswag,arc_easy")] = None,
    task_folder: Annotated[Optional[Path], typer.Option(help="folder of the harness's task files of your own")] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="at most so many texts, and examples a task")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """What a model can do beside its edits, without and with them: perplexity, lm-evaluation-harness."""
    from comeba_ext.data import read_texts
    from comeba_ext.evaluation import harness, perplexity
    from comeba_ext.hooked_linear import disabled

    with _reporting(as_json) as report:
        names = [task for task in (tasks or "").split(",") if task]
        if texts is None and not names:
            raise ComebaError("nothing to measure: give --texts, --tasks, or both")
        chosen = None if texts is None else list(itertools.islice(read_texts(texts), limit))
        net, tokenizer = _load(model, device, dtype, edits, trust=trust)

        def measured() -> dict:
            found = {} if chosen is None else {"perplexity": perplexity(net, tokenizer, chosen)}
            if names:
                # It writes to stdout.
                with contextlib.redirect_stdout(sys.stderr):
                    found["tasks"] = harness(net, tokenizer, names, task_folder, limit=limit)
            return found

        with disabled(net):
            columns = {"unedited": measured()}
        if edits is not None:
            columns["edited"] = measured()
        flat = {name: _flat(found) for name, found in columns.items()}
        report.table(("", *columns), [(row, *(f"{own[row]:.4g}" for own in flat.values())) for row in flat["unedited"]])
        counts = {"read": len(chosen or ()), "used": len(chosen or ()), "skipped": []}
        report.result = {**columns, "records": counts, "edits_folder": str(edits) if edits else None}


@app.command()
def covariance(
    model: Model,
    texts: Annotated[Path, typer.Argument(help=".txt, .csv (text column), .jsonl (text field), or a folder of them")],
    out: Annotated[Path, typer.Option("--out", help="file; an unfinished one is resumed")],
    tokens: Annotated[Optional[int], typer.Option(min=1, help="default: 10 per input dimension")] = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Collect the covariance of all edited layers in one corpus pass."""
    from comeba_ext import distributed
    from comeba_ext.covariance import TOKENS_PER_DIMENSION
    from comeba_ext.data import read_texts
    from comeba_ext.editing.editor import Editor
    from comeba_ext.storage import writable

    with _reporting(as_json, parallel=True) as report:
        stream = read_texts(texts)
        distributed.together(lambda: writable(out) if report.first else None)
        net, tokenizer = _load(model, device, dtype, trust=trust)
        editor = Editor(net, tokenizer, _config(net, config))
        wanted = tokens or TOKENS_PER_DIMENSION * max(layer.in_features for layer in editor.layers.values())
        start = time.perf_counter()
        editor.collect_covariance(stream, tokens=tokens, path=out, progress=not as_json)
        found = editor.covariance
        seconds = time.perf_counter() - start
        report.say(f"{found.tokens} tokens of {found.texts} texts, {len(found.moments)} layers, {seconds:.1f} s; "
                   f"saved to {out}.")  # fmt: skip
        if found.tokens < wanted:
            report.say(f"! The corpus ended after {found.tokens} of {wanted} tokens; with more text the covariance gets better.")
        report.result = {"tokens": found.tokens, "tokens_wanted": wanted, "complete": found.tokens >= wanted,
                         "layers": list(found.moments), "seconds": seconds, "out": str(out),
                         "records": {"read": found.texts, "used": found.texts, "skipped": []}}  # fmt: skip


@app.command()
def tune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder for config.yaml, tune.json, tune.png and the covariance; an unfinished search goes on there")],
    texts: Annotated[Optional[Path], typer.Option("--texts", help="corpus for the covariance")] = None,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance' of all layers that are tried")] = None,
    records: Annotated[Optional[Path], typer.Option("--records", help="edits to try (default: shipped facts)")] = None,
    edits: Annotated[int, typer.Option("--edits", min=2, help="trial edits a setting")] = 20,
    scope: Scope = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Find settings that edit a model: layers, learning rate, weight of the covariance."""
    import yaml

    from comeba_ext import testbed
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import read_requests, read_texts
    from comeba_ext.storage import alone, write_text
    from comeba_ext.tuning import tune as search

    with _reporting(as_json) as report, alone(out):
        net, tokenizer = _load(model, device, dtype, trust=trust)
        home = testbed.folder_of(model)
        if texts is None and covariance is None and not home:
            raise ComebaError("no corpus: add --texts TEXTS (plain text such as Wikipedia articles), or --covariance FILE")
        corpus = read_texts(texts) if texts else testbed.texts(folder=home) if home else None
        read = read_requests(records) if records else None
        report.say(f"{model}: {_size(net)}")
        report.table_head("trial", "layers", "optimiser", "ratio", "reliability", "written", "generality", "locality", "loss", "s/edit")
        count = itertools.count(1)

        def show(trial) -> None:
            span, own = trial.settings["layers"], trial.settings
            optimiser = own.get("optimizer", "default") + (f" {own['lr']:g}" if own.get("lr") else "")
            report.table_row(str(next(count)), f"{span[0]}-{span[-1]}", optimiser, f"{own.get('leverage_ratio', 'default')}",
                             *(f"{value:.3f}" for value in (trial.reliability, trial.written, trial.generality, trial.locality, trial.loss, trial.seconds)))  # fmt: skip

        found = search(net, tokenizer, corpus, records=read.requests if read else None, scope=scope, folder=out, edits=edits,
                       covariance=Covariance.load(covariance) if covariance else None, progress=not as_json, on_trial=show)  # fmt: skip
        write_text(out / "config.yaml", yaml.safe_dump(found.best, sort_keys=False))
        write_text(out / "tune.json", json.dumps(found.to_dict(), indent=1) + "\n")
        from comeba_ext.tuning.plot import draw

        draw(found, out / "tune.png")
        if found.patching:
            top = max(range(len(found.patching)), key=found.patching.__getitem__)
            report.say(f"The model answers {found.known} of {found.facts} facts; the subject's last token decides up to "
                       f"{max(found.patching):.2f} of them (block {top}).")  # fmt: skip
        report.say(f"Best: {found.best}")
        report.say(f"{found.seconds:.0f} s. Written to {out}: config.yaml (for --config), tune.json, tune.png.")
        counts = {"read": read.read, "used": len(read.requests), "skipped": read.skipped} if read else \
            {"read": found.facts, "used": found.facts, "skipped": []}  # fmt: skip
        report.result = {**found.to_dict(), "records": counts, "out": str(out)}


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="texts to continue")],
    edits: Edits = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue prompts greedily, with and without saved edits."""
    from comeba_ext.hooked_linear import disabled

    with _reporting(as_json) as report:
        net, tokenizer = _load(model, device, dtype, edits, trust=trust)
        after = _continue(net, tokenizer, prompts, max_new_tokens)
        with disabled(net):
            before = _continue(net, tokenizer, prompts, max_new_tokens) if edits else [None] * len(prompts)
        rows = [{"prompt": p, "text": a, "unedited": b} for p, a, b in zip(prompts, after, before, strict=True)]
        if edits:
            report.table(("prompt", "unedited", "edited"), [(r["prompt"], r["unedited"], r["text"]) for r in rows])
        else:
            report.table(("prompt", "text"), [(r["prompt"], r["text"]) for r in rows])
        report.result = {"generations": rows,
                         "records": {"read": len(rows), "used": len(rows), "skipped": []}}  # fmt: skip


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="a shipped experiment (table1, table2, fig3 …, scope), or a YAML file")],
    out: Annotated[Path, typer.Option("--out", help="folder for table, JSON and plots; an unfinished run goes on there")],
    model: Annotated[str, typer.Option("--model", help="local model folder, hub name, or 'testbed'")] = "testbed",
    records: Annotated[
        Optional[list[str]],
        typer.Option("--records", help="FILE or NAME=FILE, any number (default for testbed: its own facts)"),
    ] = None,
    samples: Annotated[Optional[int], typer.Option("--samples", min=1, help="records a data set")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="other than 0: take the records in random order")] = 0,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance', of all layers edited")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus for the covariance, and for perplexity")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an experiment: methods and settings under one protocol, into a table, JSON and plots."""
    from comeba_ext import experiments, testbed
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import ReadResult, read_requests, read_texts
    from comeba_ext.experiments.table import cell

    with _reporting(as_json) as report:
        chosen = experiments.load(name)
        home = testbed.folder_of(model)
        given = [r.split("=", 1) if "=" in r and not Path(r).exists() else (Path(r).stem, r) for r in records or ()]
        if not given and home is None:
            raise ComebaError("no records: add --records FILE (ZsRE, CounterFact, EasyEdit's form, or your own)")
        datasets = {label: read_requests(file) for label, file in given}
        if len(datasets) < len(given):
            raise ComebaError("two --records have the same name; write NAME=FILE")
        net, tokenizer = _load(model, device, dtype, trust=trust)
        if home and not datasets:
            datasets = {label: ReadResult(own, len(own), []) for label, own in testbed.datasets(home).items()}
        if home and samples is None:
            samples = chosen.testbed_samples
        # Perplexity is measured on other texts than the covariance is collected from: every tenth of the corpus.
        if texts:
            corpus = (text for n, text in enumerate(read_texts(texts)) if n % 10)
            plain = itertools.islice(read_texts(texts), 0, 10 * PLAIN_TEXTS, 10)
        else:
            corpus = testbed.texts(folder=home) if home else None
            plain = itertools.islice(testbed.texts(9, home), PLAIN_TEXTS) if home else ()
        result = experiments.run(
            chosen, net, tokenizer, datasets, out, covariance=Covariance.load(covariance) if covariance else None,
            texts=corpus, plain_texts=list(plain), samples=samples, seed=seed, progress=not as_json,
        )  # fmt: skip
        for dataset, counts in result["records"].items():
            report.say(f"{chosen.title} — {dataset}, {counts['used']} records")
            own = [row for row in result["rows"] if row["dataset"] == dataset]
            report.table(("case", "edits", *METRICS, "s/edit"),
                         [(r["case"], r["edits"], *(cell(r, m) for m in METRICS), cell(r, "seconds_per_edit")) for r in own])
            for row in own:
                if "error" in row:
                    report.say(f"{row['case']} failed after {row['edits']} edits: {row['error']}")
            _say_counts(report, counts)
        report.say(f"Written to {out}: " + ", ".join([f"{chosen.name}.json", f"{chosen.name}.md", *result["plots"]]))
        report.result = {**result, "out": str(out)}


@app.command()
def doctor(
    model: Annotated[Optional[str], typer.Argument(help="also look at a model: where and how it would be edited")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Versions, devices, compiled operations; what is missing and how to get it; what editing a model would mean."""
    from comeba_ext.doctor import examine, examine_model

    with _reporting(as_json) as report:
        found = examine()
        report.table(("what", "found"), [(k, str(v)) for k, v in found["found"].items()])
        if model is not None and not found["problems"]:
            found["model"], hints = examine_model(*_load(model, "cpu", "auto", trust=trust))
            found["hints"] += hints
            report.table((model, ""), [(k, str(v)) for k, v in found["model"].items()])
        for problem in found["problems"]:
            report.say(f"! {problem}")
        for hint in found["hints"]:
            report.say(f"  {hint}")
        report.say("Ready." if not found["problems"] else "Not ready.")
        report.result = found
        report.code = 3 if found["problems"] else 0


# -- parts ------------------------------------------------------------------------------------------------------


class _Report:
    """Where a command's output goes: tables and sentences, or one JSON object at the end."""

    def __init__(self, as_json: bool, first: bool = True):
        from rich.console import Console

        self.as_json, self.result, self.code = as_json, {}, 0
        self.first = first  # of several processes the one that prints and saves
        self.console = Console(quiet=as_json or not first, highlight=False, soft_wrap=False)
        self._widths: list[int] = []

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, head: tuple, rows: list[tuple]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def table_head(self, *names: str) -> None:
        self._widths = [max(9, len(name) + 2) for name in names]
        self.table_row(*names)

    def table_row(self, *cells: str) -> None:
        """A row of a table that grows while one watches."""
        self.say("".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)))


@contextlib.contextmanager
def _reporting(as_json: bool, parallel: bool = False):
    """Where a command runs: with its output, its exit code, and the other processes of its launcher, if any.

    Args:
        parallel: several processes share the command's work; other commands refuse to be started by a launcher of several.
    """
    from comeba_ext import distributed

    with distributed.process_group():
        rank, world = distributed.rank(), distributed.world_size()
        report = _Report(as_json, first=rank == 0)
        who = f" (process {rank} of {world})" if rank else ""
        _quiet_libraries()
        try:
            if world > 1 and not parallel:
                raise ComebaError("only 'covariance' and 'edit' share their work; start this command as a single process")
            yield report
        except ComebaError as error:
            _fail(as_json, str(error), 1, who)
        except KeyboardInterrupt:
            _fail(as_json, "interrupted; what was complete is kept", 130, who)
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            _fail(as_json, f"{error.filename or 'file system'}: {error.strerror or error}", 1, who)
        except Exception as error:
            _fail(as_json, _unforeseen(error), 1, who)
    if as_json and report.first:
        print(json.dumps({"version": __version__, **report.result}))
    if report.code:
        raise typer.Exit(report.code)


def _flat(found: dict) -> dict[str, float]:
    """Perplexity and every metric of every task, one name each."""
    rows = {name: value for name, value in found.items() if name != "tasks"}
    for task, metrics in found.get("tasks", {}).items():
        rows |= {f"{task} {name.partition(',')[0]}": value for name, value in metrics.items()
                 if "," in name and isinstance(value, (int, float))}  # fmt: skip
    return rows


def _unforeseen(error: Exception) -> str:
    """A sentence about an error that nobody thought of; where it came from is written to a file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="comeba-", suffix=".log", delete=False) as file:
        file.write(f"comeba_ext {__version__}, {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    what = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {what} (please report this, with {file.name})"


def _fail(as_json: bool, message: str, code: int, who: str = "") -> None:
    if as_json and not who:
        print(json.dumps({"version": __version__, "error": message}))
    else:
        print(f"error{who}: {message}", file=sys.stderr)
    raise typer.Exit(code) from None


def _quiet_libraries() -> None:
    """One voice on the terminal: Transformers' own bars and warnings off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(name: str, device: str | None, dtype: str, edits: Path | None = None, *, trust: bool = False):
    """Model and tokenizer, with saved edits if any."""
    import torch

    from comeba_ext import testbed
    from comeba_ext.loading import load_model
    from comeba_ext.saved_edits import load_edits

    if dtype not in DTYPES:
        raise ComebaError(f"unknown --dtype {dtype!r}; choose {', '.join(DTYPES)}")
    place = None if device == "auto" and not testbed.folder_of(name) else _device(device)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model, tokenizer = load_model(name, wanted, "auto" if place is None else None, trust_remote_code=trust)
    if place is not None:
        model = model.to(place)
    if edits is not None:
        load_edits(model, edits)
    return model, tokenizer


def _device(wanted: str | None) -> str:
    """The device asked for, or a GPU of this process's own, or the CPU."""
    import torch

    from comeba_ext import distributed

    count, own = torch.cuda.device_count(), distributed.local_rank()
    if wanted not in (None, "auto", "cuda"):
        try:
            place = torch.device(wanted)
        except RuntimeError:
            raise ComebaError(f"unknown --device {wanted!r}; choose cpu, cuda, cuda:N or auto") from None
        if place.type == "cuda" and count <= (place.index or 0):
            raise ComebaError(f"--device {wanted}: torch finds {count} GPUs; see 'comeba doctor'")
        if place.type == "meta":
            raise ComebaError("--device meta: nothing can be computed there; choose cpu, cuda, cuda:N or auto")
        try:
            torch.zeros(1, device=place)
        except Exception as error:  # of a kind that each backend chooses for itself
            raise ComebaError(f"--device {wanted}: torch cannot use it ({str(error).strip().splitlines()[0]})") from None
        return wanted
    if wanted == "cuda" and not count:
        raise ComebaError("--device cuda: torch finds no GPU; see 'comeba doctor'")
    if own >= count > 0:
        raise ComebaError(f"{own + 1} processes, but {count} GPUs: start one process a GPU, or add --device cpu")
    return f"cuda:{own}" if count or wanted == "cuda" else "cpu"


def _config(model, path: Path | None, method=None, scope: str | None = None):
    """Settings of a method (default COMEBA-HK): the model's defaults, what the file changes, the scope asked for."""
    from comeba_ext.editing.config import read_settings
    from comeba_ext.editing.editor import Editor
    from comeba_ext.methods import default_config

    changes = read_settings(path) if path else {}
    try:
        return default_config(method or Editor, model, **{**changes, **({"scope": scope} if scope else {})})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


@contextlib.contextmanager
def _edits_folder(out: Path | None, resume: bool = False, first: bool = True):
    """Inside, this process alone writes to a folder that takes files, and holds no edits unless they are to be gone on with."""
    from comeba_ext import distributed
    from comeba_ext.storage import MANIFEST, alone

    def enter() -> None:
        if out is None or not first:  # of several processes the first one saves
            return
        if (out / MANIFEST).exists() and not resume:
            raise ComebaError(f"{out} holds edits already; add --resume to 'comeba edit' to go on with them, or choose another --out")
        held.enter_context(alone(out))

    with contextlib.ExitStack() as held:
        distributed.together(enter)
        yield


def _check_same(
    editor, out: Path, kind, config: Path | None, scope: str | None, covariance: Path | None, texts: Path | None
) -> None:
    """Refuse options that say something else than the edits in ``out`` were made with."""
    from comeba_ext.corpus import digest_of
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import read_texts
    from comeba_ext.editing.config import read_settings

    if kind is not None and kind is not type(editor):
        raise ComebaError(f"{out} holds edits made by {editor.method}; --method {kind.method} cannot go on with them")
    given = {**(read_settings(config) if config else {}), **({"scope": scope} if scope else {})}
    wanted = _config(editor.model, config, type(editor), scope) if given else editor.config
    for key in given:
        here, there = getattr(wanted, key), getattr(editor.config, key)
        if here != there:
            raise ComebaError(f"the edits in {out} were made with {key} {there}, not {here}; their settings cannot change")
    known = editor.covariance
    if covariance is not None and known is not None:
        other = Covariance.load(covariance)
        if any(name not in other.moments or not other.moments[name].equal(known.moments[name]) for name in known.moments):
            raise ComebaError(f"the edits in {out} were made with another covariance than {covariance}")
    if texts is not None and known is not None and known.corpus and digest_of(read_texts(texts), known.texts) != known.corpus:
        raise ComebaError(f"the covariance of the edits in {out} is of other texts than {texts}")


def _requests(records: Path | None, limit: int | None, prompt: str | None, subject: str | None, target: str | None):
    """The records of a file, or the one edit that options name."""
    from comeba_ext.data import ReadResult, read_requests
    from comeba_ext.editing.request import EditRequest

    given = {"--prompt": prompt, "--subject": subject, "--target": target}
    missing = [name for name, value in given.items() if value is None]
    if (records is None) == (len(missing) == len(given)):
        raise ComebaError("give a file of records, or one edit with --prompt, --subject and --target")
    if records is not None:
        return read_requests(records, limit)
    if missing:
        raise ComebaError(f"{' and '.join(missing)} is missing: one edit is --prompt 'The capital of {{}} is' --subject … --target …")
    return ReadResult([EditRequest(prompt, subject, target)], 1, [])


def _say_settings(report: _Report, editor, steps: list[dict]) -> None:
    """What λ means for these keys, where that was measured."""
    shares = [share for step in steps for share in step["share"].values()]
    if shares:
        leverage = [value for step in steps for value in step["leverage"].values()]
        report.say(f"Blocks {list(editor.config.layers)}: keys of median leverage {_median(leverage):.0f} "
                   f"realise {_median(shares):.2f} of their residual alone (λ {editor.config.lam_of(_inputs(editor)):.0f}).")  # fmt: skip


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def _median(values: list[float]) -> float:
    from statistics import median

    return median(values)


def _inputs(editor) -> int:
    return next(iter(editor.layers.values())).in_features


def _provide_covariance(editor, model: str, file: Path | None, texts: Path | None, progress: bool) -> None:
    from comeba_ext import testbed
    from comeba_ext.data import read_texts

    if file is not None:
        editor.load_covariance(file)
    elif texts is not None:
        editor.collect_covariance(read_texts(texts), progress=progress)
    elif home := testbed.folder_of(model):
        editor.collect_covariance(testbed.texts(folder=home), progress=progress)
    else:
        raise ComebaError(
            f"no covariance: run 'comeba covariance {model} TEXTS --out FILE' once and add --covariance FILE, or add "
            "--texts TEXTS (plain text such as Wikipedia articles)"
        )


def _fitting(model, tokenizer, read) -> tuple[list, list[dict]]:
    """Records whose every prompt fits the model's context, and why the others do not."""
    from comeba_ext.evaluation.queries import check_context, record_queries

    skipped = list(read.skipped)
    used = []
    for position, request in read.placed():
        try:
            queries = record_queries(tokenizer, request, position)
            check_context(model, [query for own in queries.values() for query in own], position, request)
            used.append(request)
        except ComebaError as error:
            skipped.append({"index": position, "reason": str(error)})
    return used, skipped


def _continue(model, tokenizer, prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy continuations, up to the end of the first line."""
    import torch

    from comeba_ext.architectures import context_length
    from comeba_ext.editing.encoding import pad, pad_id

    limit = context_length(model)
    rows = [tokenizer(p)["input_ids"] for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ComebaError("a prompt is empty")
        if limit is not None and len(row) + new_tokens > limit:
            raise ComebaError(f"prompt {prompt[:40]!r}… and {new_tokens} new tokens exceed the context of {limit}")
    ids, mask = pad(rows, pad_id(tokenizer), "left", model.get_input_embeddings().weight.device)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
                             pad_token_id=pad_id(tokenizer))  # fmt: skip
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]


def _metric_row(metrics, name: str) -> tuple[str, ...]:
    from comeba_ext.evaluation.metrics import SCORES
    from comeba_ext.experiments.table import cell

    return (name, *(cell(metrics, name + suffix) for suffix in SCORES))


def _say_counts(report: _Report, counts: dict) -> None:
    report.say(f"Records: {counts['read']} read, {counts['used']} used, {len(counts['skipped'])} skipped.")
    for skip in counts["skipped"][:5]:
        report.say(f"  record {skip['index']}: {skip['reason']}")
    if len(counts["skipped"]) > 5:
        report.say(f"  … and {len(counts['skipped']) - 5} more (all with --json)")


def _size(model) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.1f}M parameters, {model.config.num_hidden_layers} blocks, {platform.machine()} {model.device.type}"


def main() -> None:
    app()


if __name__ == "__main__":
    main()
