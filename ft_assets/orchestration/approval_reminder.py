"""`approval_reminder`: an alert of a proposal that nobody has decided for some days."""

import json
import time

import dagster as dg

from ft_assets.artifacts import open_store
from ft_assets.config import Project
from ft_assets.errors import ReleaseError
from ft_assets.orchestration.alerts import Alert, send
from ft_assets.release.approval import DAY, Proposal, proposal_of

SECONDS = 3600


def approval_reminder(project: Project) -> list[dg.SensorDefinition]:
    """Return the sensor, if finetune.yaml requires approval and names a way for alerts."""
    ways = (project.alerts.webhook, project.alerts.slack, project.alerts.email)
    if project.release.approval != "required" or not any(ways):
        return []

    @dg.sensor(
        name=project.place.name("approval_reminder"),
        minimum_interval_seconds=SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reminds, by the ways of `alerts`, of a proposal that awaits approval for "
        f"{project.release.approval_reminder_days:g} days, and again after as many.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        sent: dict[str, int] = json.loads(context.cursor or "{}")
        told = []
        for name in project.base_models:
            try:
                found = proposal_of(open_store(project), name, project.release)
            except ReleaseError as error:  # a register that is not whole is another's alarm
                context.log.warning(str(error))
                continue
            if found is None or found.has_lapsed():
                continue
            times = int((time.time() - found.since) / DAY / project.release.approval_reminder_days)
            key = f"{name}/{found.entry.sequence}"
            if times > sent.get(key, 0):
                send(project.alerts, reminder(found, project.alerts.ui_url))
                sent[key] = times
                context.update_cursor(json.dumps(sent))
                told.append(name)
        return dg.SkipReason(f"reminded of: {', '.join(told)}" if told else "nothing waits so long")

    return [sensor]


def reminder(found: Proposal, ui_url: str | None) -> Alert:
    """Return the alert of a proposal."""
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.expires))
    days = (time.time() - found.since) / DAY
    return Alert(
        run_id=found.entry.run_id,
        base_model=found.partition,
        verdict=found.model.verdict,
        headline=f"{found.partition}: {found.what} awaits approval for {days:.0f} days, and lapses "
        f"at {until}",
        reasons=list(found.entry.reasons),
        url=f"{ui_url.rstrip('/')}/ft/approval" if ui_url else None,
    )
