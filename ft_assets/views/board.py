"""The leaderboard as it is now: each base model with its verdict, gain, version and cost.

It reads the reports themselves, so it shows a verdict before the asset `leaderboard` is made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.artifacts import ArtifactStore, open_store
from ft_assets.assets.leaderboard import entry_of
from ft_assets.config import Project
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.leaderboard import Entry, rank
from ft_assets.orchestration.links import report_path


@dataclass(frozen=True)
class Opened:
    """A project with its store, for what only reads."""

    project: Project
    store: ArtifactStore

    @classmethod
    def of(cls, project: Project) -> "Opened":
        return cls(project, open_store(project))


@dataclass(frozen=True)
class Gain:
    """A paired difference to the base with its confidence interval; positive is better."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """One line of the leaderboard. Without a report, `reason` tells why, and the rest is None.

    reasons: those of the verdict. version: the report's fingerprint. made: seconds since 1970.
    gpu_seconds: of training and answering. memory_gb: the peak of training. note: why it has no
    rank, or why its PASS is not proven among all base models.
    """

    base_model: str
    rank: int | None
    verdict: str | None
    reasons: list[str]
    note: str | None = None
    metric: str | None = None
    candidate: str | None = None
    score: float | None = None
    base_score: float | None = None
    gain: Gain | None = None
    heldout_rows: int | None = None
    version: str | None = None
    made: float | None = None
    gpu_seconds: float | None = None
    memory_gb: float | None = None
    serves: str | None = None

    @property
    def page(self) -> str | None:
        """The address of its report."""
        return report_path(self.base_model, self.version) if self.version else None


def board(opened: Opened) -> Sequence[Judged]:
    """Return a line for each base model of finetune.yaml, best first."""
    entries = [entry_of(opened, name) for name in opened.project.base_models]
    return [_judged(opened, entry) for entry in rank(entries, opened.project.gate)]


def _judged(opened: Opened, entry: Entry) -> Judged:
    name = entry["name"]
    if entry["verdict"] is None:
        return Judged(name, None, None, [entry["reason"]])
    try:
        report = opened.store.current("eval_report", name)
    except ArtifactError:  # damaged since the entry was read
        report = None
    return Judged(
        base_model=name,
        rank=entry["rank"],
        verdict=entry["verdict"],
        reasons=entry["reason"].split("; "),
        note=entry["apart"] or entry.get("chance"),
        metric=entry["metric"],
        candidate=entry["candidate"],
        score=entry["score"],
        base_score=entry["base"],
        gain=Gain(**entry["gain"]),
        heldout_rows=entry["heldout_rows"],
        version=report.fingerprint if report else None,
        made=report.manifest.finished if report else None,
        gpu_seconds=entry["gpu_seconds"],
        memory_gb=entry["memory_gb"],
        serves=entry["serves"].strip("`"),
    )
