"""The report as one HTML file that includes its pictures and the parquet file of the rows."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from ft_assets.data.mixing import shares_table
from ft_assets.evaluation.plots import (
    LABELS,
    curve_plot,
    data_uri,
    outcome_plot,
    rival_plot,
    score_plot,
)
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_markdown import (
    DETECTABLE,
    NO_CAUSE,
    STEPS,
    Rows,
    changed_most,
    harness_table,
    heldout_count,
    prompting_sentence,
    rehearsal_sentence,
    retention_table,
    score_table,
    seeds_sentence,
    step_table,
    use_sentence,
)
from ft_assets.evaluation.report_model import EvalReport, Finding, Verdict
from ft_assets.evaluation.report_rivals import retrieval_tables, rival_table
from ft_assets.markdown import Table

EXAMPLES = 10
LARGEST_DOWNLOAD = 20_000_000


def report_html(
    report: EvalReport,
    verdict: Verdict,
    findings: Sequence[Finding],
    rows: Rows,
    heldout: Sequence[ReferencedRow],
    partition: str,
    curves: Mapping[str, Mapping[str, Any]],
    since: str,
    parquet: Path,
    more: Sequence[tuple[str, Table]] = (),
) -> str:
    """Return the page.

    curves: {title: {"train": …, "validation": …}}. since: the changes since the previous report as
    markdown. parquet: the file of all rows. more: further tables with their titles.
    """
    metric = report.metric
    best, worst = changed_most(report, rows, verdict.reported_candidate, EXAMPLES)
    steps = [(name, other) for name, other in STEPS if other in report.comparisons.get(name, {})]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bold"] = _bold
    small = parquet.stat().st_size <= LARGEST_DOWNLOAD
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=verdict,
        findings=findings,
        no_cause=NO_CAUSE,
        detectable=DETECTABLE,
        partition=partition,
        labels=LABELS,
        notes=[
            note
            for note in (
                prompting_sentence(report, verdict),
                seeds_sentence(report, verdict),
                use_sentence(report),
                rehearsal_sentence(report),
            )
            if note
        ],
        tables=[*_tables(report, verdict), *more],
        pictures=[
            data_uri(score_plot(report)),
            data_uri(outcome_plot(report, steps)),
            *([data_uri(rival_plot(report))] if report.rivals else []),
        ],
        curves=[
            data_uri(curve_plot(curve["train"], title, curve.get("validation")))
            for title, curve in curves.items()
            if curve["train"]
        ],
        examples=[
            ("Ten largest gains", _examples(rows, heldout, metric, best)),
            ("Ten largest losses", _examples(rows, heldout, metric, worst)),
        ],
        since=since,
        rows="data:application/vnd.apache.parquet;base64,"
        + base64.b64encode(parquet.read_bytes()).decode()
        if small
        else None,
    )


def _tables(report: EvalReport, verdict: Verdict) -> list[tuple[str, Table]]:
    sources = report.evidence.sources
    tables = [
        (f"Scores on {heldout_count(report)}", score_table(report)),
        ("Which step helped", step_table(report)),
        *([("What was trained", shares_table(sources))] if len(sources) > 1 else []),
    ]
    if report.rivals:
        tables.append(("Rivals", rival_table(report, verdict)))
        tables += retrieval_tables(report)
    if report.retention is not None:
        title = f"{report.retention.rows} general prompts (retention)"
        tables.append((title, retention_table(report)))
    if report.harness.scores:
        tables.append(("lm-evaluation-harness", harness_table(report)))
    return tables


@dataclass(frozen=True)
class Example:
    """A held-out row with each candidate's label, answer and score."""

    id: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, float]]


def _examples(
    rows: Rows, heldout: Sequence[ReferencedRow], metric: str, chosen: list[int]
) -> list[Example]:
    return [
        Example(
            id=heldout[index]["id"],
            prompt=heldout[index]["messages"][-2]["content"],
            reference=heldout[index]["reference"],
            answers=[
                (LABELS[name], scored[index].answer, scored[index].scores[metric])
                for name, scored in rows.items()
            ],
        )
        for index in chosen
    ]


def _bold(text: str) -> Markup:
    """Return text with **…** as bold and `…` as code, the rest escaped."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))
