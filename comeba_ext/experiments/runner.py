"""Running an experiment: every case on every data set, into JSON, a Markdown table and plots; resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import random
import re
from pathlib import Path

import torch
from filelock import FileLock

from comeba_ext import __version__, methods
from comeba_ext.covariance import Covariance, covariance_of_blocks
from comeba_ext.data import ReadResult
from comeba_ext.editing.config import EditConfig
from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError, ConfigError, StorageError
from comeba_ext.evaluation import Protocol, Result, run_protocol
from comeba_ext.evaluation.comparing import pairs
from comeba_ext.evaluation.metrics import METRICS, record_means
from comeba_ext.evaluation.protocols import complete_result
from comeba_ext.evaluation.queries import check_record
from comeba_ext.evaluation.written import likeness
from comeba_ext.experiments import measures, table
from comeba_ext.experiments.definition import ALL, Case, Experiment
from comeba_ext.experiments.kept_base import kept_base
from comeba_ext.experiments.rows import rows_of
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.machine import machine, versions
from comeba_ext.storage import digest_of, make_folder, write_text
from comeba_ext.strict_json import strict_json
from comeba_ext.text.request import EditRequest, cases_of

log = logging.getLogger(__name__)


def run(
    experiment: Experiment,
    model: torch.nn.Module,
    tokenizer,
    datasets: dict[str, ReadResult],
    out: str | Path,
    *,
    covariance: Covariance | None = None,
    texts=None,
    plain_texts: list[str] = (),
    samples: int | None = None,
    seed: int = 0,
    cases: list[str] | None = None,
    command: str | None = None,
    progress: bool = False,
) -> dict:
    """Run every case on every data set.

    Args:
        model: unedited; given back as it came.
        datasets: records to edit, under names.
        out: folder for ``<name>.json``, ``<name>.md``, the plots, and a folder a case with its log. A run that was
            interrupted goes on there.
        covariance: of all layers that are edited; or
        texts: corpus to collect it from (kept in ``out``, where the next experiment finds it).
        plain_texts: for the measure ``text``.
        samples: records a data set, default the experiment's.
        cases: labels; only these are run. Tables and plots hold them, and those of the others that are complete in ``out``: processes
            that each run some of them share the folder.
        command: what was typed, for the report's "how to run it again".
        seed: of the intervals, and, where it is not 0, of the order in which records are taken from a data set.

    Returns:
        JSON-serialisable: ``experiment``, ``title``, ``protocol``, ``samples``, ``seed``, ``version``, ``machine``, ``versions``,
        ``command``, ``plot`` (its kind), ``rows`` (``dataset``, ``method``, ``case``, ``log`` (its folder in ``out``),
        ``edits``, every metric with its interval, ``None`` where there is nothing to ask, efficiency, what was measured beside, at the
        end of a consecutive run ``retention`` (:func:`~comeba_ext.evaluation.comparing.retention`); where a method could not go on, a
        last row with ``error``), ``differences`` by data set (:func:`~comeba_ext.evaluation.comparing.pairs`, of the scores that
        lead), ``not_run`` (a sentence for every case that could not take a data set's records, or for which memory did not suffice; its
        row says so too, and the same command tries it again), ``records`` by data set, ``plots`` (file names).

    Raises:
        ComebaError: no usable record, no covariance, no texts to measure on, a case's settings do not fit the model, or ``out`` holds
            another run of a case; nothing was run.
    """
    out = make_folder(out)
    if experiment.long and experiment.writing is not None:
        likeness()  # what it needs may not be installed
    if "text" in experiment.measures and not plain_texts:
        raise ComebaError("the measure 'text' needs texts: add --texts")
    samples = samples or experiment.samples
    chosen = _chosen(experiment, cases)
    configs = {case.label: _checked_config(model, case) for case in chosen}
    for case in experiment.cases:
        if case not in chosen:  # only read, where it is complete
            with contextlib.suppress(ComebaError):  # its settings name a file that is not here
                configs[case.label] = _checked_config(model, case)
    there = [case for case in experiment.cases if case.label in configs]
    kept = out / "covariance.safetensors"
    asking = there if kept.exists() else chosen  # to read the logs of the others takes the same
    needing = [configs[case.label] for case in asking if methods.method_named(case.method).needs_covariance]
    for config in needing if covariance is not None else ():  # before the first case, not before the one that needs it
        covariance.check(model, _widths(model, config))
    if needing and covariance is None:
        covariance = _collect(model, tokenizer, texts, needing, kept, progress)
    used, records = {}, {}
    for dataset, read in datasets.items():
        used[dataset], skipped = _usable(model, tokenizer, dataset, read, samples, seed)
        records[dataset] = read.counts(used[dataset], skipped)
    work = _Work(experiment, model, tokenizer, out, seed, covariance, configs, used, _identity(experiment, plain_texts))
    for dataset, case in itertools.product(datasets, chosen):
        work.results_of(dataset, case)  # a log of another run is said before the first case is run
    ran, not_run = work.run(chosen, list(plain_texts), progress)
    rows, last = work.rows(there, chosen, ran)
    result = {
        "experiment": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "note": experiment.note,
        "protocol": experiment.protocol,
        "samples": samples,
        "seed": seed,
        "version": __version__,
        "machine": machine(),
        "versions": versions(),
        "command": command,
        "plot": experiment.plot,
        "rows": rows,
        "differences": {dataset: pairs(own, _leading(rows, dataset)) for dataset, own in last.items() if len(own) > 1},
        "not_run": not_run,
        "records": records,
        "expected": list(experiment.expected),
        "plots": [],
    }
    _write(result, out)
    result["plots"] = _plots(result, experiment, out)
    _write(result, out)
    return result


@dataclasses.dataclass
class _Work:
    """Cases on data sets: run, or read from their logs.

    Args:
        configs: of every case that can be run or read, by its label.
        used: the records of every data set.
        identity: what tells a run from others beside what :func:`run_protocol` knows.
    """

    experiment: Experiment
    model: torch.nn.Module
    tokenizer: object
    out: Path
    seed: int
    covariance: Covariance | None
    configs: dict[str, EditConfig]
    used: dict[str, list[EditRequest]]
    identity: dict

    def results_of(self, dataset: str, case: Case, **asking) -> list[Result | None]:
        """A case's result of every order: run, where it is said what with; else read, ``None`` where it is not complete.

        Raises:
            StorageError: a log is of another run.
        """
        method, records = methods.method_named(case.method), self.used[dataset]
        what = {"method": method, "config": self.configs[case.label], "covariance": self.covariance if method.needs_covariance else None}
        run = functools.partial(run_protocol, self.model, self.tokenizer, **asking)
        result_of = run if asking else functools.partial(complete_result, self.model)
        protocol, own = _protocol(self.experiment, case, len(records), self.seed), self.out / _place(self.experiment, dataset, case)
        given = [(_in_order(records, n), protocol, own / (f"order-{n}" if n else "")) for n in range(self.experiment.orders)]
        return [result_of(*one, **what, identity=self.identity) for one in given]

    def run(self, cases: tuple[Case, ...], plain_texts: list[str], progress: bool) -> tuple[dict, list[str]]:
        """Results by data set and label; and a sentence for each that could not be run."""
        own = self.experiment
        tasks = measures.Tasks(own.tasks, own.task_folder, own.task_limit)
        measure = measures.make(own.measures, plain_texts, progress, tasks)
        how = {"generate": own.generate, "writing": own.writing, "progress": progress}
        ran, not_run = {}, []
        for dataset, records in self.used.items():
            told = self.out / own.name / slug(dataset) / "base.json"
            # Not asked where every log is complete.
            base = functools.cache(functools.partial(kept_base, told, self.model, self.tokenizer, records, **how))
            for case in cases:
                try:
                    ran[dataset, case.label] = self.results_of(dataset, case, base=base, measure=measure, progress=progress)
                except StorageError:
                    raise
                except (ComebaError, torch.OutOfMemoryError) as error:  # the others' hours are not to be lost to it
                    not_run.append(f"{dataset}, {case.label}: {error}")
                    ran[dataset, case.label] = [Result(failed=0, error=f"not run: {error}")]
        return ran, not_run

    def rows(self, cases: list[Case], chosen: tuple[Case, ...], ran: dict) -> tuple[list[dict], dict[str, dict[str, list[dict]]]]:
        """The table's rows, and by data set and label the records' own of those that did not fail: of what was ``ran``, and of what other
        processes have completed."""
        rows, last = [], {}
        for dataset, case in itertools.product(self.used, cases):  # what others ran is read last, when most of it is complete
            method, config = methods.method_named(case.method), self.configs[case.label]
            if case not in chosen and self.covariance is None and method.needs_covariance:
                continue
            try:
                results = ran.get((dataset, case.label)) or self.results_of(dataset, case)
            except StorageError as error:  # of a case that was not to be run
                log.warning("%s, %s is left out: %s", dataset, case.label, error)
                continue
            if None in results:
                continue
            about = {
                "dataset": dataset,
                "method": case.method,
                "case": case.label,
                "log": _place(self.experiment, dataset, case).as_posix(),
                "batch_size": _protocol(self.experiment, case, len(self.used[dataset]), self.seed).batch_size,
                "settings": config.to_dict(),
                **method.preparation(config),
            }
            rows += [{**about, **row} for row in rows_of(results, self.seed)]
            if all(result.error is None for result in results):  # one that failed was asked after fewer edits
                last.setdefault(dataset, {})[case.label] = record_means([result.final.per_record for result in results])
            for result in results:
                if result.error is None:
                    log.info("%s, %s: reliability %.3f", dataset, case.label, result.final.reliability)
                else:
                    log.warning("%s, %s: failed after %d edits: %s", dataset, case.label, result.failed, result.error)
        return rows, last


def _identity(experiment: Experiment, plain_texts: list[str]) -> dict:
    """What tells its runs from others beside what :func:`run_protocol` knows."""
    return {
        "measures": list(experiment.measures),
        "tasks": list(experiment.tasks) or None,
        "task_limit": experiment.task_limit,
        "task_folder": _digest_of_folder(experiment.task_folder),
        "texts": hashlib.sha256("\n".join(plain_texts).encode()).hexdigest()[:16],
    }


def _chosen(experiment: Experiment, labels: list[str] | None) -> tuple[Case, ...]:
    known = {case.label: case for case in experiment.cases}
    unknown = [label for label in labels or () if label not in known]
    if unknown:
        raise ComebaError(f"no case {unknown[0]!r} in {experiment.name}; there are {', '.join(known)}")
    return tuple(case for case in experiment.cases if labels is None or case.label in labels)


def _checked_config(model: torch.nn.Module, case: Case) -> EditConfig:
    """A case's settings for a model.

    Raises:
        ConfigError: one that is unknown, out of range, or does not fit the model.
    """
    config = case.config(model)
    try:
        methods.method_named(case.method).check(config, model, Architecture.of(model, config.blocks, config.projection))
    except ConfigError as error:
        raise ConfigError(f"case {case.label!r}: {error}") from None
    return config


def _digest_of_folder(folder: str | None) -> str | None:
    """What tells the files of a folder from others."""
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    known = hashlib.sha256()
    for path in files:
        known.update(f"{path.relative_to(folder)}\n{digest_of(path)}\n".encode())
    return known.hexdigest()[:16]


def _write(result: dict, out: Path) -> None:
    write_text(out / f"{result['experiment']}.json", strict_json(result, indent=1) + "\n")
    write_text(out / f"{result['experiment']}.md", table.markdown(result))


def _usable(model, tokenizer, name: str, read: ReadResult, samples: int, seed: int) -> tuple[list[EditRequest], list[dict]]:
    """The first ``samples`` records that can be edited and asked, and why those passed over cannot."""
    editor = Editor(model, tokenizer)

    def check(_: int, request: EditRequest) -> None:
        check_record(model, tokenizer, request)
        editor.check([dataclasses.replace(request, request_id=None)])  # with the prefixes that editing puts before it

    try:
        used, skipped = read.usable(check, limit=samples, seed=seed)
    finally:
        editor.close()
    if not used:
        raise ComebaError(f"{name}: no record can be used; {skipped[0]['reason'] if skipped else 'it is empty'}")
    return used, skipped


def _place(experiment: Experiment, dataset: str, case: Case) -> Path:
    """A case's folder, in the experiment's."""
    return Path(experiment.name, slug(dataset), slug(case.label))


def _protocol(experiment: Experiment, case: Case, count: int, seed: int) -> Protocol:
    asked = case.settings.get("batch_size", experiment.batch_size)
    size = count if asked == ALL else min(asked, count)
    stops = {max(1, round(count * (n + 1) / experiment.evaluations)) for n in range(experiment.evaluations)}
    return Protocol(experiment.protocol, size, tuple(sorted(stops)), generate=experiment.generate, writing=experiment.writing, seed=seed)


def _collect(model, tokenizer, texts, configs: list[EditConfig], path: Path, progress: bool) -> Covariance:
    """The covariance of every layer that any case edits, from one corpus pass."""
    if texts is None and not path.exists():
        raise ComebaError("no covariance: add --covariance FILE (see 'comeba covariance'), or --texts to collect it from")
    blocks = {block for config in configs for block in config.layers}
    architecture = Architecture.of(model, configs[0].blocks, configs[0].projection)
    with FileLock(path.with_name(f".{path.stem}.lock")):  # one of several processes collects, the others find it
        return covariance_of_blocks(model, tokenizer, texts or [], blocks, architecture, path=path, progress=progress)


def _widths(model, config: EditConfig) -> dict[str, int]:
    """Name to ``d_in`` of every layer that a case edits."""
    architecture = Architecture.of(model, config.blocks, config.projection)
    names = [architecture.projection_name(block) for block in config.layers]
    return {name: shape_of(model.get_submodule(name))[0] for name in names}


def _in_order(used: list[EditRequest], order: int) -> list[EditRequest]:
    """The records in the file's order, which is number 0, or in another; what belongs together stays together."""
    cases = cases_of(used)
    if order:
        random.Random(order).shuffle(cases)
    return [request for own in cases for request in own]


def _leading(rows: list[dict], dataset: str) -> list[str]:
    """The scores that lead, of a data set."""
    way = table.leading_way([row for row in rows if row["dataset"] == dataset])
    return [*(name + way for name in METRICS), "hallucination"]


def slug(text: str) -> str:
    """A name for files: letters, digits, dots and dashes; where others had to go, a few digits tell two texts apart."""
    plain = re.sub(r"[^\w.=-]+", "-", text).strip("-.")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def _plots(result: dict, experiment: Experiment, out: Path) -> list[str]:
    from comeba_ext.experiments import plots  # matplotlib takes a second to import

    return plots.draw(result, experiment.plot, {name: out / f"{experiment.name}-{slug(name)}.png" for name in result["records"]})
