"""Documents that version 0.1 wrote for the demo are read, and their layout is unchanged.

store_0_1/ has the manifests and the JSON documents of that store, one folder per asset.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ft_assets.artifacts import fingerprint
from ft_assets.artifacts.manifest import Manifest
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.export.export_report import ExportReport
from ft_assets.models.license import BaseLicense
from ft_assets.release.register import ReleaseDocument

STORE = Path(__file__).parent / "store_0_1"
DOCUMENTS: list[tuple[str, type[BaseModel]]] = [
    ("eval_report/report.json", EvalReport),
    ("eval_report/verdict.json", Verdict),
    ("export/export.json", ExportReport),
    ("release/release.json", ReleaseDocument),
    ("base_model/license.json", BaseLicense),
]
ASSETS = sorted(folder.name for folder in STORE.iterdir())


def test_the_store_has_the_whole_graph() -> None:
    assert len(ASSETS) == 13


@pytest.mark.parametrize("name, model", DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_document_keeps_its_layout(name: str, model: type[BaseModel]) -> None:
    text = (STORE / name).read_text()
    document = model.model_validate_json(text)
    written: dict[str, Any] = document.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert json.dumps(written) == json.dumps(json.loads(text))  # the order of the keys too


@pytest.mark.parametrize("asset", ASSETS)
def test_manifest_keeps_its_text_and_its_fingerprint(asset: str) -> None:
    manifest = Manifest.read(STORE / asset)
    assert manifest.to_text() == (STORE / asset / "manifest.json").read_text()
    assert manifest.fingerprint == fingerprint(
        manifest.asset,
        manifest.code_version,
        manifest.settings,
        manifest.inputs,
        manifest.environment,
    )
