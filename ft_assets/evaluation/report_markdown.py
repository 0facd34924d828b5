"""The report as markdown, for the Dagster UI and the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ft_assets.data.mixing import shares_table
from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.references import ReferencedRow
from ft_assets.evaluation.report_model import Differences, EvalReport, Finding, Verdict
from ft_assets.evaluation.report_rivals import retrieval_tables, rival_table
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.verdict.decision import PASS, beats
from ft_assets.markdown import Table, table

Rows = Mapping[str, Sequence[ScoredRow]]  # by candidate
STEPS = (
    ("sft", "base"),
    ("sft", "few_shot"),
    ("dpo", "sft"),
    ("dpo", "base"),
    ("dpo", "few_shot"),
    ("rl", "sft"),
    ("rl", "dpo"),
    ("rl", "base"),
    ("rl", "few_shot"),
)
BEHAVIOUR = ("stop_rate", "refused", "repetition")
EXAMPLES = 3
FRESH_ROWS = 4  # verdicts: a difference must be 1.5 times as large as for the first
MISSES = 5
LONGEST_CELL = 300  # characters
DETECTABLE = (
    "Detectable: the difference that this many rows with this spread find four times in five."
)
NO_CAUSE = (
    "The numbers show none of the five common causes (template, narrow data, overfitting, "
    "undertraining, wrong base). Where a reason above is that the rows cannot decide, add held-out "
    "rows or general prompts first; then more or better training rows."
)


def report_markdown(
    report: EvalReport,
    verdict: Verdict,
    findings: Sequence[Finding],
    rows: Rows,
    heldout: Sequence[ReferencedRow],
    partition: str,
) -> str:
    """Return the report: the verdict, scores, steps, general prompts, and what changed most."""
    lines = _verdict(report, verdict, partition)
    lines += _diagnosis(verdict, findings)
    lines += ["", f"## Scores on {heldout_count(report)}", ""]
    lines += [table(*score_table(report))]
    lines += ["", "## Which step helped", "", table(*step_table(report)), "", DETECTABLE]
    if len(report.evidence.sources) > 1:
        lines += ["", "## What was trained", "", table(*shares_table(report.evidence.sources))]
    if report.rivals:
        lines += ["", "## Rivals", "", table(*rival_table(report, verdict))]
        for title, found in retrieval_tables(report):
            lines += ["", f"### {title}", "", table(*found)]
    if (general := report.retention) is not None:
        answered = f"{general.answered} of them answered"
        lines += ["", f"## {general.rows} general prompts (retention), {answered}", ""]
        lines += [table(*retention_table(report))]
    if report.harness.scores:
        lines += ["", "## lm-evaluation-harness", "", table(*harness_table(report))]
    lines += _examples(report, rows, heldout, verdict.reported_candidate)
    return "\n".join(lines) + "\n"


def heldout_count(report: EvalReport) -> str:
    """Return the number of held-out rows as text, with their groups where they are fewer."""
    groups = report.heldout_groups
    if groups is None or groups == report.heldout_rows:
        return f"{report.heldout_rows} held-out rows"
    return f"{report.heldout_rows} held-out rows in {groups} groups"


def _verdict(report: EvalReport, verdict: Verdict, partition: str) -> list[str]:
    lines = [f"# {partition}: {verdict.status}", ""]
    lines += [f"- {reason}" for reason in verdict.reasons]
    if verdict.candidate:
        lines.append(f"- to merge: **{LABELS[verdict.candidate]}**")
    else:
        lines.append("- nothing is merged")
    if verdict.dpo:
        lines.append(f"- DPO: {verdict.dpo}")
    if verdict.rl:
        lines.append(f"- RL: {verdict.rl}")
    if prompting := prompting_sentence(report, verdict):
        lines.append(f"- {prompting}")
    notes = (seeds_sentence(report, verdict), use_sentence(report), rehearsal_sentence(report))
    return [*lines, *(f"- {note}" for note in notes if note)]


def seeds_sentence(report: EvalReport, verdict: Verdict) -> str:
    """Describe how much of the gain is luck of the seed."""
    best = verdict.reported_candidate
    if report.seeds is None or best not in report.seeds:
        return (
            "One seed was trained: how much of the gain is luck of the seed was not measured "
            "(`gate.seeds`)."
        )
    return f"Seeds: {LABELS[best]}, {report.seeds[best].describe(report.metric)}."


def use_sentence(report: EvalReport) -> str:
    """Describe how often these held-out rows were used for a verdict, and what that costs."""
    number, first = report.verdict_number, report.gate_confidence
    if number is None or first is None:
        return "earlier verdicts on these held-out rows were not counted"
    unseen = "only reports of this store are counted: settings chosen elsewhere by looking at "
    unseen += "held-out results count too"
    if number == 1:
        return f"verdict 1 on these held-out rows ({unseen})"
    harder = z(report.confidence) / z(first)
    text = f"verdict {number} on these held-out rows: judged at {report.confidence:.4%} confidence "
    text += (
        f"instead of {first:.4g}, so a difference must be {harder:.1f} times as large ({unseen})"
    )
    if number < FRESH_ROWS:
        return text
    return f"{text}. **Bring fresh rows**: new data in data.heldout, or the next data.heldout_slice"


def z(confidence: float) -> float:
    """Return the two-sided normal quantile of a confidence."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def prompting_sentence(report: EvalReport, verdict: Verdict) -> str | None:
    """Compare the fine-tune with the few-shot prompt in a sentence; None if it was not measured."""
    best = verdict.reported_candidate
    entry = report.comparisons[best].get("few_shot", {}).get(report.metric)
    if entry is None:
        return None
    interval = f"[{entry.low:+.3f}, {entry.high:+.3f}]"
    text = f"{LABELS[best]} is {entry.mean:+.3f} against the few-shot prompt {interval}"
    chosen = f". {report.few_shot.describe()}" if report.few_shot else ""
    if beats(entry, report.confidence):
        return f"prompting does not reach it: {text}{chosen}"
    return f"**you do not need this fine-tune**, or cannot show that you do: {text}{chosen}"


