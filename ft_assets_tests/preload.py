"""What `ft run` imports in a project, but for `ft_assets.definitions`, which reads the project."""

import dagster
import dagster._core.storage.sqlite_storage  # noqa: F401
import datasets  # noqa: F401

import ft_assets.assets
import ft_assets.cli.graph
import ft_assets.cli.models
import ft_assets.cli.project
import ft_assets.commands.outcome
import ft_assets.commands.status
import ft_assets.commands.store_view
import ft_assets.orchestration.automation
import ft_assets.orchestration.console
import ft_assets.orchestration.materializer
import ft_assets.orchestration.rerun_stale
import ft_assets.orchestration.run_plan_job
import ft_assets.runs.in_process  # noqa: F401
