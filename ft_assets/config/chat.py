"""`chat:` of finetune.yaml: the chat template and the longest row."""

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from ft_assets.config.section import Section, Share

TEMPLATE_INPUTS = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "strftime_now",
    "raise_exception",
}


class ChatSettings(Section):
    chat_template: str | None = Field(
        default=None, description="Template file for a base that has none."
    )
    template_name: str | None = Field(
        default=None, description="Name of the template, for a base with several chat templates."
    )
    template_kwargs: dict[str, Any] = Field(
        default={},
        description="Variables of the template, e.g. {enable_thinking: false}; baked into the "
        "snapshot and the served model.",
    )
    system_turn: Literal["template", "user"] = Field(
        default="template",
        description="user: put it into the first user turn, for templates that refuse or drop it.",
    )
    control_tokens: Literal["refuse", "text"] = Field(
        default="refuse",
        description="What a control token of the base in a text is: a refused row, or text "
        "(escaped, so that no control token results).",
    )
    date: datetime.date = Field(
        default=datetime.date(2025, 1, 1),
        description="The date that a template prints as today's.",
    )
    max_length: int = Field(
        default=1024, ge=16, description="Tokens; a longer conversation is filtered and counted."
    )
    max_truncated: Share = Field(
        default=0.01, ge=0, le=1, description="Share of filtered rows above which the graph stops."
    )

    @field_validator("template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier() or name in TEMPLATE_INPUTS:
                raise ValueError(
                    f"{name!r} is not a variable that can be set; "
                    f"the caller gives {', '.join(sorted(TEMPLATE_INPUTS))}"
                )
        return value

    def baked(self) -> dict[str, Any]:
        """Return the settings that decide a snapshot's chat template, as plain data."""
        names = {"template_name", "template_kwargs", "system_turn", "date"}
        # The default is not in the fingerprints of older snapshots.
        escaped = {"control_tokens"} if self.control_tokens == "text" else set[str]()
        return self.model_dump(mode="json", include=names | escaped)
