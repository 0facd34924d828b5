"""The versions of a base model that the store has: one a report, with what was made of it."""

from dataclasses import dataclass

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.config import ADAPTERS
from ft_assets.errors import ArtifactError, FtError
from ft_assets.evaluation.report_model import Estimate, EvalReport, Verdict
from ft_assets.orchestration.links import report_path
from ft_assets.release.register import HistoryEntry, state_of
from ft_assets.release.whole_register import current_release
from ft_assets.views.board import Opened

REPORT = "eval_report"


@dataclass(frozen=True)
class Version:
    """One report and what belongs to it. `problem`: why its numbers cannot be read.

    version: the report's fingerprint. made: seconds since 1970. seconds: the time of training and
    evaluation. used: {asset: fingerprint} of what was judged. model: the merged model, if one was
    merged and is kept. released: it is the champion.
    """

    base_model: str
    version: str
    made: float
    is_current: bool
    verdict: str
    reasons: list[str]
    used: dict[str, str]
    seconds: float
    candidate: str | None = None
    metric: str | None = None
    score: float | None = None
    gain: Estimate | None = None
    model: str | None = None
    released: bool = False
    problem: str | None = None

    @property
    def page(self) -> str:
        """The address of its report."""
        return report_path(self.base_model, self.version)


@dataclass(frozen=True)
class Versions:
    """The versions of a base model, newest first.

    removed: decisions of the register about models whose version `ft gc` removed, newest first.
    problem: why the register cannot be read.
    """

    base_model: str
    found: list[Version]
    removed: list[HistoryEntry]
    problem: str | None = None

    @property
    def count(self) -> int:
        return len(self.found)


def base_models(opened: Opened) -> list[str]:
    """Return the base models of finetune.yaml, then those that only the store has."""
    kept = {name for asset, name in opened.store.homes() if asset == REPORT and name}
    known = list(opened.project.base_models)
    return [*known, *sorted(kept - set(known))]


def versions(opened: Opened, name: str) -> Versions:
    """Return the versions of a base model."""
    store = opened.store
    merged = store.versions("merged_model", name)[0]
    history, champion, problem = _register(store, name)
    reports = sorted(
        store.versions(REPORT, name)[0], key=lambda one: one.manifest.finished, reverse=True
    )
    try:
        current = store.current_name(REPORT, name)
    except ArtifactError:
        current = None
    found = [_version(store, one, merged, current, champion) for one in reports]
    kept = {one.fingerprint for one in merged}
    removed = [entry for entry in reversed(history) if entry.challenger.merged_model not in kept]
    return Versions(name, found, removed, problem)


def find_report(opened: Opened, name: str, version: str) -> Artifact | None:
    """Return a report of the store, as it was published. Raises ArtifactError if it is damaged."""
    if name not in base_models(opened):
        return None
    known = opened.store.versions(REPORT, name)[0]
    report = next((one for one in known if one.fingerprint == version), None)
    return opened.store.verified(report) if report else None


def used_by(report: Artifact) -> dict[str, str]:
    """Return {asset: fingerprint} of what a report was made of; empty for one of an old store."""
    read = report.manifest.inputs_read
    return {name.partition("#")[0]: one.fingerprint for name, one in read.items()}


def _register(store: ArtifactStore, name: str) -> tuple[list[HistoryEntry], str | None, str | None]:
    """Return the decisions, the champion's merged model, and why there are none."""
    try:
        state = state_of(current_release(store, name))
    except FtError as error:
        return [], None, str(error)
    return state.history, state.champion.merged_model if state.champion else None, None


def _version(
    store: ArtifactStore,
    report: Artifact,
    merged: list[Artifact],
    current: str | None,
    champion: str | None,
) -> Version:
    name, metrics = report.manifest.partition or "", report.metrics
    used = used_by(report)
    models = [one.fingerprint for one in merged if used_by(one).get(REPORT) == report.fingerprint]
    known = Version(
        base_model=name,
        version=report.fingerprint,
        made=report.manifest.finished,
        is_current=report.fingerprint == current,
        verdict=metrics.get("verdict", "?"),
        reasons=str(metrics.get("reason", "")).split("; "),
        used=used,
        seconds=report.manifest.seconds + _seconds(store, name, used),
        model=next(iter(models), None),
        released=champion in models,
    )
    try:
        numbers = EvalReport.read(report.path / "report.json")
        best = Verdict.read(report.path / "verdict.json").reported_candidate
        gain = numbers.comparisons[best]["base"][numbers.metric]
        score = numbers.scores[best][numbers.metric]
    except (FtError, OSError, KeyError) as error:
        return Version(**{**vars(known), "problem": str(error)})
    more = {"candidate": best, "metric": numbers.metric, "score": score, "gain": gain}
    return Version(**{**vars(known), **more})


def _seconds(store: ArtifactStore, name: str, used: dict[str, str]) -> float:
    total, used = 0.0, dict(used)
    for asset in (*ADAPTERS.values(), "answers", "text_adapter"):
        try:
            artifact = store.find(asset, name, used[asset]) if asset in used else None
        except ArtifactError:
            continue
        total += artifact.manifest.seconds if artifact else 0.0
        if artifact and asset == ADAPTERS["sft"]:  # which continues the text adapter
            used = {**used_by(artifact), **used}
    return total
