"""Alerts for a failed run or verdict: a webhook, a Slack channel, e-mail.

Each is a run-failure sensor, off until it is switched on. A verdict that is not a PASS fails its
blocking check and so its run, so one kind of sensor sees both. The sending process reads a secret
from its environment. No definition, tick, log line or message contains its value.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from ft_assets.compat.dagster import check_sentence
from ft_assets.config import AlertSettings, EmailSettings, Project
from ft_assets.errors import ConfigError, FtError
from ft_assets.orchestration.console import failures
from ft_assets.orchestration.place import concerns

VERDICT_CHECK = "better_than_base"
TIMEOUT_SECONDS = 20.0
WAYS = ("webhook", "slack", "email")  # keys of alerts
TOLD = {
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
    dg.DagsterEventType.PIPELINE_FAILURE,
}


@dataclass(frozen=True)
class Alert:
    """The report of a failed run. `verdict`: PASS, FAIL, INCONCLUSIVE, None without a verdict."""

    run_id: str
    base_model: str | None
    verdict: str | None
    headline: str
    reasons: list[str]
    url: str | None

    @property
    def text(self) -> str:
        return "\n".join([self.headline, *self.reasons, *([self.url] if self.url else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the webhook. Slack, Mattermost and Teams show its `text`."""
        return {
            "text": self.text,
            "headline": self.headline,
            "reasons": self.reasons,
            "run_id": self.run_id,
            "base_model": self.base_model,
            "verdict": self.verdict,
            "url": self.url,
        }


def alert(run: dg.DagsterRun, instance: dg.DagsterInstance, ui_url: str | None) -> Alert:
    """Collect the failed blocking checks of a run, and the reasons why its steps failed."""
    events = [
        event.dagster_event
        for event in instance.all_logs(run.run_id, of_type=TOLD)
        if event.dagster_event is not None
    ]
    results = [
        event.asset_check_evaluation_data
        for event in events
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    refused = [
        result
        for result in results
        if not result.passed and result.severity == dg.AssetCheckSeverity.ERROR
    ]
    verdicts = [
        result.description or "" for result in results if result.check_name == VERDICT_CHECK
    ]
    verdict = verdicts[-1].partition(":")[0] if verdicts else None
    base_model = run.tags.get("dagster/partition") or run.tags.get("ft/base_model")
    about = base_model or run.job_name
    if any(result.check_name == VERDICT_CHECK for result in refused):
        headline = f"{about}: the verdict is {verdict}, no model is released"
    elif refused:
        headline = f"{about}: check {refused[0].check_name} failed"
    else:
        headline = f"{about}: run failed"
    url = f"{ui_url.rstrip('/')}/runs/{run.run_id}" if ui_url else None
    told = failures(events)
    # A check that does not block fails, but not its run.
    reasons = [text for text in map(check_sentence, refused) if text not in "\n".join(told)]
    return Alert(run.run_id, base_model, verdict, headline, told + reasons, url)


def secret(variable: str, where: str) -> str:
    """Return the value of an environment variable. Raises ConfigError that contains its name."""
    value = os.environ.get(variable)
    if not value:
        raise ConfigError(
            where=where,
            found=f"the environment variable {variable} is not set",
            expected="its value in the daemon's environment",
            fix="set it",
        )
    return value


def alert_sensors(project: Project) -> list[dg.SensorDefinition]:
    """Return a sensor for each way that finetune.yaml names."""
    settings = project.alerts
    if project.place.prefix:
        return _of_a_shared_location(project)
    sensors: list[dg.SensorDefinition] = []
    if settings.webhook is not None:
        sensors.append(_webhook(settings))
    if settings.slack is not None:
        sensors.append(
            _with_secret(
                "alert_slack",
                settings.slack.token_env,
                "alerts.slack.token_env",
                lambda token: _slack(settings, token),
            )
        )
    if settings.email is not None:
        sensors.append(
            _with_secret(
                "alert_email",
                settings.email.password_env,
                "alerts.email.password_env",
                lambda word: _email(settings, word),
            )
        )
    return sensors


def _of_a_shared_location(project: Project) -> list[dg.SensorDefinition]:
    """Return the sensors of a location with other runs: Dagster's own would report these too."""

    def sensor(way: str) -> dg.SensorDefinition:
        one = AlertSettings(ui_url=project.alerts.ui_url, **{way: getattr(project.alerts, way)})

        @dg.run_failure_sensor(
            name=project.place.name(f"alert_{way}"),
            description=f"Reports each failed run and verdict of this project: alerts.{way}.",
        )
        def report(context: dg.RunFailureSensorContext) -> None:
            if concerns(project, context.dagster_run, context.instance):
                send(one, alert(context.dagster_run, context.instance, one.ui_url))

        return report

    return [sensor(way) for way in WAYS if getattr(project.alerts, way) is not None]


def _webhook(settings: AlertSettings) -> dg.SensorDefinition:
    assert settings.webhook is not None
    variable = settings.webhook.url_env

    @dg.run_failure_sensor(
        name="alert_webhook",
        description="Posts each failed run and verdict as JSON to the URL in the environment "
        f"variable {variable}.",
    )
    def alert_webhook(context: dg.RunFailureSensorContext) -> None:
        url = secret(variable, "alerts.webhook.url_env")
        post(url, alert(context.dagster_run, context.instance, settings.ui_url).to_dict(), variable)

    return alert_webhook


def post(url: str, body: Mapping[str, Any], variable: str) -> None:
    """Post JSON. Raises FtError that names the variable, not the URL: the URL may be a secret."""
    import httpx

    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(retries=3), timeout=TIMEOUT_SECONDS
        ) as client:
            answer = client.post(url, json=dict(body))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = f"the URL in {variable} could not be reached ({type(error).__name__})"
        raise FtError(
            where="alerts.webhook",
            found=found,
            expected="a server that takes a POST of JSON",
            fix="look at the URL and the network",
        ) from None
    if not answer.is_success:
        found = f"the server at the URL in {variable} answered {answer.status_code}"
        raise FtError(
            where="alerts.webhook",
            found=found,
            expected="a status of 200 to 299",
            fix="look at the URL",
        )


