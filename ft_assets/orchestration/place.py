"""A project inside a code location that it shares: its keys, and the runs that concern it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import dagster as dg

from ft_assets.config import Project
from ft_assets.orchestration.links import HOME

Event = TypeVar("Event", dg.MaterializeResult, dg.AssetCheckResult)
PLANNED = {dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED}


def key_of(project: Project, asset: str) -> dg.AssetKey:
    """Return the key of an asset of the project."""
    return dg.AssetKey([*project.place.prefix, asset])


def name_of(key: dg.AssetKey) -> str:
    """Return the name that an asset has in the store, in plans and in commands."""
    return key.path[-1]


def concerns(project: Project, run: dg.DagsterRun, instance: dg.DagsterInstance) -> bool:
    """Return True if a run has assets or a job of the project."""
    place = project.place
    job, named = run.job_name.removeprefix(place.name("")), run.job_name.startswith(place.name(""))
    if not place.prefix or (named and "__" not in job):  # else of a project below this prefix
        return True
    chosen = {*(run.asset_selection or ()), *(k.asset_key for k in run.asset_check_selection or ())}
    if not chosen:  # a job of somebody else, which may contain our assets
        events = instance.all_logs(run.run_id, of_type=PLANNED)
        chosen = {key for event in events if (key := event.get_dagster_event().asset_key)}
    return any(tuple(key.path[:-1]) == place.prefix for key in chosen)


def in_place(project: Project, body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of an asset or a check for a shared code location.

    Its resource has the project's own name, and its event no links to pages that are not served
    there. In a location of its own, a project has the function as it is.
    """
    if not project.place.prefix:
        return body
    ours, theirs = "materializer", project.place.name("materializer")

    @functools.wraps(body)
    def call(*arguments: Any, **given: Any) -> Any:
        return without_pages(project, body(*arguments, **{ours: given.pop(theirs)}, **given))

    signature = inspect.signature(body)
    call.__annotations__ = {theirs if k == ours else k: v for k, v in body.__annotations__.items()}
    vars(call)["__signature__"] = signature.replace(
        parameters=[
            one.replace(name=theirs) if one.name == ours else one
            for one in signature.parameters.values()
        ]
    )
    return call


def without_pages(project: Project, event: Event) -> Event:
    """Return an event without links to our own pages, which only `ft ui` serves."""
    if not project.place.prefix or not event.metadata:
        return event
    kept = {
        name: value
        for name, value in event.metadata.items()
        if not (isinstance(value, dg.UrlMetadataValue) and str(value.value).startswith(HOME))
    }
    return event._replace(metadata=kept)
