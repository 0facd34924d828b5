"""Alerts reach a real server, name what failed and never hold a secret.

Freshness and schedule come from finetune.yaml.
"""

import datetime
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ft_assets.config import (
    AlertSettings,
    EmailSettings,
    Project,
    SlackSettings,
    WebhookSettings,
    load_project,
)
from ft_assets.definitions import build
from ft_assets.errors import ConfigError, FtError
from ft_assets.orchestration.alerts import VERDICT_CHECK, alert_sensors
from ft_assets.orchestration.automation import freshness
from ft_assets_tests.factories import edit

SECRET = "planted-secret-of-the-webhook"


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[str, bytes]], list[int]]]:
    """A real HTTP server: its URL, the requests it received, the statuses it answers (else 200)."""
    received: list[tuple[str, bytes]] = []
    statuses: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(statuses.pop(0) if statuses else 200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"ok": true}')

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received, statuses
    server.shutdown()


def failed_run(
    instance: dg.DagsterInstance, passed: bool | None
) -> tuple[dg.ExecuteInProcessResult, dg.JobDefinition]:
    """Run a job of one asset that fails: by its check (passed False) or a user's error (None)."""

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["tiny"]))
    def eval_report() -> None:
        if passed is None:
            raise dg.Failure(description="data/train.jsonl:7: no messages", allow_retries=False)

    @dg.asset_check(
        asset=eval_report,
        name=VERDICT_CHECK,
        blocking=True,
        partitions_def=dg.StaticPartitionsDefinition(["tiny"]),
    )
    def check() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=bool(passed), description="FAIL: dpo: worse than the base by 0.1"
        )

    job = dg.Definitions(
        [eval_report], asset_checks=[check], jobs=[dg.define_asset_job("retrain", "eval_report")]
    ).resolve_job_def("retrain")
    return job.execute_in_process(
        instance=instance, partition_key="tiny", raise_on_error=False
    ), job


