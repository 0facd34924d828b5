"""`schedule:`, `freshness:` and `alerts:` of finetune.yaml: automation.

None of these settings decides the content of an artifact.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from ft_assets.config.section import Section

# Only the name. The value is only in the environment of the webserver and the daemon.
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]


class ScheduleSettings(Section):
    cron: str = Field(description='When to retrain, e.g. "0 3 * * 1".')
    timezone: str = "UTC"


class VerifySettings(Section):
    cron: str = Field(default="40 4 * * *", description="When to verify the store.")
    timezone: str = "UTC"


class FreshnessSettings(Section):
    warn_after_hours: float = Field(
        default=24 * 7,
        gt=0,
        description="A report or merged model older than this is shown as ageing.",
    )
    fail_after_hours: float = Field(
        default=24 * 14, gt=0, description="Older than this: as overdue."
    )


class WebhookSettings(Section):
    url_env: Variable = Field(
        description="Name of the environment variable that holds the URL. With most services the "
        "URL is a secret."
    )


class SlackSettings(Section):
    token_env: Variable = Field(
        description="Name of the environment variable that holds the bot token."
    )
    channel: str = Field(description='E.g. "#models".')


class EmailSettings(Section):
    password_env: Variable = Field(
        description="Name of the environment variable that holds the SMTP password."
    )
    sender: str
    to: list[str] = Field(min_length=1)
    smtp_host: str
    smtp_port: int | None = None
    smtp_type: Literal["SSL", "STARTTLS"] = "SSL"
    smtp_user: str | None = Field(default=None, description="By default the sender.")


class UiSettings(Section):
    """What `ft ui` takes from a proxy before it."""

    identity_header: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z0-9-]*$",
        description="Header by which the proxy that --host-name names gives a person's name, e.g. "
        "X-Forwarded-User. The proxy must set it itself, and remove one that a browser sends.",
    )


class AlertSettings(Section):
    """Where alerts of failed runs and verdicts are sent."""

    ui_url: str | None = Field(
        default=None,
        description="Where the UI is reached, for links, e.g. https://graph.example.org.",
    )
    webhook: WebhookSettings | None = None
    slack: SlackSettings | None = None
    email: EmailSettings | None = None
