"""The outcome of a run, for `ft run --json`."""

import dagster as dg
from pydantic import BaseModel

from ft_assets.orchestration.console import failures


class MadeAsset(BaseModel, frozen=True):
    """An artifact that a run made or reused, from the metadata of its materialization."""

    reused: bool | None = None
    fingerprint: str | None = None
    path: str | None = None
    made_in_seconds: float | None = None


class Outcome(BaseModel, frozen=True):
    """The end of one run. `failed_checks` maps asset/check to the description."""

    base_model: str | None
    run_id: str
    success: bool
    assets: dict[str, MadeAsset]
    failed_checks: dict[str, str | None]
    failures: list[str]


def outcome_of(base_model: str | None, done: dg.ExecuteInProcessResult) -> Outcome:
    """Return the outcome of a run of one base model, or of the unpartitioned assets (None)."""
    assets = {}
    for event in done.get_asset_materialization_events():
        made = event.step_materialization_data.materialization
        metadata = {name: value.value for name, value in made.metadata.items()}
        assets[made.asset_key.to_user_string()] = MadeAsset.model_validate(metadata)
    failed_checks = {
        f"{check.asset_key.to_user_string()}/{check.check_name}": check.description
        for check in done.get_asset_check_evaluations()
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    }
    return Outcome(
        base_model=base_model,
        run_id=done.run_id,
        success=done.success,
        assets=assets,
        failed_checks=failed_checks,
        failures=failures(done.all_events),
    )
