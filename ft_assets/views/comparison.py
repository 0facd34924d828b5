"""Two versions of one base model, or of two: what differs in settings, curves, scores and answers.

What `ft gc` removed of a version is named, and the rest is compared.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from ft_assets.artifacts import Artifact, ArtifactStore
from ft_assets.errors import ArtifactError
from ft_assets.evaluation.report_model import Estimate, EvalReport, Verdict
from ft_assets.views.board import Opened
from ft_assets.views.row_changes import RowChanges, as_text, row_changes
from ft_assets.views.versions import find_report, used_by

SHOWN = 40  # answers
LONGEST = 200  # characters of a setting
SPLIT = "heldout_split"
TABLES = ("train", "preferences")
TRAININGS = {
    "text_adapter": "Continued pretraining",
    "lora_adapter": "SFT",
    "dpo_adapter": "DPO",
    "rl_adapter": "RL",
}


@dataclass(frozen=True)
class Side:
    """One of the two versions: its report, and {asset: artifact} of what it was made of.

    gone: the assets of which the store no longer has the version.
    """

    base_model: str
    report: Artifact
    numbers: EvalReport
    verdict: Verdict
    parts: dict[str, Artifact]
    gone: list[str]

    @property
    def candidate(self) -> str:
        return self.verdict.reported_candidate

    @property
    def version(self) -> str:
        return self.report.fingerprint

    @property
    def name(self) -> str:
        return f"{self.base_model} {self.version[:8]}"


@dataclass(frozen=True)
class Setting:
    """A setting that differs; `before` or `after` is None where it is not set."""

    asset: str
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class MetricLine:
    """A metric of both versions: the score of the judged candidate and its gain over the base."""

    metric: str
    before: float | None
    after: float | None
    before_gain: Estimate | None
    after_gain: Estimate | None


@dataclass(frozen=True)
class Flip:
    """A held-out row on which the two score differently."""

    prompt: str
    reference: str
    before: str
    after: str
    before_score: float
    after_score: float


@dataclass(frozen=True)
class Answers:
    """The answers on the rows that both versions were judged on, by the gate's metric.

    better, worse: rows on which `after` scores higher, or lower, with the sign that the metric
    gives. flips: those with the largest difference, at most SHOWN.
    """

    shared: int
    before_only: int
    after_only: int
    better: int
    worse: int
    flips: list[Flip]


@dataclass(frozen=True)
class Curve:
    """The losses of one version as points of (step, loss)."""

    name: str
    is_second: bool
    is_training: bool
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """The losses of one training of both versions."""

    title: str
    lines: list[Curve]


@dataclass(frozen=True)
class Comparison:
    before: Side
    after: Side
    settings: list[Setting]
    metrics: list[MetricLine]
    answers: Answers | None
    curves: list[Curves]
    data: list[RowChanges]


def side(opened: Opened, name: str, version: str) -> Side | None:
    """Return a version of the store with what it was made of, None if there is none.

    Raises ArtifactError if the report or its rows are damaged.
    """
    report = find_report(opened, name, version)
    if report is None:
        return None
    parts: dict[str, Artifact] = {"eval_report": report}
    gone = list[str]()
    for asset, fingerprint in _ancestors(opened.store, report):
        artifact = _find(opened.store, asset, name, fingerprint)
        if artifact is None:
            gone.append(asset)
        else:
            read = asset == SPLIT  # whole tables of it; of the others only small files
            parts[asset] = opened.store.verified(artifact) if read else artifact
    if not report.manifest.inputs_read:
        gone.append("what it was made of (its store is older than these records)")
    return Side(
        base_model=name,
        report=report,
        numbers=EvalReport.read(report.path / "report.json"),
        verdict=Verdict.read(report.path / "verdict.json"),
        parts=parts,
        gone=gone,
    )


def compare(before: Side, after: Side) -> Comparison:
    """Compare two versions. Raises ArtifactError if a file of one is damaged."""
    return Comparison(
        before=before,
        after=after,
        settings=list(_settings(before, after)),
        metrics=_metrics(before, after),
        answers=_answers(before, after),
        curves=[found for asset in TRAININGS if (found := _curves(asset, before, after)).lines],
        data=list(_data(before, after)),
    )


def _ancestors(store: ArtifactStore, report: Artifact) -> Iterator[tuple[str, str]]:
    """Yield (asset, fingerprint) of all that a report was made of, as far as the store has it."""
    name, seen = report.manifest.partition, set[str]()
    waiting = [report]
    while waiting:
        for asset, fingerprint in used_by(waiting.pop()).items():
            if asset in seen or asset == "adapter":
                continue
            seen.add(asset)
            yield asset, fingerprint
            artifact = _find(store, asset, name or "", fingerprint)
            if artifact is not None:
                waiting.append(artifact)


def _find(store: ArtifactStore, asset: str, name: str, fingerprint: str) -> Artifact | None:
    try:
        return store.find(asset, name, fingerprint) or store.find(asset, None, fingerprint)
    except ArtifactError:
        return None


def _settings(before: Side, after: Side) -> Iterator[Setting]:
    for asset in dict.fromkeys([*after.parts, *before.parts]):
        if asset not in before.parts or asset not in after.parts:
            continue
        old, new = before.parts[asset].manifest, after.parts[asset].manifest
        was = {**_flat(old.settings), **_flat(old.environment), "code version": old.code_version}
        now = {**_flat(new.settings), **_flat(new.environment), "code version": new.code_version}
        for name in dict.fromkeys([*was, *now]):
            if was.get(name) != now.get(name):
                yield Setting(asset, name, was.get(name), now.get(name))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings as {dotted name: text}."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {prefix: text if len(text) <= LONGEST else f"{text[:LONGEST]}…"}


def _metrics(before: Side, after: Side) -> list[MetricLine]:
    names = dict.fromkeys([*before.numbers.metrics, *after.numbers.metrics])
    return [
        MetricLine(
            metric=name,
            before=before.numbers.scores[before.candidate].get(name),
            after=after.numbers.scores[after.candidate].get(name),
            before_gain=_gain(before, name),
            after_gain=_gain(after, name),
        )
        for name in names
    ]


def _gain(one: Side, metric: str) -> Estimate | None:
    return one.numbers.comparisons.get(one.candidate, {}).get("base", {}).get(metric)


def _answers(before: Side, after: Side) -> Answers | None:
    """Compare the answers row by row. None if the two were judged by different metrics."""
    metric = before.numbers.metric
    if metric != after.numbers.metric:
        return None
    old, new = _answered(before, metric), _answered(after, metric)
    sign = 1 if after.numbers.higher_is_better(metric) else -1
    flips = [
        Flip(
            prompt=as_text(json.loads(now["prompt"])),
            reference=now["reference"],
            before=old[key]["answer"],
            after=now["answer"],
            before_score=old[key][metric],
            after_score=now[metric],
        )
        for key, now in new.items()
        if key in old and old[key][metric] != now[metric]
    ]
    flips.sort(key=lambda one: -abs(one.after_score - one.before_score))
    gains = [sign * (one.after_score - one.before_score) for one in flips]
    return Answers(
        shared=len(old.keys() & new.keys()),
        before_only=len(old.keys() - new.keys()),
        after_only=len(new.keys() - old.keys()),
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        flips=flips[:SHOWN],
    )


def _answered(one: Side, metric: str) -> dict[str, dict[str, Any]]:
    """Return {row id: columns} of the judged candidate."""
    columns = ["candidate", "id", "prompt", "reference", "answer", metric]
    # Not pq.read_table, which imports pyarrow.dataset and with it pandas.
    with pq.ParquetFile(one.report.path / "rows.parquet") as table:
        rows = table.read(columns=columns).to_pylist()
    return {row["id"]: row for row in rows if row["candidate"] == one.candidate}


def _curves(asset: str, before: Side, after: Side) -> Curves:
    lines = list[Curve]()
    for one in (before, after):
        if asset not in one.parts:
            continue
        what = "reward" if asset == "rl_adapter" else "loss"
        for file, key in (("curve", what), ("validation", f"validation_{what}")):
            points = _points(one.parts[asset], file, key)
            if points:
                kind = "training" if file == "curve" else "validation"
                lines.append(Curve(f"{one.name}, {kind}", one is after, file == "curve", points))
    return Curves(TRAININGS[asset], lines)


def _points(artifact: Artifact, file: str, key: str) -> list[tuple[float, float]]:
    try:
        entries: Sequence[Mapping[str, Any]] = json.loads(
            (artifact.path / "info" / f"{file}.json").read_text()
        )
    except (OSError, ValueError):
        return []
    return [(one["step"], one[key]) for one in entries if one.get(key) is not None]


def _data(before: Side, after: Side) -> Iterator[RowChanges]:
    old, new = before.parts.get(SPLIT), after.parts.get(SPLIT)
    if old is None or new is None:
        return
    for name in TABLES:
        tables = [one.path / f"{name}.parquet" for one in (old, new)]
        if all(table.exists() for table in tables):  # an old version may lack one
            yield row_changes(name, *tables)
