"""An experiment's rows as a Markdown table."""

from __future__ import annotations

from collections import Counter

from comeba_ext.evaluation.queries import METRICS
from comeba_ext.evaluation.ways import HALLUCINATION, WAYS

_HEADS = {way: f", {head}" if way else "" for way, (head, _) in WAYS.items()}  # teacher-forced ones have the bare name, as everywhere
COLUMNS = (
    *((metric + way, metric + head) for way, head in _HEADS.items() for metric in METRICS),
    ("hallucination", "hallucination"),
    ("other_facts", "other facts as before"),
    ("other_facts_hallucination", "new object in other facts"),
    ("score", "CounterFact score"),
    ("efficacy_score", "efficacy"),
    ("paraphrase_score", "paraphrase"),
    ("neighborhood_score", "neighborhood"),
    ("efficacy_magnitude", "efficacy, magnitude"),
    ("paraphrase_magnitude", "paraphrase, magnitude"),
    ("neighborhood_magnitude", "neighborhood, magnitude"),
    ("fluency", "fluency (bits)"),
    ("fluency_before", "fluency, unedited"),
    ("reliability_short", "reliability, short prompts"),
    ("reliability_long", "reliability, long prompts"),
    ("generality_short", "generality, short prompts"),
    ("generality_long", "generality, long prompts"),
    ("locality_short", "locality, short prompts"),
    ("locality_long", "locality, long prompts"),
    ("reliability_behind_text", "reliability behind text"),
    ("generality_behind_text", "generality behind text"),
    ("locality_behind_text", "locality behind text"),
    ("padding_agreement", "same unpadded"),
    ("text_changed", "text changed"),
    ("perplexity", "perplexity"),
    ("perplexity_before", "perplexity, unedited"),
    ("in_scope_edited", "in scope, edited"),
    ("in_scope_rephrased", "in scope, rephrased"),
    ("in_scope_other", "in scope, other"),
    ("told_apart", "edited above other"),
    ("seconds_per_edit", "s/edit"),
    ("prompt_slowdown", "slow-down of a prompt"),
    ("token_slowdown", "slow-down of a token"),
    ("peak_memory", "peak MB"),
    ("edits_bytes", "edits MB"),
    ("saved_bytes", "saved MB, to go on"),
    ("orders", "orders"),
    ("training_seconds", "training, s"),
    ("training_peak_memory", "training, peak MB"),
    ("training_bytes", "editor MB"),
)
MEGABYTES = {
    "peak_memory": 0,
    "edits_bytes": 2,
    "saved_bytes": 1,
    "training_peak_memory": 0,
    "training_bytes": 1,
}  # digits behind the point


def markdown(result: dict) -> str:
    """Title, one table a data set (95 % intervals in brackets), the published numbers where they are known."""
    lines = [f"# {result['title']}", ""]
    facts = [f"protocol: {result['protocol'].replace('_', ' ')}", f"{result['samples']} samples asked for"]
    if result["paper"]:
        facts.insert(0, f"paper: {result['paper']}")
    lines += ["; ".join(facts) + ". 95 % bootstrap intervals over records in brackets.", ""]
    if result["note"]:
        lines += [result["note"], ""]
    for dataset, counts in result["records"].items():
        own = [row for row in result["rows"] if row["dataset"] == dataset]
        lines += [f"## {dataset} ({counts['used']} records, {len(counts['skipped'])} skipped)", "", *_table(own, result), ""]
        lines += [*_asked(own), *_ahead(result.get("differences", {}).get(dataset, {})), ""]
    lines += [*_meanings(result["rows"]), ""]
    for row in result["rows"]:
        if "error" in row:
            lines += [f"{row['dataset']}, {row['case']}: {row['error']}", ""]
    lines += [line for own in _missing(result["rows"]) for line in (own, "")]
    if not result["expected"]:
        lines += ["The paper's own numbers are not printed: none is entered under `expected` in this experiment's file.", ""]
    return "\n".join(lines)


def _asked(rows: list[dict]) -> list[str]:
    """How many prompts a score is of, and how many of them no right answer can be written to."""
    row = next((row for row in reversed(rows) if "error" not in row), {})
    parts = [f"{row[f'{name}_prompts']} ({name})" for name in METRICS if row.get(f"{name}_prompts")]
    found = [f"Prompts asked: {', '.join(parts)}."] if parts else []
    left = [f"{count} ({name})" for name in METRICS if (count := row.get(f"{name}_unwritable"))]
    if left:
        found.append(f"Left out as written, since no right answer can be written so: {', '.join(left)}.")
    counted = [f"{own['counted']} of {own['questions']} ({name})" for name, own in row.get("questions", {}).items()]
    return found + ([f"Questions counted: {', '.join(counted)}."] if counted else [])


