"""finetune.yaml, whole: its sections, the base models, and what each base model resolves to."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ft_assets.config.advise import AdviseSettings
from ft_assets.config.audit import AuditSettings
from ft_assets.config.automation import (
    AlertSettings,
    FreshnessSettings,
    ScheduleSettings,
    UiSettings,
    VerifySettings,
)
from ft_assets.config.chat import ChatSettings
from ft_assets.config.data import DataSettings
from ft_assets.config.evaluation import EvaluationSettings, GateSettings
from ft_assets.config.launcher import AnyLauncher, LocalSettings
from ft_assets.config.place import Place
from ft_assets.config.release import ReleaseSettings
from ft_assets.config.review import ReviewSettings
from ft_assets.config.rl import RlSettings
from ft_assets.config.section import Section
from ft_assets.config.training import DpoSettings, LoraSettings, SftSettings, TextSettings
from ft_assets.errors import ConfigError, nearest
from ft_assets.redaction import has_user


class BaseModelSettings(Section):
    hub: str | None = Field(default=None, description="Hub id, e.g. Qwen/Qwen3-0.6B.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    folder: str | None = Field(
        default=None, description="A local folder with config.json and safetensors."
    )
    gguf: str | None = Field(
        default=None, description="A GGUF file, or package://<package>/<file in it>."
    )
    trust_remote_code: bool = False
    chat: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `chat:`."
    )
    lora: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `lora:`."
    )
    text: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `text:`."
    )
    sft: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `sft:`."
    )
    dpo: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `dpo:`."
    )
    rl: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `rl:`."
    )
    evaluation: dict[str, Any] = Field(
        default={}, description="What this base model needs differently in `evaluation:`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "BaseModelSettings":
        given = [name for name in ("hub", "folder", "gguf") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of hub, folder, gguf; found {given or 'none'}")
        return self


class Recipe(Section):
    """What one base model resolves to: the defaults with its own overrides.

    `text` is None without `data.text`, and `rl` without its section. None is left out of the data.
    """

    chat: ChatSettings = ChatSettings()
    lora: LoraSettings = LoraSettings()
    text: TextSettings | None = None
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    rl: RlSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_serializer(mode="wrap")
    def _without_absent_stages(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = handler(self)
        for stage in ("text", "rl"):
            if getattr(self, stage) is None:
                data.pop(stage, None)
        return data


class Project(Section):
    """finetune.yaml, whole."""

    store: str = Field(
        default=".ft/store", description="A folder, or s3://bucket/prefix, gs://bucket/prefix."
    )
    store_cache: str = Field(
        default=".ft/cache", description="Local copies of the artifacts of an object store."
    )
    data: DataSettings
    base_models: dict[str, BaseModelSettings] = Field(min_length=1)
    chat: ChatSettings = ChatSettings()
    lora: LoraSettings = LoraSettings()
    text: TextSettings = TextSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    rl: RlSettings | None = Field(
        default=None, description="Reinforcement from the SFT model; without it there is none."
    )
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    release: ReleaseSettings = ReleaseSettings()
    review: ReviewSettings | None = None
    audit: AuditSettings | None = None
    advise: AdviseSettings | None = Field(
        default=None, description="The asset `advice` and its section in the report; ft advise."
    )
    schedule: ScheduleSettings | None = None
    verify: VerifySettings | None = None
    freshness: FreshnessSettings | None = None
    alerts: AlertSettings = AlertSettings()
    ui: UiSettings = UiSettings()
    launcher: AnyLauncher = LocalSettings()
    memory_limit_gb: float | None = Field(
        default=None, gt=0, description="Most that training may take of a GPU. None: what is free."
    )

    root: Path = Field(default=Path(), exclude=True)
    file: str = Field(default="finetune.yaml", exclude=True)  # its name in `root`
    place: Place = Field(default=Place(), exclude=True)

    def path(self, relative: str) -> Path:
        """Return a path of finetune.yaml, relative to its folder."""
        return (
            (self.root / relative).resolve() if not Path(relative).is_absolute() else Path(relative)
        )

    @property
    def store_url(self) -> str | None:
        """The URL of the store if it is an object store, otherwise None."""
        return (
            self.store.replace("gcs://", "gs://", 1)
            if "://" in self.store and not self.store.startswith("file://")
            else None
        )

    @property
    def store_path(self) -> Path:
        """The local folder of the artifacts, or of the copies of an object store's artifacts."""
        if self.store_url:
            return (
                self.path(self.store_cache)
                / hashlib.sha256(self.store_url.encode()).hexdigest()[:12]
            )
        return self.path(self.store.removeprefix("file://"))

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        protocol, separator, rest = value.partition("://")
        if separator and protocol not in ("s3", "gs", "gcs", "file"):
            raise ValueError(f"{protocol}:// is not a store; a folder, s3://, gs:// or file:// is")
        if separator and protocol != "file" and (has_user(value) or not rest.partition("/")[0]):
            raise ValueError("give bucket and prefix only; credentials come from the environment")
        return value

    def base_model(self, name: str) -> BaseModelSettings:
        """Return the settings of one base model. Raises ConfigError naming the known ones."""
        if name not in self.base_models:
            raise ConfigError(
                where=f"base model {name!r}",
                found="is not in finetune.yaml",
                expected=f"one of {sorted(self.base_models)}",
                fix=nearest(name, self.base_models),
            )
        return self.base_models[name]

    def samples(self) -> bool:
        """Return True if DPO of a base model trains on pairs of the SFT model's own answers."""
        models = self.base_models.values()
        return any(model.dpo.get("pairs", self.dpo.pairs) != "given" for model in models)

    def recipe(self, name: str) -> Recipe:
        """Return the settings of a base model: the defaults, overridden by its own section."""
        model = self.base_model(name)
        sections: dict[str, Any] = {}
        text = ("text",) if self.data.text else ()
        rl = ("rl",) if self.rl else ()
        for section in ("chat", "lora", *text, "sft", "dpo", *rl, "evaluation"):
            merged = {**getattr(self, section).model_dump(), **getattr(model, section)}
            sections[section] = merged
        return Recipe.model_validate(sections)


def settings_version(settings: Any) -> str:
    """Return the hash of settings (a model or plain data), independent of key order."""
    data = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:16]
