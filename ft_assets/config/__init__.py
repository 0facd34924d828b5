"""finetune.yaml -> frozen models, one module a section. Nothing here reads data or weights."""

from ft_assets.config.advise import AdviseSettings
from ft_assets.config.audit import AuditSettings
from ft_assets.config.automation import (
    AlertSettings,
    EmailSettings,
    FreshnessSettings,
    ScheduleSettings,
    SlackSettings,
    VerifySettings,
    WebhookSettings,
)
from ft_assets.config.chat import ChatSettings
from ft_assets.config.data import MIXED, DataSettings, Source, StratifySettings
from ft_assets.config.evaluation import (
    ADAPTERS,
    EvaluationSettings,
    GateSettings,
    JudgeSettings,
)
from ft_assets.config.loading import CONFIG_NAME, find_config, load_project, reloaded
from ft_assets.config.place import Place
from ft_assets.config.project import BaseModelSettings, Project, Recipe, settings_version
from ft_assets.config.release import Format, PushSettings, ReleaseSettings, SigningSettings
from ft_assets.config.rivals import (
    BaseRival,
    EndpointRival,
    RetrievalRival,
    RivalSettings,
    answerer_of,
)
from ft_assets.config.rl import RlSettings
from ft_assets.config.section import Section, Share
from ft_assets.config.training import (
    DpoSettings,
    LoraSettings,
    SamplingSettings,
    SftSettings,
    TextSettings,
    TrainSettings,
)

__all__ = [
    "ADAPTERS",
    "CONFIG_NAME",
    "MIXED",
    "AdviseSettings",
    "AlertSettings",
    "AuditSettings",
    "BaseModelSettings",
    "BaseRival",
    "ChatSettings",
    "DataSettings",
    "DpoSettings",
    "EmailSettings",
    "EndpointRival",
    "EvaluationSettings",
    "Format",
    "FreshnessSettings",
    "GateSettings",
    "JudgeSettings",
    "LoraSettings",
    "Place",
    "Project",
    "PushSettings",
    "Recipe",
    "ReleaseSettings",
    "RetrievalRival",
    "RivalSettings",
    "RlSettings",
    "SamplingSettings",
    "ScheduleSettings",
    "Section",
    "SftSettings",
    "Share",
    "SigningSettings",
    "SlackSettings",
    "Source",
    "StratifySettings",
    "TextSettings",
    "TrainSettings",
    "VerifySettings",
    "WebhookSettings",
    "answerer_of",
    "find_config",
    "load_project",
    "reloaded",
    "settings_version",
]