def _ahead(differences: dict[str, list[dict]]) -> list[str]:
    """Who is ahead of whom, score by score: only where the interval of the paired differences does not hold 0."""
    found = []
    for key, pairs in differences.items():
        apart = [pair for pair in pairs if pair["apart"]]
        names = list(dict.fromkeys(pair["ahead"] for pair in apart))
        said = [f"{name} of {', '.join(pair['behind'] for pair in apart if pair['ahead'] == name)}" for name in names]
        name = dict(COLUMNS).get(key, key)
        found.append(f"Ahead in {name} (paired over records, 95 %): {'; '.join(said)}." if said else f"Nobody is ahead in {name}.")
    return [line for own in found for line in (own, "")]


def _missing(rows: list[dict]) -> list[str]:
    """Why measures have no number, a line each, and in how many rows of a case."""
    found = Counter(
        (row["dataset"], row["case"], key.removesuffix("_error"), why) for row in rows for key, why in row.items() if key.endswith("_error")
    )
    return [f"{dataset}, {case}: no {name} in {n} row{'s'[: n > 1]}: {why}" for (dataset, case, name, why), n in found.items()]


def _meanings(rows: list[dict]) -> list[str]:
    """What the columns are, a line each."""
    there = lambda key: any(row.get(key) is not None for row in rows)  # noqa: E731
    found = []
    for way, (head, meaning) in WAYS.items():
        if there(f"reliability{way}"):
            found.append(f"* {head if way else f'reliability, generality, locality, portability ({head})'}: {meaning}.")
    if found:
        found.append("* locality, in every way: the unedited model's own answer instead of the record's.")
    if any(row.get("orders") for row in rows):
        found.append("* ±: standard deviation over the orders that the records came in; scores are means over them.")
    if there("hallucination"):
        found.append(f"* hallucination: {HALLUCINATION}.")
    if there("other_facts"):
        found.append(
            "* other facts: what is written to up to five questions about each of at most 100 edited subjects, which no edit is about."
        )
    if there("token_slowdown"):
        found.append(
            "* slow-down of a prompt, of a token: time to the first written token, and of each further one, over the model's before."
        )
    if there("edits_bytes"):
        found.append("* edits MB: what is stored to use the edits; saved MB: to go on editing too.")
    if there("told_apart"):
        found.append(
            "* edited above other: the chance that an edited prompt's highest score lies above another fact's prompt's, best layer."
        )
    if there("efficacy_score"):
        found.append(
            "* efficacy, paraphrase: the new answer is more likely than the old one; neighborhood: a locality prompt's own answer is."
        )
        found.append("* magnitude: by how much, in probability. CounterFact score: harmonic mean of the three shares.")
    if there("text_changed"):
        found.append("* text changed: share of plain text's next tokens that are others than the unedited model's.")
    return found


def _table(rows: list[dict], result: dict) -> list[str]:
    criteria = dict.fromkeys(criterion for row in rows for criterion in row.get("questions", ()))
    rows = [row | by_column(row.get("questions", {})) | _of_tasks(row.get("abilities", {})) for row in rows]
    known = [(f"{criterion}_{way}", f"{criterion}, {way}") for way in ("written", "contained") for criterion in criteria]
    able = dict.fromkeys(name for row in rows for name in _of_tasks(row.get("abilities", {})))
    columns = [(key, title) for key, title in (*known, *COLUMNS, *zip(able, able)) if any(row.get(key) is not None for row in rows)]
    several = len(rows) > len({row["case"] for row in rows})
    head = ["case", *(["edits"] if several else []), *(title for _, title in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        name = f"{row['case']} (failed after {row['edits']} edits)" if "error" in row else row["case"]
        cells = [name, *([str(row["edits"])] if several else [])]
        lines.append(_line([*cells, *(cell(row, key) for key, _ in columns)]))
        for known in result["expected"]:
            if known.get("dataset") == row["dataset"] and known.get("case") == row["case"]:
                given = [f"{known[key]:.3f}" if key in known else "" for key, _ in columns]
                lines.append(_line([f"· {known.get('source', 'published')}", *([""] if several else []), *given]))
    return lines


def by_column(questions: dict) -> dict:
    """Shares of questions answered, by the names of their columns."""
    ends = [f"{way}{end}" for way in ("written", "contained") for end in ("", "_interval", "_spread")]
    return {f"{criterion}_{end}": own.get(end) for criterion, own in questions.items() for end in ends}


def _of_tasks(abilities: dict) -> dict:
    """Results of tasks, by the names of their columns."""
    return {
        f"{task} ({own['metric']}){end}": own[state]
        for task, own in abilities.items()
        for state, end in (("edited", ""), ("unedited", ", unedited"))
    }


def leading_way(rows: list[dict]) -> str:
    """The suffix of the scores that lead: what was written, where it was asked for."""
    return "_written" if any(row.get("reliability_written") is not None for row in rows) else ""


def number(value: float) -> str:
    """Three digits behind the point, or three in all where it is large: a broken model's perplexity."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"


def cell(row: dict, key: str) -> str:
    """A metric with its interval, and its spread over orders if there were several, or a dash."""
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None:
        return "–"
    if key == "orders":
        return str(value)
    if key in MEGABYTES:
        return f"{value / 1e6:.{MEGABYTES[key]}f}"
    spread = row.get(f"{key}_spread")
    return number(value) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "") + ("" if spread is None else f" ± {spread:.3f}")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
