"""What a run came to, as plain data, for `ft run --json`."""

from typing import Any

import dagster as dg

from ft_assets.orchestration.console import failures


def outcome_of(base_model: str | None, done: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """Return the run's id, success, assets with fingerprint and path, failed checks and errors."""
    assets = {}
    for event in done.get_asset_materialization_events():
        found = event.step_materialization_data.materialization
        metadata = {name: value.value for name, value in found.metadata.items()}
        assets[found.asset_key.to_user_string()] = {
            name: metadata.get(name)
            for name in ("reused", "fingerprint", "path", "made_in_seconds")
        }
    refused = {
        f"{check.asset_key.to_user_string()}/{check.check_name}": check.description
        for check in done.get_asset_check_evaluations()
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR
    }
    return {
        "base_model": base_model,
        "run_id": done.run_id,
        "success": done.success,
        "assets": assets,
        "failed_checks": refused,
        "failures": failures(done.all_events),
    }
