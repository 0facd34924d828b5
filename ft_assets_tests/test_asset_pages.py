"""What the page of an asset shows first, and how it shows numbers and settings."""

from pathlib import Path

import dagster as dg

from ft_assets.artifacts import ArtifactStore
from ft_assets.assets.recipe import settings_table
from ft_assets.orchestration.materializer import result
from ft_assets.orchestration.readable import readable
from ft_assets_tests.registers import merged_model


def test_result_comes_first_and_is_rounded_and_the_manifest_stays_exact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    model = merged_model(store, "one", merged_gain=0.037071019411087036, tokens=123456.789)
    artifact = store.need("merged_model", "tiny")
    assert artifact.fingerprint == model.merged_model
    shown = result(
        artifact, True, ("verdict", "merged_gain", "absent"), curve=dg.MetadataValue.md("![]()")
    ).metadata
    assert list(shown or {})[:5] == ["verdict", "merged_gain", "curve", "made_in_seconds", "reused"]
    assert list(shown or {})[-2:] == ["fingerprint", "path"]
    assert (shown or {})["merged_gain"] == 0.03707
    assert (shown or {})["tokens"] == 123457
    assert artifact.metrics["merged_gain"] == 0.037071019411087036


def test_numbers_of_checks_are_rounded_and_words_are_left() -> None:
    assert readable(dg.MetadataValue.float(0.126634)).value == 0.1266
    assert readable(dg.MetadataValue.int(1234567)).value == 1234567
    assert readable("as it is") == "as it is"
    assert readable(True) is True


def test_settings_are_a_table_with_a_row_for_each_key() -> None:
    lines = settings_table({"r": 8, "warmup": {"steps": 2}, "mask": None, "a|b": "x|y"}).split("\n")
    assert lines[0] == "| key | value |"
    assert lines[2:4] == ["| `r` | 8 |", "| `warmup.steps` | 2 |"]
    assert lines[4:] == ["| `mask` | – |", "| `a\\|b` | x\\|y |"]
