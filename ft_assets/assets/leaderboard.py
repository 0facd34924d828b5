"""The asset `leaderboard`: one table and one picture of all base models.

A base model that failed neither blocks nor hides the others: it is in the table with its reason.
"""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq

from ft_assets.artifacts import Artifact
from ft_assets.assets.judged import optional_stages
from ft_assets.errors import ArtifactError, FtError, ReleaseError
from ft_assets.evaluation.leaderboard import (
    Entry,
    failed_entry,
    judged_entry,
    rank,
    table,
    winner,
)
from ft_assets.evaluation.plots import data_uri, leaderboard_plot
from ft_assets.evaluation.report_model import EvalReport
from ft_assets.evaluation.scored_rows import read_candidate
from ft_assets.evaluation.verdict.gate import bound_versions
from ft_assets.job import Job, StepResult
from ft_assets.orchestration.declarations import Metrics, asset
from ft_assets.orchestration.links import HOME
from ft_assets.orchestration.materializer import Materializer, Reader, result
from ft_assets.release.whole_register import current_release

CHAIN = (
    "base_model",
    "chat_dataset",
    "heldout_split",
    "lora_adapter",
    "dpo_adapter",
    "rl_adapter",
    "answers",
    "eval_report",
)


def _summary(metrics: Metrics) -> str:
    return f"{metrics['judged']} of {metrics['base_models']} judged"


