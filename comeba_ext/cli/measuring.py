"""Commands that measure: ``eval``, ``ability``, ``experiment``."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Device, Dtype, Edits, Json, Limit, Model, Trust, Unstructured, app
from comeba_ext.cli.inputs import beside, fitting, loaded, some_usable
from comeba_ext.cli.terminal import METRICS, counted, flattened, metric_table, reporting, say_counts
from comeba_ext.errors import ComebaError
from comeba_ext.strict_json import strict_json

PLAIN_TEXTS = 400  # at most, to measure perplexity on in experiments


@app.command(name="eval")
def evaluate_(
    model: Model,
    records: Annotated[Path, typer.Argument(help="records: JSON, JSONL or CSV")],
    edits: Edits = None,
    base: Annotated[
        Optional[str],
        typer.Option(
            "--base",
            help="the model that MODEL was changed from, by whatever tool: locality is measured against it; MODEL may then be a file "
            "that EasyEdit's WISE saved",
        ),
    ] = None,
    generate: Annotated[bool, typer.Option(help="also measure greedy generation, cut at the answer's length")] = True,
    answer_tokens: Annotated[
        Optional[int], typer.Option(min=0, help="let the model write at most so many; 0: not at all (default: 32, with --long 256)")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="answers are paragraphs: let it write on past a sentence, score the likeness")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="ask in the model's chat template where it writes")] = False,
    judge: Annotated[Optional[str], typer.Option(help="URL of a chat endpoint of OpenAI's form that judges what was written")] = None,
    judge_model: Annotated[Optional[str], typer.Option(help="with --judge: which of its models")] = None,
    judge_key: Annotated[str, typer.Option(help="environment variable that holds its key, if it needs one")] = "OPENAI_API_KEY",
    verdicts: Annotated[Optional[Path], typer.Option(help="with --judge: JSON lines of verdicts, asked first and added to")] = None,
    texts: Annotated[
        Optional[Path], typer.Option(help="plain texts, as for covariance: what became of those that name no subject of the records")
    ] = None,
    predictions: Annotated[Optional[Path], typer.Option(help="write every record's scores and texts as JSONL")] = None,
    unstructured: Unstructured = False,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Reliability, generality and locality of a model, with or without saved edits, on the records of a file."""
    from comeba_ext.data import read_requests, read_texts
    from comeba_ext.evaluation import Judge, Writing, counterfact_scores, evaluate, predict_base
    from comeba_ext.evaluation.ability import UnrelatedText
    from comeba_ext.evaluation.probabilities import NAMES
    from comeba_ext.evaluation.ways import FORCED, HALLUCINATION, WRITTEN
    from comeba_ext.evaluation.written import ANSWER_TOKENS, LONG_TOKENS, likeness
    from comeba_ext.experiments.table import cell
    from comeba_ext.storage import writable, write_text

    with reporting(as_json) as report:
        if predictions is not None:
            writable(predictions)
        tokens = answer_tokens if answer_tokens is not None else LONG_TOKENS if long else ANSWER_TOKENS
        if judge is not None and (judge_model is None or not tokens):
            raise ComebaError("--judge needs --judge-model, and written answers (--answer-tokens)")
        asked = None if judge is None else Judge(judge, judge_model, os.environ.get(judge_key), kept=verdicts)
        if not tokens and (long or chat):
            raise ComebaError("--long and --chat are about written answers, and --answer-tokens 0 asks for none")
        if long:
            likeness()  # what it needs may not be installed, which is to be said before the model is asked
        plain = None if texts is None else list(itertools.islice(read_texts(texts), PLAIN_TEXTS))
        reading = None if plain is None else UnrelatedText(plain, progress=not as_json)
        read = read_requests(records, limit, unstructured=unstructured)
        writing, against, about = Writing(tokens, chat, long) if tokens else None, None, None
        beyond: dict = {}  # measured beside; what was measured so far is not to be lost to what comes behind
        foreign = beside(model, base, edits)
        if base is not None and foreign is None:  # before MODEL is there, so that one at a time takes memory
            net, asking = loaded(base, device, dtype, trust=trust)
            about = fitting(net, asking, read)[0]
            against = predict_base(net, asking, about, generate=generate, writing=writing, progress=not as_json)
            if reading is not None:
                beyond |= _or_error("text", lambda: reading.read_base(net, asking, about) or {})
            del net
        net, tokenizer = loaded(model if foreign is None else base, device, dtype, edits, trust=trust)
        if foreign is not None:
            foreign.onto(net)
        elif base is not None:
            if asking.get_vocab() != tokenizer.get_vocab():
                raise ComebaError(f"--base {base}: its tokenizer is not that of {model}, so it cannot be what that was made from")
            tokenizer = asking  # one for both
        used, skipped = fitting(net, tokenizer, read)
        some_usable(records, read.read, used, skipped)
        metrics = evaluate(net, tokenizer, used, against, generate=generate, writing=writing, judge=asked, progress=not as_json)
        if predictions is not None:
            write_text(predictions, "".join(strict_json(row) + "\n" for row in metrics.per_record))
        if any(request.ground_truth for request in used):
            beyond |= _or_error("success", lambda: counterfact_scores(net, tokenizer, used).to_dict())
        if reading is not None and "text_error" not in beyond:
            beyond |= _or_error("text", lambda: reading(net, tokenizer, about or used))
        names = [m for m in (*METRICS, "portability") if metrics.get(m) is not None]
        for ways in (WRITTEN, FORCED):
            metric_table(report, metrics, names, ways, explained=True)
        unwritable = {name: count for name in (*METRICS, "portability") if (count := metrics.get(f"{name}_unwritable"))}
        if unwritable:
            which = ", ".join(f"{count} of {metrics[f'{name}_prompts']} ({name})" for name, count in unwritable.items())
            report.say(f"Left out as written: {which}: no right answer can be written in {tokens} tokens and one sentence (see --long).")
        if beyond.get("efficacy_score") is not None:
            rows = [(name, cell(beyond, f"{name}_score"), cell(beyond, f"{name}_magnitude")) for name in NAMES]
            report.table(("", "success", "magnitude"), rows)
            report.say("success: the wanted answer is more likely than the other; magnitude: by how much, in probability")
        if "text_changed" in beyond:
            report.say(
                f"Unrelated text ({beyond['text_tokens']:,} tokens): {beyond['text_changed']:.2%} of the next tokens are others; "
                f"perplexity {beyond['perplexity']:.2f}, unedited {beyond['perplexity_before']:.2f}."
            )
        for name in ("success", "text"):
            if f"{name}_error" in beyond:
                report.say(f"! {name}: {beyond[f'{name}_error']}")
        if metrics.get("hallucination") is not None:
            report.say(f"Hallucination {cell(metrics, 'hallucination')}: {HALLUCINATION}")
        report.say(f"Locality compares with {base or 'the unedited model'} instead of an answer.")
        if "judge_error" in metrics:
            report.say(f"! {metrics['judge_error']}")
        elif asked is not None:
            of = metrics["judge"]["answers"]
            report.say(f"Judge: {counted(of, 'answer')}, {asked.asked} of them asked of {judge_model}, {asked.nothing} without a verdict.")
        if questions := metrics.get("questions"):
            head = ("question", "written", "contained", "counted")
            rows = [
                (name, cell(own, "written"), cell(own, "contained"), f"{own['counted']} of {own['questions']}")
                for name, own in questions.items()
            ]
            report.table(head, rows)
        counts = read.counts(used, skipped)
        say_counts(report, counts)
        report.result = {
            **metrics.to_dict(),
            **beyond,
            "records": counts,
            "data": str(records),
            "model": model,
            "edits_folder": str(edits) if edits else None,
            "base": base,
            "predictions": str(predictions) if predictions else None,
            "command": shlex.join(["comeba", *sys.argv[1:]]),
        }


