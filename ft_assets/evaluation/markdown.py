"""The report as markdown: what a person reads in the Dagster UI and in a terminal."""

from collections.abc import Mapping
from typing import Any

from ft_assets.evaluation.candidates import Rows
from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.verdict.decision import beats

Report = Mapping[str, Any]
STEPS = (("sft", "base"), ("sft", "few_shot"), ("dpo", "sft"), ("dpo", "base"), ("dpo", "few_shot"))


def markdown(
    report: Report,
    verdict: Report,
    findings: Rows,
    rows: Mapping[str, Rows],
    heldout: Rows,
    partition: str,
) -> str:
    """Return the report: verdict on top, then scores, steps, general prompts, and the rows that changed most."""
    lines = [f"# {partition}: {verdict['status']}", ""]
    lines += [f"- {reason}" for reason in verdict["reasons"]]
    lines.append(
        f"- to merge: **{LABELS[verdict['candidate']]}**"
        if verdict["candidate"]
        else "- nothing is merged"
    )
    lines += [f"- DPO: {verdict['dpo']}"] if verdict["dpo"] else []
    lines += [f"- {sentence}" for sentence in [rival(report, verdict)] if sentence]
    lines += _diagnosis(verdict, findings)
    lines += [
        "",
        f"## Scores on {report['heldout_rows']} held-out rows",
        "",
        *_table(score_table(report)),
    ]
    lines += ["", "## Which step helped", "", *_table(step_table(report)), "", DETECTABLE]
    if report["retention"]:
        general = report["retention"]
        lines += [
            "",
            f"## {general['rows']} general prompts (retention), {general['answered']} of them answered",
            "",
        ]
        lines += _table(retention_table(report))
    if report["harness"]["scores"]:
        lines += ["", "## lm-evaluation-harness", "", *_table(harness_table(report))]
    lines += _examples(report, rows, heldout, verdict["speaker"])
    return "\n".join(lines) + "\n"


def rival(report: Report, verdict: Report) -> str | None:
    """Return what the prompted base says about the need of this fine-tune, or None if it was not asked."""
    metric, best = report["metric"], verdict["speaker"]
    entry = report["comparisons"][best].get("few_shot", {}).get(metric)
    if entry is None:
        return None
    text = f"{LABELS[best]} is {entry['mean']:+.3f} against the few-shot prompt [{entry['low']:+.3f}, {entry['high']:+.3f}]"
    if beats(entry, report["confidence"]):
        return f"prompting does not reach it: {text}"
    return f"**you do not need this fine-tune**, or cannot show that you do: {text}"


def _diagnosis(verdict: Report, findings: Rows) -> list[str]:
    if verdict["status"] == "PASS":
        return []
    lines = ["", "## What may be wrong, and what to try", ""]
    for number, finding in enumerate(findings, 1):
        lines.append(
            f"{number}. **{finding['cause']}**: {'; '.join(finding['evidence'])}. Try: {finding['try']}."
        )
    return [*lines, *([] if findings else [NO_CAUSE])]


DETECTABLE = (
    "Detectable: the difference that this many rows with this spread find four times in five."
)
NO_CAUSE = (
    "None of the four common causes (template, narrow data, overfitting, wrong base) shows in the numbers. "
    "More held-out rows, then more or better training rows."
)


def score_table(report: Report) -> list[list[str]]:
    """Return the score table, first row the header; the gate metric with its interval."""
    metric = report["metric"]
    others = [name for name in report["metrics"] if name != metric]
    columns = [*others, "perplexity", "stop_rate", "refused", "repetition"]
    table = [["candidate", metric, *columns]]
    for name, scores in report["scores"].items():
        low, high = report["intervals"][name]
        table.append(
            [
                LABELS[name],
                f"**{scores[metric]:.3f}** [{low:.3f}, {high:.3f}]",
                *[_number(scores[column]) for column in columns],
            ]
        )
    return table


def step_table(report: Report) -> list[list[str]]:
    """Return the paired differences in the gate metric, first row the header."""
    table = [["step", "difference", "interval", "wins / ties / losses", "p", "detectable"]]
    for name, other in STEPS:
        entry = report["comparisons"].get(name, {}).get(other, {}).get(report["metric"])
        if entry is None:
            continue
        seen = "–" if entry["detectable"] is None else f"{entry['detectable']:.3f}"
        table.append(
            [
                f"{LABELS[name]} against {LABELS[other]}",
                f"{entry['mean']:+.3f}",
                f"[{entry['low']:+.3f}, {entry['high']:+.3f}]",
                f"{entry['wins']} / {entry['ties']} / {entry['losses']}",
                f"{entry['p']:.2g} ({entry['test']})",
                seen,
            ]
        )
    return table


