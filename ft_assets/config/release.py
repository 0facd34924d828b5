"""`release:` of finetune.yaml: the rule of promotion, serving formats, hub repository, keys."""

from typing import Literal

from pydantic import Field, model_validator

from ft_assets.config.automation import Variable
from ft_assets.config.section import Section

Format = Literal["gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "nf4", "awq", "adapter"]


class PushSettings(Section):
    repo: str = Field(
        description="Hub repository, owner/name; {base_model} is replaced by the base model's "
        "name. The token is HF_TOKEN of the environment."
    )
    private: bool = True


class SigningSettings(Section):
    key: str | None = Field(
        default=None,
        description="PEM file of the private key that signs, outside of the project. `~` and "
        "`$VARIABLE` are replaced. Without it, this project only verifies.",
    )
    password_env: Variable | None = Field(
        default=None,
        description="Name of the environment variable that holds the password of the key.",
    )
    trusted: list[str] = Field(
        default=[],
        description="PEM files of the public keys whose signatures count. Default: the one of "
        "`key`. The environment variable FT_TRUSTED_KEYS replaces this list.",
    )

    @model_validator(mode="after")
    def _some_key(self) -> "SigningSettings":
        if not self.key and not self.trusted:
            raise ValueError("give key, trusted, or both")
        return self


class ReleaseSettings(Section):
    rule: Literal["not_worse", "better"] = Field(
        default="not_worse",
        description="Against the champion, paired: not worse by more than `margin`, or proven "
        "better.",
    )
    margin: float = Field(
        default=0.05,
        ge=0,
        description="How far below the champion the interval may reach, in evaluation.metric.",
    )
    approval: Literal["none", "required"] = Field(
        default="none",
        description="`required` holds each promotion and rollback until a person approves it.",
    )
    approval_reminder_days: float = Field(
        default=3, gt=0, description="Days after which an alert reminds of a proposal, and again."
    )
    approval_expires_days: float = Field(
        default=14,
        gt=0,
        description="Days after which a proposal lapses: it must be judged again.",
    )
    forms: list[Format] | None = Field(
        default=None,
        description="Serving formats to export. Default: gguf-q8_0 if the architecture can be "
        "written, else none.",
    )
    smoke_rows: int = Field(
        default=16, ge=1, description="Held-out prompts that each exported format answers."
    )
    min_form_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the merged model's answer tokens that must also be each format's "
        "most likely ones. Default: 0.9, in 4 bits 0.5.",
    )
    llama_cpp: str | None = Field(
        default=None,
        description="Folder of llama.cpp with convert_hf_to_gguf.py and llama-quantize.",
    )
    push: PushSettings | None = None
    signing: SigningSettings | None = None
