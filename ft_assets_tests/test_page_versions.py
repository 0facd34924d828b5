"""The pages of versions and of two versions compared, on a store that is written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ft_assets.artifacts import Artifact, ArtifactStore, fingerprint
from ft_assets.artifacts.manifest import Read
from ft_assets.config import load_project
from ft_assets.evaluation.report_model import Difference, Judgement, Verdict
from ft_assets.evaluation.scored_rows import write_scored_rows
from ft_assets.orchestration.links import report_path
from ft_assets.ui.pages.chart import chart
from ft_assets.views.board import Opened
from ft_assets.views.comparison import Answers, Curve, Curves, Setting, compare, side
from ft_assets.views.versions import used_by
from ft_assets_tests.registers import decide, merged_model
from ft_assets_tests.reports import empty_report, scored_row
from ft_assets_tests.test_pages import client

LIBRARIES = {"torch": "2.9"}
POLICY = "content-security-policy"
QUESTIONS = ("is <b>it</b> late", "is it warm", "is it far")


def publish(
    store: ArtifactStore,
    asset: str,
    files: dict[str, str | pa.Table],
    settings: Any,
    used: Sequence[Artifact] = (),
    **metrics: Any,
) -> Artifact:
    """Publish an artifact of the base model `tiny` that was made of others."""
    inputs = {one.asset: one.data_version for one in used}
    with store.staging(asset, "tiny") as staged:
        for name, content in files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                (staged / name).write_text(content)
            else:
                pq.write_table(content, staged / name)
        return store.publish(
            staged,
            asset=asset,
            partition="tiny",
            version=fingerprint(asset, "1", settings, inputs, LIBRARIES),
            code_version="1",
            settings=settings,
            inputs=inputs,
            environment=LIBRARIES,
            metrics=metrics,
            started=0.0,
            inputs_read={one.asset: Read(fingerprint=one.fingerprint, files="") for one in used},
        )


def row(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{question} {answer}", "group": question, "messages": turns}


def version(
    store: ArtifactStore, rate: float, train: Sequence[dict[str, Any]], right: int
) -> Artifact:
    """Publish a training and its report, of which the first `right` answers are right."""
    curve = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    lora = publish(
        store,
        "lora_adapter",
        {"info/curve.json": json.dumps(curve), "info/validation.json": "[]"},
        {"sft": {"learning_rate": rate, "seed": 42}},
    )
    pairs = [{**train[0], "chosen": "yes", "rejected": "no"}]
    tables = {"train.parquet": pa.Table.from_pylist([*train])}
    tables["preferences.parquet"] = pa.Table.from_pylist(pairs)
    split = publish(store, "heldout_split", tables, {"rows": [one["id"] for one in train]})
    gain = Difference(
        mean=0.5,
        low=0.2,
        high=0.8,
        wins=2,
        losses=0,
        ties=1,
        n=3,
        test="McNemar",
        p=0.01,
        detectable=None,
        rows_needed=None,
    )
    report = empty_report(
        scores={"base": {"exact": 0.0}, "sft": {"exact": right / 3}},
        intervals={"sft": (0.1, 0.9)},
        comparisons={"sft": {"base": {"exact": gain}}},
    )
    verdict = Verdict(
        status="PASS",
        candidate="sft",
        speaker="sft",
        reasons=["better"],
        dpo=None,
        candidates={"sft": Judgement(status="PASS", reasons=[])},
        bound_to={},
    )
    rows = [{**row(question, "yes"), "reference": "yes"} for question in QUESTIONS]
    answers = [scored_row("yes" if i < right else "no", exact=float(i < right)) for i in range(3)]
    table = store.root / "rows.parquet"
    write_scored_rows(table, {"sft": answers}, rows)
    files = {
        "report.json": report.to_json(),
        "verdict.json": verdict.to_json(),
        "rows.parquet": pq.read_table(table),
        "info/report.html": f"<html><body>the report of rate {rate}</body></html>",
    }
    table.unlink()
    return publish(
        store, "eval_report", files, {"rate": rate}, [lora, split], verdict="PASS", reason="better"
    )


@pytest.fixture
def two(project: Path) -> tuple[Opened, Artifact, Artifact]:
    """Return a project with two reports: another learning rate, and other training rows."""
    opened = Opened.of(load_project(project / "finetune.yaml"))
    opened.store.root.mkdir(parents=True)
    before = [row("same", "a"), row("changed", "a"), row("removed", "a")]
    after = [row("same", "a"), row("changed", "b"), row("added", "a"), row("added", "c")]
    first = version(opened.store, 0.1, before, right=1)
    second = version(opened.store, 0.2, after, right=2)
    return opened, first, second


def test_two_versions_differ_in_setting_answer_and_training_rows(
    two: tuple[Opened, Artifact, Artifact],
) -> None:
    opened, first, second = two
    sides = [side(opened, "tiny", one.fingerprint) for one in (first, second)]
    assert sides[0] is not None
    assert sides[1] is not None
    found = compare(sides[0], sides[1])
    settings = [one for one in found.settings if one.asset == "lora_adapter"]
    assert settings == [Setting("lora_adapter", "sft.learning_rate", "0.1", "0.2")]
    assert found.answers is not None
    assert found.answers == Answers(3, 0, 0, 1, 0, found.answers.flips)
    (flip,) = found.answers.flips
    assert (flip.prompt, flip.before, flip.after) == ("is it warm", "no", "yes")
    train, preferences = found.data
    assert (train.added, train.removed, train.changed) == (2, 1, 1)
    assert preferences.is_same
    (curves,) = found.curves
    assert [(one.is_second, one.is_training) for one in curves.lines] == [
        (False, True),
        (True, True),
    ]


def test_pages_show_versions_reports_and_what_gc_removed(
    project: Path, two: tuple[Opened, Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, first, second = two
    pages = client(project, monkeypatch)
    gone = merged_model(opened.store, "gone")
    decide(opened.store, gone)
    decide(opened.store, merged_model(opened.store, "kept"))
    for asset, version in [
        ("merged_model", gone.merged_model),
        ("lora_adapter", used_by(first)["lora_adapter"]),
    ]:
        removed = opened.store.find(asset, "tiny", version)
        assert removed is not None
        assert opened.store.remove(removed)

    listed = pages.get("/ft/versions").text
    for report in (first, second):
        assert f'href="/ft/versions/tiny/{report.fingerprint}/report"' in listed
    assert f"PROMOTED <code>{gone.merged_model[:8]}</code>" in listed
    page = pages.get(report_path("tiny", first.fingerprint))
    assert "the report of rate 0.1" in page.text
    assert 'href="/ft/versions"' in page.text
    (policy,) = (one for one in page.headers.get_list(POLICY) if "default-src" in one)
    assert "script-src" not in policy  # default-src 'none' forbids scripts
    missing = pages.get(report_path("tiny", "0" * 20))
    assert missing.status_code == 404
    assert "ft gc may have removed it" in missing.text

    query = {"before": f"tiny:{first.fingerprint}", "after": f"tiny:{second.fingerprint}"}
    compared = pages.get("/ft/compare", params=query).text
    assert "the store no longer has its lora_adapter" in compared
    assert "is &lt;b&gt;it&lt;/b&gt; late" not in compared  # its answer is the same
    assert "<b>1</b> better after, <b>0</b> worse after" in compared
    assert "2 added, 1 removed, 1 with another answer" in compared
    assert pages.get("/ft/compare", params={**query, "after": "tiny:x"}).status_code == 404
    split = opened.store.find("heldout_split", "tiny", used_by(first)["heldout_split"])
    assert split is not None
    (split.path / "train.parquet").write_bytes(b"damaged")
    told = pages.get("/ft/compare", params=query)
    assert told.status_code == 500
    assert "train.parquet" in told.text
    assert "to do:" in told.text
    assert pages.get("/ft/compare").url.path == "/ft/versions"


@pytest.mark.parametrize("base", ["..", "nobody", "%2e%2e", "..%2f.."])
def test_report_of_a_name_that_is_no_base_model_is_not_read(
    two: tuple[Opened, Artifact, Artifact],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
) -> None:
    version = two[1].fingerprint
    answer = client(project, monkeypatch).get(f"/ft/versions/{base}/{version}/report")
    assert answer.status_code == 404


def test_chart_places_its_lines_between_its_ticks() -> None:
    points = [(float(step), 4.2 / step) for step in range(1, 1001)]
    found = chart(Curves("SFT", [Curve("first", False, True, points)]))
    (line,) = found.lines
    placed = [tuple(map(float, point.split(","))) for point in line.points.split()]
    assert len(placed) <= 301
    assert placed == sorted(placed)
    assert all(found.left <= x <= found.right for x, _ in placed)
    assert all(found.top <= y <= found.bottom for _, y in placed)
    assert line.style == "line training"
    assert [tick.label for tick in found.values] == ["0", "2", "4", "6"]
    assert [tick.label for tick in found.steps] == ["0", "500", "1000"]
