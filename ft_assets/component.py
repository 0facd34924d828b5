"""The component that puts a project into a code location with other assets (docs/dagster.md)."""

from pathlib import Path
from typing import Annotated

import dagster as dg
from pydantic import Field

from ft_assets.compat.dagster import keep_history_clean
from ft_assets.config import CONFIG_NAME, Place, Project, load_project
from ft_assets.config.place import require_prefix
from ft_assets.definitions import build
from ft_assets.errors import ConfigError
from ft_assets.orchestration.data_sources import upstream_assets


class FineTuneComponent(dg.Component, dg.Model, dg.Resolvable):
    """The graph of one project, below a prefix: fine-tune, prove, merge, release."""

    project: Annotated[
        Path,
        dg.Resolver(
            lambda context, given: context.resolve_source_relative_path(given),
            model_field_type=str,
            description="The folder of a finetune.yaml, or the file, relative to the component.",
        ),
    ]
    key_prefix: str | list[str] = Field(
        description="Prefix of all asset keys, e.g. [support, model] or support/model. Jobs, "
        "sensors and schedules have it in their names."
    )
    group: str | None = Field(
        default=None, description="One group for all assets; by default data, model, training, …"
    )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Return the definitions of the project. Raises ConfigError."""
        keep_history_clean(plain=False)
        project = self.placed()
        for other in context.component_tree.get_all_components(FineTuneComponent):
            if other is not self:
                require_apart(project, other.placed())
        return build(project)

    def placed(self) -> Project:
        """Read the project for its place. Raises ConfigError."""
        given = self.key_prefix
        prefix = tuple(given.split("/") if isinstance(given, str) else given)
        require_prefix(prefix, str(self.project))
        file = self.project / CONFIG_NAME if self.project.is_dir() else self.project
        return load_project(file, Place(prefix=prefix, group=self.group))


def require_apart(one: Project, other: Project) -> None:
    """Raise ConfigError for two projects with one prefix, one store, or one folder of tables.

    In one store, each would read the other's current report and model. `.ft/upstream` of a folder
    leads to the tables of one project.
    """
    prefix = "/".join(one.place.prefix)
    if one.place.prefix == other.place.prefix:
        raise ConfigError(
            where=f"{one.root}: key_prefix",
            found=f"{prefix} is that of {other.root} too",
            expected="a prefix of its own for each project of a code location",
            fix="change one of them",
        )
    stores = [project.store_url or project.store_path.resolve() for project in (one, other)]
    if stores[0] == stores[1]:
        raise ConfigError(
            where=f"{one.root / one.file}: store",
            found=f"{stores[0]} is also the store of {'/'.join(other.place.prefix)} ({other.root})",
            expected="a store of its own for each project: a gate reads the store",
            fix="change `store` in one of the two, or load the project once",
        )
    read = [upstream_assets(project) for project in (one, other)]
    if all(read) and one.root.resolve() == other.root.resolve():
        raise ConfigError(
            where=f"{one.root / one.file}: data",
            found=f"reads {', '.join(read[0])}, and {other.file} in the same folder reads "
            f"{', '.join(read[1])}",
            expected="a folder of its own for each project that reads tables of assets: they are "
            "kept below .ft in its folder",
            fix="move one of the two to another folder",
        )