def _diagnosis(verdict: Verdict, findings: Sequence[Finding]) -> list[str]:
    if verdict.status == PASS:
        return []
    lines = ["", "## What may be wrong, and what to try", ""]
    for number, finding in enumerate(findings, 1):
        evidence = "; ".join(finding.evidence)
        lines.append(f"{number}. **{finding.cause}**: {evidence}. Try: {finding.advice}.")
    return lines if findings else [*lines, NO_CAUSE]


def rehearsal_sentence(report: EvalReport) -> str:
    """Name the base's own answers that were trained against forgetting; "" without them."""
    if (rows := report.evidence.own_rehearsal_rows) is None:
        return ""
    answers = "of the base's own answers to general prompts"
    return f"{rows} {answers} were trained beside the task (`data.rehearsal: self`)"


def score_table(report: EvalReport) -> Table:
    """Return the scores of each candidate; the gate metric comes first, with its interval."""
    metric = report.metric
    others = [name for name in report.metrics if name != metric]
    columns = [*others, "perplexity", *BEHAVIOUR]
    rows = []
    for name, scores in report.scores.items():
        low, high = report.intervals[name]
        first = f"**{scores[metric]:.3f}** [{low:.3f}, {high:.3f}]"
        rows.append([LABELS[name], first, *[_number(scores[column]) for column in columns]])
    return Table(["candidate", metric, *columns], rows)


def step_table(report: EvalReport) -> Table:
    """Return the paired differences in the gate metric."""
    header = ["step", "difference", "interval", "wins / ties / losses", "p", "rows", "detectable"]
    rows = []
    for name, other in STEPS:
        entry = report.comparisons.get(name, {}).get(other, {}).get(report.metric)
        if entry is None:
            continue
        rows.append(
            [
                f"{LABELS[name]} against {LABELS[other]}",
                f"{entry.mean:+.3f}",
                f"[{entry.low:+.3f}, {entry.high:+.3f}]",
                f"{entry.wins} / {entry.ties} / {entry.losses}",
                f"{entry.p:.2g} ({entry.test})",
                entry.rows(),
                "–" if entry.detectable is None else f"{entry.detectable:.3f}",
            ]
        )
    return Table(header, rows)


def retention_table(report: EvalReport) -> Table:
    """Return the scores of the general prompts, with their changes against the base."""
    general = report.retention
    assert general is not None, "the report has general prompts"
    metric = general.metric
    changes = ["rise of the loss", metric, f"change of {metric}"]
    rows = []
    for name, scores in general.scores.items():
        against = general.comparisons.get(name, {}).get("base")
        loss, task = _retention_changes(against, metric) if against else ("–", "–")
        rows.append(
            [
                LABELS[name],
                f"{scores['loss']:.3f}",
                loss,
                f"{scores[metric]:.3f}",
                task,
                *[f"{scores[column]:.3f}" for column in BEHAVIOUR],
            ]
        )
    return Table(["candidate", "loss (nats/token)", *changes, *BEHAVIOUR], rows)


def _retention_changes(against: Differences, metric: str) -> tuple[str, str]:
    """Return the rise of the loss and the change of the task score, each with its interval."""
    loss, task = against["loss"], against[metric]
    return (
        f"{-loss.mean:+.3f} [{-loss.high:+.3f}, {-loss.low:+.3f}]",
        f"{task.mean:+.3f} [{task.low:+.3f}, {task.high:+.3f}]",
    )