def _or_error(name: str, measure) -> dict:
    """What a measure found, or ``<name>_error``: why it could not."""
    try:
        return measure()
    except ComebaError as error:
        return {f"{name}_error": str(error)}
    except Exception as error:  # of the harness, the hub, the device: what others measured is not to be lost to it
        return {f"{name}_error": f"{type(error).__name__}: {error}"}


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
    from comeba_ext.evaluation.ability import check_harness
    from comeba_ext.layers.attachment import disabled

    with reporting(as_json) as report:
        names = [task for task in (tasks or "").split(",") if task]
        if texts is None and not names:
            raise ComebaError("nothing to measure: give --texts, --tasks, or both")
        chosen = None if texts is None else list(itertools.islice(read_texts(texts), limit))
        net, tokenizer = loaded(model, device, dtype, edits, trust=trust)
        if names:
            check_harness(net)  # before the unedited model is measured, which takes long

        def measured() -> dict:
            found = {} if chosen is None else {"perplexity": perplexity(net, tokenizer, chosen, progress=not as_json)}
            if names:
                # It writes to stdout.
                with contextlib.redirect_stdout(sys.stderr):
                    found |= _or_error("tasks", lambda: {"tasks": harness(net, tokenizer, names, task_folder, limit=limit)})
            return found

        with disabled(net):
            columns = {"unedited": measured()}
        if edits is not None:
            columns["edited"] = measured()
        flat = {name: flattened(found) for name, found in columns.items()}
        rows = dict.fromkeys(row for own in flat.values() for row in own)
        report.table(("", *columns), [(row, *(f"{own[row]:.4g}" if row in own else "–" for own in flat.values())) for row in rows])
        failed = {name: found["tasks_error"] for name, found in columns.items() if "tasks_error" in found}
        if failed and chosen is None and len(failed) == len(columns):
            raise ComebaError(next(iter(failed.values())))
        for name, error in failed.items():
            report.say(f"! {name}: {error}")
        counts = {"read": len(chosen or ()), "used": len(chosen or ()), "skipped": []}
        report.result = {**columns, "records": counts, "edits_folder": str(edits) if edits else None}


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="folders that 'comeba experiment' wrote, or JSON files: theirs, or what 'comeba eval --json' printed"),
    ],
    out: Annotated[Path, typer.Option("--out", help="the page")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="over the page")] = "Knowledge editing: results",
    as_json: Json = False,
) -> None:
    """One HTML page from experiments and evaluations: tables that sort, plots, who is ahead of whom, examples with wrong ones first."""
    from comeba_ext import report as page
    from comeba_ext.storage import write_text

    with reporting(as_json) as say:
        found = [own for folder in results for own in page.read(folder)]
        if not out.parent.is_dir():
            raise ComebaError(f"--out {out}: there is no folder {out.parent}")
        write_text(out, page.build(found, title))
        size = out.stat().st_size
        say.say(f"{counted(len(found), 'result')} in {out} ({size / 1e3:.0f} kB)")
        say.result = {"out": str(out), "experiments": [own.result["experiment"] for own in found], "bytes": size}


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="a shipped experiment (table1, table2, fig3 …, scope), or a YAML file")],
    out: Annotated[Path, typer.Option("--out", help="folder for table, JSON and plots; an unfinished run goes on there")],
    model: Annotated[str, typer.Option("--model", help="local model folder, hub name, or 'testbed'")] = "testbed",
    records: Annotated[
        Optional[list[str]],
        typer.Option("--records", help="FILE or NAME=FILE, any number (default for testbed: its own facts)"),
    ] = None,
    unstructured: Unstructured = False,
    samples: Annotated[Optional[int], typer.Option("--samples", min=1, help="records a data set")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="other than 0: take the records in random order")] = 0,
    cases: Annotated[
        Optional[list[str]],
        typer.Option("--case", help="run this one, any number; the table holds what is complete of the others too"),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="processes at once, each with cases of its own (they share the GPUs)")] = 1,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance', of all layers edited")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus for the covariance, and for perplexity")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Run an experiment: methods and settings under one protocol, into a table, JSON and plots."""
    from comeba_ext import experiments, methods, testbed
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import ReadResult, read_requests, read_texts
    from comeba_ext.evaluation.ways import WAYS
    from comeba_ext.experiments.table import cell, leading_way

    with reporting(as_json) as report:
        chosen = experiments.load(name)
        home = testbed.folder_of(model)
        given = [r.split("=", 1) if "=" in r and not Path(r).exists() else (Path(r).stem, r) for r in records or ()]
        if not given and home is None:
            raise ComebaError("no records: add --records FILE (ZsRE, CounterFact, EasyEdit's form, or your own)")
        datasets = {label: read_requests(file, unstructured=unstructured) for label, file in given}
        if len(datasets) < len(given):
            raise ComebaError("two --records have the same name; write NAME=FILE")
        failed, cases = [], cases or None
        if jobs > 1:
            wanted = cases or [case.label for case in chosen.cases]
            failed, cases = list(experiments.in_processes(wanted, jobs, out, chosen.name, progress=not as_json)), []
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        if home and not datasets:
            datasets = {label: ReadResult(own, len(own), []) for label, own in testbed.datasets(home).items()}
        if home and samples is None:
            samples = chosen.testbed_samples
        # Perplexity is measured on other texts than the covariance is collected from: every tenth of the corpus.
        if texts:
            corpus = (text for n, text in enumerate(read_texts(texts)) if n % 10)
            plain = itertools.islice(read_texts(texts), 0, 10 * PLAIN_TEXTS, 10)
        else:
            corpus = None
            plain = itertools.islice(testbed.texts(9, home), PLAIN_TEXTS) if home else ()
        known = Covariance.load(covariance) if covariance else None
        if known is None and home and not texts and any(methods.method_named(case.method).needs_covariance for case in chosen.cases):
            known = testbed.covariance(net, tokenizer, home, progress=not as_json)
        result = experiments.run(
            chosen,
            net,
            tokenizer,
            datasets,
            out,
            covariance=known,
            texts=corpus,
            plain_texts=list(plain),
            samples=samples,
            seed=seed,
            cases=cases,
            command=shlex.join(["comeba", *sys.argv[1:]]),
            progress=not as_json,
        )
        for dataset, counts in result["records"].items():
            report.say(f"{chosen.title} — {dataset}, {counts['used']} records")
            own = [row for row in result["rows"] if row["dataset"] == dataset]
            way = leading_way(own)
            report.table(
                ("case", "edits", *METRICS, "s/edit"),
                [(r["case"], r["edits"], *(cell(r, m + way) for m in METRICS), cell(r, "seconds_per_edit")) for r in own],
            )
            for row in own:
                if "error" in row:
                    report.say(f"{row['case']} failed after {row['edits']} edits: {row['error']}")
            report.say(f"{WAYS[way][0]}: {WAYS[way][1]}")
            say_counts(report, counts)
        report.say(f"Written to {out}: " + ", ".join([f"{chosen.name}.json", f"{chosen.name}.md", *result["plots"]]))
        report.result = {**result, "out": str(out)}
        failed += result["not_run"]
        if failed:
            raise ComebaError(f"{counted(len(failed), 'case')} did not end, the same command goes on with them. " + " ".join(failed))
