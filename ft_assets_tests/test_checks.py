"""Every asset check retries a store that does not answer, then fails in a sentence."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.artifacts import ArtifactStore
from ft_assets.config import load_project
from ft_assets.definitions import build
from ft_assets.errors import StoreUnreachable
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import failure

RETRIES = 1


def run_alone(definitions: dg.Definitions, key: dg.AssetCheckKey) -> dg.ExecuteInProcessResult:
    """Run one check without its asset."""
    partitioned = definitions.resolve_asset_graph().get(key.asset_key).is_partitioned
    job = dg.Definitions(
        assets=definitions.assets,
        asset_checks=definitions.asset_checks,
        resources=definitions.resources,
        executor=dg.in_process_executor,
        loggers=definitions.loggers,
        jobs=[dg.define_asset_job("one_check", selection=dg.AssetSelection.checks(key))],
    ).resolve_job_def("one_check")
    with dg.DagsterInstance.ephemeral() as instance:
        return job.execute_in_process(
            instance=instance,
            tags={"dagster/partition": "tiny"} if partitioned else {},
            raise_on_error=False,
            run_config={"loggers": {"console": {}}},
        )


def test_every_check_retries_a_silent_store_and_then_fails_in_a_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(project, launcher={"kind": "local", "retries": RETRIES, "retry_seconds": 0})
    (project / "text.md").write_text("a document")
    edit(project, data={"text": ["text.md"]})  # the stage before SFT has checks of its own
    definitions = build(load_project(project / "finetune.yaml"))
    keys = sorted(definitions.resolve_asset_graph().asset_check_keys)
    assert len(keys) == 53

    def silent(*_: Any) -> Any:
        raise StoreUnreachable("s3://models", "timeout")

    for reader in ("find", "need", "current", "current_name"):
        monkeypatch.setattr(ArtifactStore, reader, silent)
    for key in keys:
        result = run_alone(definitions, key)
        retries = [event for event in result.all_events if event.is_step_restarted]
        assert len(retries) == RETRIES, key.to_user_string()
        assert not result.success
        said = failure(result)
        assert "the store does not answer" in said, key.to_user_string()
        assert "Traceback" not in said