def retention_table(report: Report) -> list[list[str]]:
    """Return the general prompts' scores; changes against the base, oriented as their column says."""
    general = report["retention"]
    metric = general["metric"]
    table = [
        [
            "candidate",
            "loss (nats/token)",
            "rise of the loss",
            metric,
            f"change of {metric}",
            "stop_rate",
            "refused",
            "repetition",
        ]
    ]
    for name, scores in general["scores"].items():
        against = general["comparisons"].get(name, {}).get("base")
        loss, task = "–", "–"
        if against:
            loss = f"{-against['loss']['mean']:+.3f} [{-against['loss']['high']:+.3f}, {-against['loss']['low']:+.3f}]"
            task = f"{against[metric]['mean']:+.3f} [{against[metric]['low']:+.3f}, {against[metric]['high']:+.3f}]"
        habits = [f"{scores[column]:.3f}" for column in ("stop_rate", "refused", "repetition")]
        table.append(
            [LABELS[name], f"{scores['loss']:.3f}", loss, f"{scores[metric]:.3f}", task, *habits]
        )
    return table


def harness_table(report: Report) -> list[list[str]]:
    """Return the scores of lm-evaluation-harness' tasks, each with its change against the base."""
    scores, against = report["harness"]["scores"], report["harness"]["comparisons"]
    table = [["candidate", *scores["base"]]]
    for name, tasks in scores.items():
        entries = against.get(name, {}).get("base", {})
        cells = [
            f"{value:.3f}" + (f" ({entries[task]['mean']:+.3f})" if task in entries else "")
            for task, value in tasks.items()
        ]
        table.append([LABELS[name], *cells])
    return table


def _table(table: list[list[str]]) -> list[str]:
    header, *rows = [f"| {' | '.join(row)} |" for row in table]
    return [header, "|" + "---|" * len(table[0]), *rows]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def changed_most(
    rows: Mapping[str, Rows], candidate: str, metric: str, lower_is_better: bool, count: int
) -> tuple[list[int], list[int]]:
    """Return the numbers of the rows with the largest gains and the largest losses against the base, ties by more tokens
    right; only rows that changed."""
    sign = -1 if lower_is_better else 1
    gains = [
        sign * (mine[metric] - base[metric])
        for mine, base in zip(rows[candidate], rows["base"], strict=True)
    ]
    finer = [
        base["loss"] - mine["loss"]
        for mine, base in zip(rows[candidate], rows["base"], strict=True)
    ]
    order = sorted(range(len(gains)), key=lambda index: (gains[index], finer[index]))
    best = [index for index in order[::-1] if gains[index] > 0][:count]
    worst = [index for index in order if gains[index] < 0][:count]
    return best, worst


def _examples(report: Report, rows: Mapping[str, Rows], heldout: Rows, candidate: str) -> list[str]:
    metric = report["metric"]
    best, worst = changed_most(rows, candidate, metric, metric == "loss", 3)
    shown: list[tuple[str, list[int]]] = [("Largest gains", best), ("Largest losses", worst)]
    if metric != "loss":
        missed = sorted(
            (index for index, row in enumerate(rows[candidate]) if row[metric] < 1),
            key=lambda index: rows[candidate][index][metric],
        )
        shown.append(("Misses", missed[:5]))
    lines: list[str] = []
    for title, chosen in shown:
        lines += ["", f"## {title}", ""]
        for index in chosen:
            lines += [f"> {_cell(heldout[index]['messages'][-2]['content'])}", ""]
            lines.append(f"- reference: `{_cell(heldout[index]['reference'])}`")
            lines += [
                f"- {LABELS[name]}: `{_cell(rows[name][index]['answer'])}`"
                for name in ("base", candidate)
            ]
            lines.append("")
        lines += [] if chosen else ["none"]
    return lines


def _cell(text: str) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= 300 else text[:300] + " …"


def changes(
    report: Report,
    verdict: Report,
    rows: Mapping[str, Rows],
    heldout: Rows,
    previous: Report | None,
) -> str:
    """Return what differs from the previous report of this partition, {"report", "verdict", "rows"}, as markdown."""
    if previous is None:
        return "First report of this base model: nothing to compare with."
    old, metric = previous["report"], report["metric"]
    if old["metric"] != metric:
        return f"The metric changed from {old['metric']} to {metric}: not compared."
    lines = [f"Verdict: {previous['verdict']['status']} → {verdict['status']}."]
    changed = [
        name for name, version in report["bound_to"].items() if old["bound_to"].get(name) != version
    ]
    lines += ["", f"What changed: {', '.join(changed) or 'nothing that is judged'}.", ""]
    table = [
        [
            "candidate",
            f"{metric} before",
            "now",
            "rows right before and wrong now, and the other way round",
        ]
    ]
    ids = [row["id"] for row in heldout]
    for name in report["scores"]:
        if name not in old["scores"]:
            continue
        before = {row["id"]: row[metric] for row in previous["rows"] if row["candidate"] == name}
        both = [
            (before[row_id], row[metric])
            for row_id, row in zip(ids, rows[name], strict=True)
            if row_id in before
        ]
        lost, won = sum(now < then for then, now in both), sum(now > then for then, now in both)
        scores = [f"{old['scores'][name][metric]:.3f}", f"{report['scores'][name][metric]:.3f}"]
        table.append([LABELS[name], *scores, f"{lost}, {won} of {len(both)} rows in both"])
    return "\n".join([*lines, *_table(table)])