def harness_table(report: EvalReport) -> Table:
    """Return the scores of lm-evaluation-harness' tasks, each with its change against the base."""
    scores = report.harness.scores
    rows = []
    for name, tasks in scores.items():
        entries = report.harness.comparisons.get(name, {}).get("base", {})
        cells = [
            f"{value:.3f}" + (f" ({entries[task].mean:+.3f})" if task in entries else "")
            for task, value in tasks.items()
        ]
        rows.append([LABELS[name], *cells])
    return Table(["candidate", *scores["base"]], rows)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def changed_most(
    report: EvalReport, rows: Rows, candidate: str, count: int
) -> tuple[list[int], list[int]]:
    """Return the indices of the rows with the largest gains and losses against the base.

    Only rows whose score changed. Ties are ordered by the loss of the reference answer.
    """
    pairs = list(zip(rows[candidate], rows["base"], strict=True))
    metric = report.metric
    sign = 1 if report.higher_is_better(metric) else -1
    gains = [
        sign * (tuned.scores[metric] - base.scores[metric])
        if metric in tuned.scores and metric in base.scores
        else 0.0  # of a row that people did not judge
        for tuned, base in pairs
    ]
    finer = [base.scores["loss"] - tuned.scores["loss"] for tuned, base in pairs]
    order = sorted(range(len(gains)), key=lambda index: (gains[index], finer[index]))
    best = [index for index in order[::-1] if gains[index] > 0][:count]
    worst = [index for index in order if gains[index] < 0][:count]
    return best, worst


def _examples(
    report: EvalReport, rows: Rows, heldout: Sequence[ReferencedRow], candidate: str
) -> list[str]:
    metric = report.metric
    best, worst = changed_most(report, rows, candidate, EXAMPLES)
    sections = [("Largest gains", best), ("Largest losses", worst)]
    if report.higher_is_better(metric):
        scores = [row.scores.get(metric, 1.0) for row in rows[candidate]]
        missed = [index for index, score in enumerate(scores) if score < 1]
        sections.append(("Misses", sorted(missed, key=scores.__getitem__)[:MISSES]))
    lines: list[str] = []
    for title, indices in sections:
        lines += ["", f"## {title}", ""]
        for index in indices:
            lines += _example(rows, heldout, candidate, index)
        if not indices:
            lines.append("none")
    return lines


def _example(rows: Rows, heldout: Sequence[ReferencedRow], candidate: str, index: int) -> list[str]:
    return [
        f"> {_cell(heldout[index]['messages'][-2]['content'])}",
        "",
        f"- reference: `{_cell(heldout[index]['reference'])}`",
        *[f"- {LABELS[name]}: `{_cell(rows[name][index].answer)}`" for name in ("base", candidate)],
        "",
    ]


def _cell(text: str) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + " …"


@dataclass(frozen=True)
class PreviousReport:
    """The report before this one. scores: {candidate: {row id: score}} in its gate metric."""

    report: EvalReport
    verdict: Verdict
    scores: Mapping[str, Mapping[str, float]]


def changes(
    report: EvalReport,
    verdict: Verdict,
    rows: Rows,
    heldout: Sequence[ReferencedRow],
    previous: PreviousReport | None,
) -> str:
    """Return the changes since the previous report of this base model as markdown."""
    if previous is None:
        return "First report of this base model: nothing to compare with."
    old, metric = previous.report, report.metric
    if old.metric != metric:
        return f"The metric changed from {old.metric} to {metric}: not compared."
    versions = report.bound_to.items()
    changed = [name for name, version in versions if old.bound_to.get(name) != version]
    flips = "rows right before and wrong now, and the other way round"
    header = ["candidate", f"{metric} before", "now", flips]
    lines = [f"Verdict: {previous.verdict.status} → {verdict.status}.", ""]
    lines += [f"What changed: {', '.join(changed) or 'nothing that is judged'}.", ""]
    ids = [row["id"] for row in heldout]
    now = {
        name: {
            row_id: row.scores[metric]
            for row_id, row in zip(ids, rows[name], strict=True)
            if metric in row.scores
        }
        for name in report.scores
        if name in old.scores
    }
    cells = [
        [
            LABELS[name],
            f"{old.scores[name][metric]:.3f}",
            f"{report.scores[name][metric]:.3f}",
            _flips(previous.scores[name], scores),
        ]
        for name, scores in now.items()
    ]
    return "\n".join([*lines, table(header, cells)])


def _flips(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Return the counts of rows that got worse and better since the report before, as text."""
    both = [(before[row_id], score) for row_id, score in now.items() if row_id in before]
    lost = sum(score < then for then, score in both)
    won = sum(score > then for then, score in both)
    return f"{lost}, {won} of {len(both)} rows in both"
