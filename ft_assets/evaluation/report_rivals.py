"""The tables of a report about its rivals: scores and cost, and what was found in documents."""

from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.markdown import Table


def rival_table(report: EvalReport, verdict: Verdict) -> Table:
    """Return the rivals, and how the reported candidate compares with each."""
    best, metric = verdict.reported_candidate, report.metric
    header = ["rival", metric, f"{LABELS[best]} against it", "p", "a thousand answers"]
    header += ["seconds an answer (95 %)", "stop_rate", "tokens"]
    rows = []
    for name, rival in (report.rivals or {}).items():
        (low, high), entry, cost = rival.interval, rival.comparisons[best], rival.cost
        rows.append(
            [
                f"{name} ({cost.model})" + (", must be beaten" if rival.must_beat else ""),
                f"**{rival.scores[metric]:.3f}** [{low:.3f}, {high:.3f}]",
                f"{entry.mean:+.3f} [{entry.low:+.3f}, {entry.high:+.3f}]",
                f"{entry.p:.2g}",
                "not known" if cost.per_thousand is None else f"{cost.per_thousand:.4g}",
                "not measured"
                if cost.seconds is None
                else f"{cost.seconds:.2f} ({cost.seconds_p95:.2f})",
                f"{rival.scores['stop_rate']:.3f}",
                f"{rival.scores['mean_tokens']:.1f}",
            ]
        )
    return Table(header, rows)


def retrieval_tables(report: EvalReport) -> list[tuple[str, Table]]:
    """Return what the rivals with documents found: a table of counts, and one of first searches."""
    searched = {name: one for name, one in (report.rivals or {}).items() if one.retrieved}
    if not searched:
        return []
    header = ["rival", "documents (chunks)", "rows without a hit", "reference in a hit"]
    header += ["reference in any chunk", "question and reference in one chunk"]
    counts = [
        [
            name,
            f"{found.documents} ({found.chunks})",
            f"{found.without_hits} of {found.rows}",
            str(found.answer_found),
            str(found.answer_there),
            str(found.copied),
        ]
        for name, rival in searched.items()
        if (found := rival.retrieved)
    ]
    hits = [
        [name, search.question, source, f"{score:.2f}", text]
        for name, rival in searched.items()
        for search in rival.searches
        for source, score, text in search.hits
    ]
    return [
        ("What the documents have", Table(header, counts)),
        ("First searches", Table(["rival", "question", "source", "score", "chunk"], hits)),
    ]