def tell(settings: AlertSettings, passed: bool | None, instance: dg.DagsterInstance) -> Any:
    """Let a run fail and hand it to the one sensor of these settings, as the daemon does."""
    outcome, _ = failed_run(instance, passed)
    assert not outcome.success
    project = Project.model_validate(
        {"data": {"train": ["x"]}, "base_models": {"tiny": {"folder": "x"}}, "alerts": settings}
    )
    (sensor,) = alert_sensors(project)
    context = dg.build_run_status_sensor_context(
        sensor.name, outcome.get_run_failure_event(), instance, outcome.dagster_run
    ).for_run_failure()
    function: Any = sensor
    return function(context)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def test_failed_verdict_reaches_the_webhook(
    receiver: Any, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received, _ = receiver
    monkeypatch.setenv("FT_WEBHOOK_URL", f"{url}/{SECRET}")
    settings = AlertSettings(
        webhook=WebhookSettings(url_env="FT_WEBHOOK_URL"), ui_url="https://graph.example.org/"
    )
    tell(settings, False, instance)
    ((path, body),) = received
    said = json.loads(body)
    assert path == f"/{SECRET}"
    assert (said["base_model"], said["verdict"]) == ("tiny", "FAIL")
    assert said["headline"] == "tiny: the verdict is FAIL, no model is released"
    assert said["reasons"] == [
        "eval_report/better_than_base: FAIL: dpo: worse than the base by 0.1"
    ]
    assert said["url"] == f"https://graph.example.org/runs/{said['run_id']}"
    assert said["text"].splitlines()[0] == said["headline"]


def test_failed_run_says_the_users_error(
    receiver: Any, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received, _ = receiver
    monkeypatch.setenv("FT_WEBHOOK_URL", url)
    tell(AlertSettings(webhook=WebhookSettings(url_env="FT_WEBHOOK_URL")), None, instance)
    said = json.loads(received[0][1])
    assert said["headline"] == "tiny: run failed"
    assert said["reasons"] == ["data/train.jsonl:7: no messages"]
    assert said["verdict"] is None


@pytest.mark.parametrize("trouble", ["refused", "unreachable", "unset"])
def test_alert_that_cannot_be_sent_is_an_error_without_the_secret(
    receiver: Any, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    url, _, statuses = receiver
    statuses += [500] * 9
    at = {"refused": f"{url}/{SECRET}", "unreachable": f"http://127.0.0.1:9/{SECRET}", "unset": ""}[
        trouble
    ]
    monkeypatch.setenv("FT_WEBHOOK_URL", at)
    with pytest.raises(FtError) as error:
        tell(AlertSettings(webhook=WebhookSettings(url_env="FT_WEBHOOK_URL")), False, instance)
    assert "FT_WEBHOOK_URL" in str(error.value)
    assert SECRET not in str(error.value)
    logged = "".join(
        record.user_message for record in instance.all_logs(next(iter(instance.get_runs())).run_id)
    )
    assert SECRET not in logged


def test_slack_gets_the_same_text(
    receiver: Any, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slack_sdk

    url, received, _ = receiver
    monkeypatch.setenv("FT_SLACK_TOKEN", SECRET)
    monkeypatch.setattr(
        slack_sdk.WebClient, "BASE_URL", f"{url}/api/"
    )  # Slack itself is not to be had here
    real = slack_sdk.WebClient.__init__
    monkeypatch.setattr(
        slack_sdk.WebClient,
        "__init__",
        lambda self, **options: real(self, **{**options, "base_url": f"{url}/api/"}),
    )
    tell(
        AlertSettings(slack=SlackSettings(token_env="FT_SLACK_TOKEN", channel="#models")),
        False,
        instance,
    )
    ((path, body),) = received
    assert path == "/api/chat.postMessage"
    assert b"the+verdict+is+FAIL" in body or b"the verdict is FAIL" in body


def test_mail_is_dagsters_own_sensor(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a real server: smtplib trusts no certificate that can be made here. The test takes the
    message where Dagster sends it."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setenv("FT_SMTP_PASSWORD", SECRET)
    monkeypatch.setattr(
        "dagster._utils.alert.send_email_via_starttls",
        lambda *values, **named: sent.append({"all": values, **named}),
    )
    settings = EmailSettings(
        password_env="FT_SMTP_PASSWORD",
        sender="ft@example.org",
        to=["ada@example.org"],
        smtp_host="smtp.example.org",
        smtp_type="STARTTLS",
    )
    tell(AlertSettings(email=settings), False, instance)
    ((sender, password, to, message, host, *_),) = [mail["all"] for mail in sent]
    assert (sender, password, to, host) == (
        "ft@example.org",
        SECRET,
        ["ada@example.org"],
        "smtp.example.org",
    )
    assert "Subject: tiny: the verdict is FAIL" in message
    assert "worse than the base by 0.1" in message
    assert SECRET not in message


def test_without_the_secret_the_graph_loads_and_the_sensor_says_what_is_missing(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FT_SLACK_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="the environment variable FT_SLACK_TOKEN is not set"):
        tell(
            AlertSettings(slack=SlackSettings(token_env="FT_SLACK_TOKEN", channel="#models")),
            False,
            instance,
        )


def test_sensors_are_off_until_switched_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(
        project,
        alerts={
            "webhook": {"url_env": "FT_WEBHOOK_URL"},
            "slack": {"token_env": "FT_SLACK_TOKEN", "channel": "#models"},
        },
    )
    sensors = {
        sensor.name: sensor
        for sensor in build(load_project(project / "finetune.yaml"))
        .get_repository_def()
        .sensor_defs
    }
    assert {"alert_webhook", "alert_slack"} <= set(sensors)
    assert all(
        sensor.default_status == dg.DefaultSensorStatus.STOPPED
        for name, sensor in sensors.items()
        if name.startswith("alert")
    )


def test_a_secret_itself_is_refused_in_finetune_yaml(project: Path) -> None:
    edit(project, alerts={"webhook": {"url_env": "https://hooks.example.org/T0/B0/x"}})
    with pytest.raises(ConfigError, match=r"alerts\.webhook\.url_env"):
        load_project(project / "finetune.yaml")


@pytest.mark.parametrize(
    "schedule", [{"cron": "sometimes"}, {"cron": "0 3 * * 1", "timezone": "Mars/Olympus"}]
)
def test_schedule_that_cannot_be_is_refused_with_its_key(
    project: Path, schedule: dict[str, str]
) -> None:
    edit(project, schedule=schedule)
    with pytest.raises(ConfigError, match=r"finetune\.yaml: schedule"):
        build(load_project(project / "finetune.yaml"))


def test_report_and_merged_model_grow_old_if_asked_for(project: Path) -> None:
    assert freshness(None, dg.AssetKey("eval_report")) is None
    edit(project, freshness={"warn_after_hours": 24, "fail_after_hours": 48})
    graph = build(load_project(project / "finetune.yaml")).resolve_asset_graph()
    policies: dict[str, Any] = {
        key.to_user_string(): graph.get(key).freshness_policy
        for key in graph.materializable_asset_keys
    }
    assert {name for name, policy in policies.items() if policy} == {"eval_report", "merged_model"}
    assert policies["eval_report"].fail_window.to_timedelta().total_seconds() == 48 * 3600
    assert policies["eval_report"].warn_window.to_timedelta().total_seconds() == 24 * 3600


def test_runs_that_nobody_waits_for_stand_behind_the_others(project: Path) -> None:
    edit(project, schedule={"cron": "0 3 * * 1"})
    repository = build(load_project(project / "finetune.yaml")).get_repository_def()
    with dg.build_schedule_context(
        repository_def=repository, scheduled_execution_time=datetime.datetime(2026, 1, 5, 3)
    ) as context:
        requests = (
            repository.get_schedule_def("retrain_schedule").evaluate_tick(context).run_requests
            or []
        )
    assert [(request.partition_key, request.tags["dagster/priority"]) for request in requests] == [
        ("tiny", "-1")
    ]
