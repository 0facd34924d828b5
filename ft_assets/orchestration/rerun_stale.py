"""`rerun_stale`: a sensor that plans each base model as `ft plan` does, and requests that run.

It uses our own plan instead of Dagster's AutomationConditions, because Dagster gets no event when
finetune.yaml, a base model or a library changes. Each tick reads all of them again, as the
requested run does.
"""

import json
from collections.abc import Iterable
from typing import Any, TypedDict

import dagster as dg

from ft_assets.config import Project
from ft_assets.errors import FtError, InfrastructureFault
from ft_assets.orchestration.automation import AFTER_PEOPLE
from ft_assets.orchestration.data_sources import Versions, source_versions
from ft_assets.orchestration.run_plan import Build
from ft_assets.orchestration.stale_graph import Request, StaleGraph, under_way
from ft_assets.screen import screen_of

INTERVAL_SECONDS = 60
UNSEEN = (
    "the data files changed, or are seen for the first time; "
    "planned when they do not change until the next tick"
)
TAGS = {"ft/started_by": "rerun_stale", **AFTER_PEOPLE}
SOURCES, BOARDS = "before all base models", "after all base models"


class Memory(TypedDict):
    """The sensor's cursor.

    `data`: the versions of the data sources. `asked`: {part: its last request}.
    """

    data: Versions | None
    asked: dict[str, Request]


def rerun_stale(project: Project, build: Build, job: Any) -> dg.SensorDefinition:
    """Build the sensor. It requests runs of `job`, which has every materializable asset."""
    known = set(project.base_models)

    @dg.sensor(
        name=project.place.name("rerun_stale"),
        job=job,
        minimum_interval_seconds=INTERVAL_SECONDS,
        description="Reruns what `ft plan` shows as stale, with one run for each base model, when "
        "data, finetune.yaml, a base or a library changed. A failed run is repeated only after "
        "another change.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        memory: Memory = json.loads(context.cursor or '{"data": null, "asked": {}}')
        try:
            graph = StaleGraph.today(project, build)
            data = source_versions(graph.project)
            if data != memory["data"]:  # wait until a copy in progress is over
                context.update_cursor(json.dumps({**memory, "data": data}))
                return dg.SkipReason(UNSEEN)
            busy = under_way(graph.project, context.instance)
            requests, notes = _requests(graph, known, busy, memory["asked"])
        except (FtError, InfrastructureFault) as error:
            return dg.SkipReason(str(error))
        except Exception as error:  # the tick fails with one screen of text
            raise dg.Failure(screen_of(error, "the sensor rerun_stale")[0]) from None
        for line in notes:
            context.log.info(line)
        reason = None if requests else dg.SkipReason("\n".join(notes) or "nothing is stale")
        return dg.SensorResult(run_requests=requests, skip_reason=reason, cursor=json.dumps(memory))

    return sensor


def _requests(
    graph: StaleGraph, known: set[str], busy: set[str | None], asked: dict[str, Request]
) -> tuple[list[dg.RunRequest], list[str]]:
    """Return the runs to request and notes about them. Updates `asked`.

    First come the assets that all base models read, if no run is under way. Then each base model,
    if no run of its own is under way. Then the assets that show all base models, if there is
    nothing else to do.
    """
    requests: list[dg.RunRequest] = []
    notes: list[str] = []

    def consider(
        label: str, keys: Iterable[dg.AssetKey], partition: str | None, held: bool
    ) -> bool:
        """Request what is stale, unless a run holds it or it was requested before.

        Return True if the part is up to date.
        """
        steps, refused = graph.stale(keys, partition)
        notes.extend(f"{label}: {asset}: {reason}" for asset, reason in refused.items())
        if not steps:
            asked.pop(label, None)
            return not refused
        names = ", ".join(step.asset for step in steps)
        now = graph.remembered(steps, partition)
        if held:
            notes.append(f"{label}: {names}: waits for the runs under way")
        elif graph.changed_since(asked.get(label), steps, now):
            asked[label] = now
            requests.append(graph.request([step.asset for step in steps], partition, TAGS))
            why = "; ".join(reason for step in graph.first(steps) for reason in step.why)
            notes.append(f"{label}: {names} ({why})")
        else:
            notes.append(
                f"{label}: {names}: a run was requested and did not make them; "
                "not again before something changes"
            )
        return False

    if not consider(SOURCES, graph.sources, None, bool(busy)):
        return requests, notes
    for name in graph.project.base_models:
        if name not in known:
            notes.append(f"{name}: new in finetune.yaml; seen after Reload definitions")
        elif None in busy or name in busy:
            notes.append(f"{name}: a run is under way")
        else:
            consider(name, graph.partitioned, name, held=False)
    if not requests and not busy:
        consider(BOARDS, graph.boards, None, held=False)
    return requests, notes
