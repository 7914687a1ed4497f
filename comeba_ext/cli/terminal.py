"""Where a command's output goes, and how it ends: tables and sentences, or one JSON object; one clear message for an error."""

from __future__ import annotations

import contextlib
import platform
import sys

import typer
from tqdm.auto import tqdm

from comeba_ext import __version__
from comeba_ext.errors import ComebaError
from comeba_ext.strict_json import strict_json

METRICS = ("reliability", "generality", "locality")  # of every table


class Report:
    """Where a command's output goes: tables and sentences, or one JSON object at the end."""

    def __init__(self, as_json: bool, first: bool = True):
        from rich.console import Console

        self.as_json, self.result, self.code = as_json, {}, 0
        self.first = first  # of several processes the one that prints and saves
        self.announced = False
        self.kept = "what was complete is kept"  # said of an interruption
        self.console = Console(quiet=as_json or not first, highlight=False, soft_wrap=False)
        self._widths: list[int] = []

    def say(self, text: str) -> None:
        with tqdm.external_write_mode():  # above a bar, not behind it
            self.console.print(text, markup=False)

    def announce(self) -> None:
        """The result now, of a command that goes on until it is stopped."""
        if self.as_json:
            print(strict_json({"version": __version__, **self.result}), flush=True)
        self.announced = True

    def table(self, head: tuple, rows: list[tuple]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(*head, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # three scores with their intervals fit 80 columns
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def table_head(self, *names: str, least: int = 9, gap: int = 2) -> None:
        """Of columns as wide as their names with a gap before, or ``least``."""
        self._widths = [max(least, len(name) + gap) for name in names]
        self.table_row(*names)

    def table_row(self, *cells: str) -> None:
        """A row of a table that grows while one watches."""
        self.say("".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)))


@contextlib.contextmanager
def reporting(as_json: bool, parallel: bool = False):
    """Where a command runs: with its output, its exit code, and the other processes of its launcher, if any.

    Args:
        parallel: several processes share the command's work; other commands refuse to be started by a launcher of several.
    """
    from comeba_ext import distributed

    with distributed.process_group():
        rank, world = distributed.rank(), distributed.world_size()
        report = Report(as_json, first=rank == 0)
        who = f" (process {rank} of {world})" if rank else ""
        quiet_libraries()
        try:
            if world > 1 and not parallel:
                raise ComebaError("only 'covariance', 'edit' and 'train' share their work; start this command as a single process")
            yield report
        except ComebaError as error:
            fail(as_json and not report.announced, str(error), 1, who)
        except KeyboardInterrupt:
            fail(as_json and not report.announced, f"interrupted; {report.kept}", 130, who)
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            if error.errno is None:  # no file: what libraries raise where a server is not reached
                fail(as_json and not report.announced, f"{type(error).__name__}: {error}", 1, who)
            fail(as_json and not report.announced, f"{error.filename or 'file system'}: {error.strerror or error}", 1, who)
        except Exception as error:
            fail(as_json and not report.announced, unforeseen(error), 1, who)
    if as_json and report.first and not report.announced:
        print(strict_json({"version": __version__, **report.result}))
    if report.code:
        raise typer.Exit(report.code)


def fail(as_json: bool, message: str, code: int, who: str = "") -> None:
    if as_json and not who:
        print(strict_json({"version": __version__, "error": message}))
    else:
        print(f"error{who}: {message}", file=sys.stderr)
    raise typer.Exit(code) from None


def unforeseen(error: Exception) -> str:
    """A sentence about an error that nobody thought of; where it came from is written to a file."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="comeba-", suffix=".log", delete=False) as file:
        file.write(f"comeba_ext {__version__}, {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    what = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {what} (please report this, with {file.name})"


def quiet_libraries() -> None:
    """One voice on the terminal: Transformers' own bars and warnings off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def counted(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"


def bytes_as_text(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def say_counts(report: Report, counts: dict) -> None:
    from comeba_ext.data import place_of

    among = [f"{counts[name]} {name}" for name in ("overtaken", "repeated") if counts.get(name)]
    more = f" ({', '.join(among)} by others of them)" if among else ""
    report.say(f"Records: {counts['read']} read, {counts['used']} used{more}, {len(counts['skipped'])} skipped.")
    for skip in counts["skipped"][:5]:
        report.say(f"  {place_of(skip)}: {skip['reason']}")
    if len(counts["skipped"]) > 5:
        report.say(f"  … and {len(counts['skipped']) - 5} more (all with --json)")


def say_settings(report: Report, editor, steps: list[dict]) -> None:
    """What λ means for these keys, where that was measured."""
    shares = [share for step in steps for share in step["share"].values()]
    if shares:
        leverage = [value for step in steps for value in step["leverage"].values()]
        report.say(
            f"Blocks {list(editor.config.layers)}: keys of median leverage {median(leverage):.0f} "
            f"realise {median(shares):.2f} of their residual alone (λ {editor.config.lam_of(inputs_of(editor)):.0f})."
        )


def inputs_of(editor) -> int:
    return next(iter(editor.layers.values())).in_features


def median(values: list[float]) -> float:
    from statistics import median

    return median(values)


def metric_table(report: Report, metrics, names, ways: dict[str, tuple[str, str]], explained: bool = False) -> None:
    """These metrics, scored in these ways, as far as they were; and, if wanted, what those mean."""
    from comeba_ext.experiments.table import cell

    there = {suffix: own for suffix, own in ways.items() if any(metrics.get(name + suffix) is not None for name in names)}
    if not there:
        return
    report.table(("", *(head for head, _ in there.values())), [(name, *(cell(metrics, name + way) for way in there)) for name in names])
    for head, meaning in there.values() if explained else ():
        report.say(f"{head}: {meaning}")


def flattened(found: dict) -> dict[str, float]:
    """Perplexity and every metric of every task, one name each."""
    rows = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    for task, metrics in found.get("tasks", {}).items():
        rows |= {
            f"{task} {name.partition(',')[0]}": value for name, value in metrics.items() if "," in name and isinstance(value, (int, float))
        }
    return rows


def size_of(model) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.1f}M parameters, {model.config.num_hidden_layers} blocks, {platform.machine()} {model.device.type}"