@asset(
    deps=["eval_report", "merged_model", "release"],
    group="release",
    kinds=["table"],
    code_version="4",
    per_base_model=False,
    summary=_summary,
)
def leaderboard(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """All base models on the same held-out rows: score, gain, forgetting, memory, time and size.

    A base model that failed has its reason.
    """
    gate = materializer.project.gate
    entries = [entry_of(materializer, name) for name in materializer.project.base_models]
    ranked = rank(entries, gate)

    def make(output: Path) -> StepResult:
        first = compare_the_first(materializer, ranked)
        (output / "leaderboard.json").write_text(json.dumps(ranked, indent=1, ensure_ascii=False))
        (output / "leaderboard.md").write_text(table(ranked, first))
        (output / "info").mkdir()
        drawn = [entry for entry in ranked if entry["rank"]]
        (output / "info" / "picture.txt").write_text(
            data_uri(leaderboard_plot(drawn)) if drawn else ""
        )
        best = drawn[0]["name"] if drawn else None
        return StepResult(
            {
                "base_models": len(ranked),
                "judged": sum(bool(entry["verdict"]) for entry in ranked),
                "best": best,
            }
        )

    reports = {
        name: _readable(materializer, "eval_report", name)
        for name in materializer.project.base_models
    }
    known = {f"eval_report[{name}]": (report, None) for name, report in reports.items() if report}
    artifact, reused = materializer.materialize(
        context,
        identity={"entries": ranked},
        inputs=known,
        make=make,
        unread=known,  # it shows a damaged report beside the others
    )
    picture = (artifact.path / "info" / "picture.txt").read_text()
    text = (artifact.path / "leaderboard.md").read_text()
    shown = f"![leaderboard]({picture})\n\n{text}" if picture else text
    return result(
        artifact,
        reused,
        page=dg.MetadataValue.url(HOME),
        leaderboard=dg.MetadataValue.md(shown),
    )


def compare_the_first(materializer: Materializer, ranked: list[Entry]) -> str:
    """Return the sentence that compares the first base model with each other one, row by row."""
    placed = [entry for entry in ranked if entry["rank"]]
    if len(placed) < 2:
        return ""
    rows = []
    for entry in placed:
        report = materializer.store.need("eval_report", entry["name"])
        table = report.path / "rows.parquet"
        rows.append(read_candidate(table, entry["candidate"], entry["metric"]))
    settings = materializer.project.recipe(placed[0]["name"]).evaluation
    return winner(placed, rows, settings)


def entry_of(reader: Reader, name: str) -> Entry:
    """Return the entry of a base model. If its files cannot be read, the entry has the reason."""
    try:
        return _entry(reader, name)
    except FtError as error:
        return failed_entry(name, "; ".join(line.strip() for line in str(error).splitlines()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # Another file is damaged, or of a version that wrote other keys.
        return failed_entry(
            name, f"its eval_report cannot be read ({type(error).__name__}: {error}): make it again"
        )


def _entry(reader: Reader, name: str) -> Entry:
    report = reader.store.current("eval_report", name)
    if report is None:
        return failed_entry(name, why_not_judged(reader, name))
    numbers = EvalReport.read(reader.store.verified(report).path / "report.json")
    # Not pq.read_table, which imports pyarrow.dataset and with it pandas.
    with pq.ParquetFile(report.path / "rows.parquet") as table:
        rows = table.read(columns=["candidate", "id"]).to_pylist()
    ids = [row["id"] for row in rows if row["candidate"] == "base"]
    costs = _costs(reader, name, report)
    stale = _stale(reader, name, numbers.bound_to)
    return judged_entry(
        name, numbers, reader.project.gate, ids, costs, _serves(reader, name), stale
    )


def _stale(reader: Reader, name: str, bound_to: dict[str, str]) -> str | None:
    """Return the parts that changed after the report was made, or None."""
    used = {
        asset: reader.store.need(asset, name)
        for asset in ("base_model", "lora_adapter", "dpo_adapter", "heldout_split")
    }
    if reader.project.rl:
        used["rl_adapter"] = reader.store.need("rl_adapter", name)
    other = [
        part
        for part, now in bound_versions(used, "").items()
        if part != "evaluation" and bound_to.get(part) != now
    ]
    if "rl_adapter" in bound_to and not reader.project.rl:
        other.append("rl_adapter")
    return ", ".join(other) or None


def _readable(reader: Reader, asset: str, name: str) -> Artifact | None:
    try:
        return reader.store.current(asset, name)
    except ArtifactError:  # its entry has the reason
        return None


def _costs(reader: Reader, name: str, report: Artifact) -> dict[str, Any]:
    store = reader.store
    stages = ("lora_adapter", "dpo_adapter", *optional_stages(reader.project))
    trained = [store.current(asset, name) for asset in stages]
    metrics = [artifact.metrics for artifact in trained if artifact is not None]
    merged = store.current("merged_model", name) or store.current("base_model", name)
    memory = [
        entry["peak_train_memory_gb"] for entry in metrics if entry.get("peak_train_memory_gb")
    ]
    weights = (
        [
            entry.bytes
            for file, entry in merged.manifest.files.items()
            if file.endswith(".safetensors")
        ]
        if merged
        else []
    )
    return {
        "memory_gb": max(memory, default=None),
        "gpu_seconds": round(
            sum(entry.get("seconds") or 0.0 for entry in metrics)
            + (report.metrics.get("seconds") or 0.0),
            1,
        ),
        "train_tokens_per_s": metrics[0].get("tokens_per_s") if metrics else None,
        "answer_tokens_per_s": report.metrics.get("tokens_per_s"),
        "bytes": sum(weights) or None,
    }


def _serves(reader: Reader, name: str) -> str:
    try:
        released = current_release(reader.store, name)
    except ReleaseError:
        return "unknown: its register is not whole"
    if released is not None:
        champion = released.metrics["champion"]
        return f"`{champion[:8]}`" if champion else "nothing: not approved"
    return "merged, not released" if reader.store.current("merged_model", name) else "–"


def why_not_judged(reader: Reader, name: str) -> str:
    """Return the first missing artifact of a base model, and the last error of its step."""
    store = reader.store
    chain = [asset for asset in CHAIN if asset != "rl_adapter" or reader.project.rl]
    missing = next(
        asset for asset in chain if asset == chain[-1] or store.current(asset, name) is None
    )
    error = _last_error(reader, name, missing)
    return f"{missing} has not been made" + (f" ({error})" if error else "")


def _last_error(reader: Reader, name: str, asset: str) -> str | None:
    """Return the first line of the newest error of this asset and base model."""
    found = []
    for file in (reader.store.root / ".work" / "jobs").glob(f"{asset}-*/error.json"):
        try:
            if Job.model_validate_json((file.parent / "job.json").read_text()).partition == name:
                found.append(
                    (
                        file.stat().st_mtime,
                        str(FtError.from_dict(json.loads(file.read_text()))).splitlines()[0],
                    )
                )
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None
