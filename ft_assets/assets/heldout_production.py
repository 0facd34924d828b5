"""The check `heldout_looks_like_production` of heldout_split."""

import os
from collections.abc import Sequence

import dagster as dg

from ft_assets.assets.heldout_split import heldout_split, noted, raw_dataset_of
from ft_assets.data.content import PRODUCTION
from ft_assets.data.production import VERSION, Production, Unlike, production_of
from ft_assets.data.two_sample import FOLDS, LEVEL, TwoSamples
from ft_assets.markdown import table
from ft_assets.orchestration.declarations import Checked, check
from ft_assets.orchestration.materializer import ERROR, WARN

SYSTEMS = 0.2  # the difference of the shares of prompts with a system turn that is told


@check(
    heldout_split,
    blocking=True,
    description="A classifier cannot tell held-out prompts from those of data.production.",
)
def heldout_looks_like_production(checked: Checked) -> dg.AssetCheckResult:
    """Fail if a classifier two-sample test tells the prompts apart above data.max_production_auc.

    Warn if there are too few prompts to find such a difference.
    """
    data = checked.project.data
    if not data.production:
        text = f"data.production is not set: {checked.metrics['heldout_rows']} held-out rows are "
        return dg.AssetCheckResult(passed=True, description=f"{text}compared with no real prompts")
    found = _found(checked)
    differs = found.test is not None and found.test.differ(data.max_production_auc)
    blind = found.test is None or found.test.found > data.max_production_auc
    return dg.AssetCheckResult(
        passed=not differs and not blind,
        severity=ERROR if differs and data.production_shift == "stop" else WARN,
        description=sentence(found, data.max_production_auc),
        metadata=_metadata(found),
    )


def _found(checked: Checked) -> Production:
    """Return the comparison. It is made once for the same rows: each run asks for it."""
    raw, data = raw_dataset_of(checked), checked.project.data
    decisive = [
        VERSION,
        *(checked.artifact.part_version(part) for part in ("heldout", "train", "preferences")),
        raw.part_version(PRODUCTION),
        data.model_dump(mode="json", include={"near_duplicate", "quoted"}),
    ]
    file = noted(checked, decisive).with_suffix(".json")
    if file.exists():
        return Production.model_validate_json(file.read_text())
    found = production_of(checked.artifact.path, raw.path / f"{PRODUCTION}.parquet", data)
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}-{os.getpid()}")
    staged.write_text(found.model_dump_json())
    os.replace(staged, file)
    return found


def sentence(found: Production, bar: float) -> str:
    """Return the outcome, the numbers behind it, and what to do about it."""
    parts = [_outcome(found, bar)]
    shares = found.heldout_systems, found.production_systems
    if abs(shares[0] - shares[1]) > SYSTEMS:
        parts.append(
            f"A system turn opens {shares[0]:.0%} of the held-out and {shares[1]:.0%} of the "
            "production prompts; the test does not read it"
        )
    parts.append(
        f"{found.trained} of {found.production_prompts} production prompts are also trained on, "
        f"and {found.held_out} are held out"
    )
    return ". ".join(parts) + "."


def _outcome(found: Production, bar: float) -> str:
    test = found.test
    if test is None:
        return (
            f"too few prompts to compare: {found.heldout_prompts} held-out and "
            f"{found.production_prompts} production prompts; {FOLDS} of each are the least"
        )
    numbers = (
        f"AUC {test.auc:.2f} (95 % interval {test.low:.2f} to {test.high:.2f}, p = {test.p:.3f}) "
        f"on {test.size} prompts of each; the bar is {bar:.2f}, data.max_production_auc"
    )
    if test.differ(bar):
        return (
            f"a classifier tells held-out from production prompts: {numbers}. The verdict is about "
            "other prompts than the model will get: name a file of data.heldout that is drawn from "
            "production, or add such rows to data.train"
        )
    if test.found > bar:
        return (
            f"too few prompts to tell: {numbers}. A test of this size finds an AUC of "
            f"{test.found:.2f} in four of five cases: add prompts to the smaller side, "
            f"{found.heldout_prompts} held-out or {found.production_prompts} of production"
        )
    # A small difference can be significant and below the bar.
    return f"no difference above the bar between held-out and production prompts: {numbers}"


def _metadata(found: Production) -> dict[str, dg.MarkdownMetadataValue | float]:
    shown: dict[str, dg.MarkdownMetadataValue | float] = {}
    if found.test:
        shown |= _numbers(found.test)
    if found.words:
        rows = [(one.word, f"{one.production:.0%}", f"{one.heldout:.0%}") for one in found.words]
        text = table(["word", "in production prompts", "in held-out prompts"], rows)
        shown["words_that_differ_most"] = dg.MetadataValue.md(text)
    for name, rows in (
        ("most_unlike_heldout", found.only_production),
        ("most_unlike_production", found.only_heldout),
    ):
        if rows:
            shown[name] = dg.MetadataValue.md(_rows(rows))
    return shown


def _numbers(test: TwoSamples) -> dict[str, float]:
    named = {"auc": test.auc, "auc_low": test.low, "auc_high": test.high, "p": test.p}
    return {**named, "accuracy": test.accuracy, "level": LEVEL, "prompts_of_each": test.size}


def _rows(rows: Sequence[Unlike]) -> str:
    return table(
        ["id", "score", "prompt"], [(row.id, f"{row.score:.2f}", row.text) for row in rows]
    )