def send(settings: AlertSettings, found: Alert) -> None:
    """Send an alert in each way that finetune.yaml names, without a sensor of Dagster's own.

    Raises FtError if a secret is not set, or if a webhook cannot be reached.
    """
    if settings.webhook is not None:
        variable = settings.webhook.url_env
        post(secret(variable, "alerts.webhook.url_env"), found.to_dict(), variable)
    if settings.slack is not None:
        from slack_sdk.web.client import WebClient

        token = secret(settings.slack.token_env, "alerts.slack.token_env")
        WebClient(token=token).chat_postMessage(channel=settings.slack.channel, text=found.text)
    if settings.email is not None:
        word = secret(settings.email.password_env, "alerts.email.password_env")
        _mail(settings.email, word, found)


def _mail(email: EmailSettings, password: str, found: Alert) -> None:
    import smtplib
    import ssl
    from email.message import EmailMessage

    message = EmailMessage()
    message["Subject"], message["From"] = found.headline, email.sender
    message["To"] = ", ".join(email.to)
    message.set_content(found.text)
    trusted = ssl.create_default_context()
    over_ssl = email.smtp_type == "SSL"
    port = email.smtp_port or (465 if over_ssl else 587)
    with (
        smtplib.SMTP_SSL(email.smtp_host, port, context=trusted)
        if over_ssl
        else smtplib.SMTP(email.smtp_host, port)
    ) as server:
        if not over_ssl:
            server.starttls(context=trusted)
        server.login(email.smtp_user or email.sender, password)
        server.send_message(message)


def _slack(settings: AlertSettings, token: str) -> dg.SensorDefinition:
    assert settings.slack is not None
    try:
        from dagster_slack import make_slack_on_run_failure_sensor
    except ImportError:
        raise ConfigError(
            where="alerts.slack",
            found="dagster-slack is not installed",
            expected="the extra `alerts`",
            fix="pip install 'ft_assets[alerts]'",
        ) from None
    return make_slack_on_run_failure_sensor(
        settings.slack.channel,
        token,
        text_fn=lambda context: alert(context.dagster_run, context.instance, settings.ui_url).text,
        name="alert_slack",
        webserver_base_url=settings.ui_url,
    )


def _email(settings: AlertSettings, password: str) -> dg.SensorDefinition:
    assert settings.email is not None
    email = settings.email

    def body(context: dg.RunFailureSensorContext) -> str:
        import html

        return html.escape(
            alert(context.dagster_run, context.instance, settings.ui_url).text
        ).replace("\n", "<br>")

    return dg.make_email_on_run_failure_sensor(
        email.sender,
        password,
        email.to,
        email_body_fn=body,
        email_subject_fn=lambda context: (
            alert(context.dagster_run, context.instance, None).headline
        ),
        smtp_host=email.smtp_host,
        smtp_type=email.smtp_type,
        smtp_port=email.smtp_port,
        smtp_user=email.smtp_user,
        name="alert_email",
        webserver_base_url=settings.ui_url,
    )


def _with_secret(
    name: str, variable: str, where: str, make: Callable[[str], dg.SensorDefinition]
) -> dg.SensorDefinition:
    """Build Dagster's own sensor, which takes the secret when it is defined.

    Without the secret, build a sensor that reports the missing variable at each tick, so that
    `ft run` still loads the graph on a machine without the secret.
    """
    if os.environ.get(variable):
        return make(os.environ[variable])

    @dg.run_failure_sensor(name=name, description=f"Waits for the environment variable {variable}.")
    def without_secret(context: dg.RunFailureSensorContext) -> None:
        secret(variable, where)

    return without_secret
