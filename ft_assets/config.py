"""finetune.yaml -> frozen models. Every error names the file, the key path and the fix.

Not here: anything that reads data or weights. Option names are TRL's and PEFT's own where they have one.
"""

import datetime
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from ft_assets.errors import ConfigError

CONFIG_NAME = "finetune.yaml"


class Section(BaseModel):
    """A part of finetune.yaml: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _share(value: Any) -> Any:
    """Read `1%` as 0.01."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Share = Annotated[float, BeforeValidator(_share)]


class StratifySettings(Section):
    """Which side a row is on depends on its own hash alone; a stratum can only have another share than the rest."""

    field: str = Field(description="A field of the train rows, e.g. category.")
    shares: dict[str, float] = Field(default={}, description="Held-out share of some values: {rare: 0.5}; others: data.heldout_share.")


ConversationFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
PreferenceFormat = Literal["preference", "sharegpt_preference", "ranked", "kto"]
Format = ConversationFormat | PreferenceFormat


class DataSettings(Section):
    train: list[str] = Field(description="Files or globs of conversations, relative to finetune.yaml.")
    rehearsal: list[str] = Field(default=[], description="General conversations trained beside the task; never held out.")
    preferences: list[str] = Field(default=[], description="Files of prompt/chosen/rejected triples; none: no DPO.")
    heldout: list[str] = Field(default=[], description="A fixed held-out file that looks like production traffic.")
    retention: list[str] = Field(default=[], description="General prompts the model must not get worse at.")
    few_shot: list[str] = Field(default=[], description="Examples for the prompted base, the rival of the fine-tune.")
    few_shot_system: str | None = Field(default=None, description="System prompt of the prompted base.")
    heldout_share: Share = Field(default=0.1, gt=0, lt=0.9, description="Held-out share when no file is given.")
    validation_share: Share = Field(
        default=0.05,
        ge=0,
        lt=0.9,
        description="Share of the train rows that is watched each epoch and never trained on: it shows overfitting.",
    )
    split_salt: str = Field(default="", description="Changes which rows are held out; change it only deliberately.")
    columns: dict[Literal["train", "rehearsal", "preferences", "heldout", "retention", "few_shot"], dict[str, str]] = Field(
        default={}, description="Names of columns that are not recognised: {train: {prompt: text, completion: category}}."
    )
    format: dict[Literal["train", "rehearsal", "preferences", "heldout", "retention", "few_shot"], Format] = Field(
        default={},
        description="What rows are where their keys do not say it: {train: alpaca, rehearsal: text}; default: by each row's keys.",
    )
    encoding: str | None = Field(default=None, description="Of text files that are not UTF-8, e.g. latin-1.")
    near_duplicate: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity from which a trained prompt is a copy of a held-out one and is left out; null: off.",
    )
    quoted: float | None = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of a held-out prompt's 13-word runs from which a trained text quotes it and is left out; null: off.",
    )
    contamination: list[str] = Field(default=[], description="Evaluation files of yours: what is trained must not stand in them.")
    stratify: StratifySettings | None = Field(default=None, description="A field whose values are held out by their own shares.")
    max_invalid: Share = Field(default=0.01, ge=0, le=1, description="Share of unusable rows of a source above which it stops, e.g. 1%.")

    @model_validator(mode="after")
    def _formats_fit(self) -> "DataSettings":
        for key, name in self.format.items():
            known = get_args(PreferenceFormat if key == "preferences" else ConversationFormat)
            if name not in known:
                raise ValueError(f"format.{key}: {name} is not one of {', '.join(known)}")
            if name == "text" and key not in ("train", "rehearsal"):
                raise ValueError(f"format.{key}: a text has no answer to compare; text is for train and rehearsal")
        return self


class LoraSettings(Section):
    method: Literal["lora", "qlora"] = "lora"
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["attention-qv", "attention", "all-linear"] | list[str] = "attention"
    use_rslora: bool = False
    use_dora: bool = False


TEMPLATE_INPUTS = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now", "raise_exception"}


class ChatSettings(Section):
    chat_template: str | None = Field(default=None, description="Template file for a base that has none.")
    template_name: str | None = Field(default=None, description="Which one, for a base with several chat templates.")
    template_kwargs: dict[str, Any] = Field(
        default={}, description="Variables of the template, e.g. {enable_thinking: false}; baked into the snapshot and the served model."
    )
    system_turn: Literal["template", "user"] = Field(
        default="template", description="user: put it into the first user turn, for templates that refuse or drop it."
    )
    date: datetime.date = Field(default=datetime.date(2025, 1, 1), description="What a template that prints today's date prints.")
    max_length: int = Field(default=1024, ge=16, description="Tokens; a longer conversation is left out and counted.")
    max_truncated: Share = Field(default=0.01, ge=0, le=1, description="Share of left-out rows above which it stops.")

    @field_validator("template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier() or name in TEMPLATE_INPUTS:
                raise ValueError(f"{name!r} is no variable that can be set; {', '.join(sorted(TEMPLATE_INPUTS))} are given by the caller")
        return value

    def baked(self) -> dict[str, Any]:
        """Return the settings that decide a snapshot's chat template, as plain data."""
        return self.model_dump(mode="json", include={"template_name", "template_kwargs", "system_turn", "date"})


class TrainSettings(Section):
    num_train_epochs: float = Field(default=2, gt=0)
    max_steps: int = Field(default=-1, description="Optimizer steps; -1: by epochs.")
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = Field(default=0.03, ge=0, description="Below 1 a share of all steps.")
    effective_batch: int = Field(default=16, ge=1, description="Conversations (or pairs) an optimizer step.")
    micro_batch: int = Field(default=4, ge=1, description="Of these, how many at once; the rest is accumulated.")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool | None = Field(default=None, description="None: on for a GPU, off on a CPU.")
    save_steps: int = Field(default=50, ge=1, description="Optimizer steps between checkpoints.")
    seed: int = 42
    trainer: dict[str, Any] = Field(default={}, description="Any other option of TRL's config, by its own name.")


class SftSettings(TrainSettings):
    pass


class DpoSettings(TrainSettings):
    num_train_epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    effective_batch: int = Field(default=8, ge=1)
    beta: float = Field(default=0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    max_pairs: int | None = Field(default=None, ge=1, description="Use only the first n pairs by id (a time budget).")


class JudgeSettings(Section):
    """A judge: any OpenAI-compatible chat endpoint. It compares a candidate's answer with the base's, in both orders."""

    base_url: str = Field(description="e.g. https://api.openai.com/v1, or http://127.0.0.1:8000/v1")
    model: str
    api_key_env: str | None = Field(default=None, description="Name of the environment variable that holds the key.")
    criteria: str = Field(default="Which answer serves the user better?", description="What the judge is asked.")
    timeout: float = Field(default=60, gt=0, description="Seconds a request.")


class EvaluationSettings(Section):
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int | None = Field(default=None, ge=1, description="None: 32 on a CPU, by free memory on a GPU; halved when it runs out.")
    metric: str = Field(default="exact", description="The metric the verdict is about.")
    json_fields: list[str] = Field(default=[], description="Keys of the JSON object that an answer must be.")
    json_schema: str | None = Field(default=None, description="File with a JSON schema the answer must meet: metric `schema`.")
    metrics: list[Literal["rouge", "bleu", "chrf"]] = Field(default=[], description="Text metrics measured besides.")
    regex: str | None = Field(default=None, description="The whole answer must match it: metric `regex`.")
    labels: list[str] = Field(default=[], description="The answer is one of these: metrics `label`, `known_label`.")
    choice: bool = Field(default=False, description="Also pick the most likely of `labels` by log-probability: metric `choice`.")
    python: str | None = Field(default=None, description="Own metric, module:function(answer, reference, messages) -> number.")
    judge: JudgeSettings | None = Field(default=None, description="An LLM judge: metric `judge`. Off by default.")
    retention_rows: int | None = Field(default=None, ge=1, description="Take only the first n retention rows by id.")
    retention_answers: int = Field(default=64, ge=2, description="Of these, how many are answered too; the loss is of all.")
    retention_metric: Literal["chrf", "rougeL", "exact"] = Field(default="chrf", description="Task score of general prompts.")
    lm_eval: list[str] = Field(default=[], description="Tasks of lm-evaluation-harness, as general prompts (needs ft_assets[lm-eval]).")
    lm_eval_limit: int = Field(default=100, ge=2, description="Documents a task.")
    lm_eval_path: str | None = Field(default=None, description="A folder with task files of your own.")
    train_rows: int = Field(default=32, ge=1, description="Train rows whose loss is compared with the held-out loss.")
    refusals: list[str] = Field(default=[], description="Regular expressions of a refusal, besides the English ones.")
    seed: int = 42

    @property
    def own_metric(self) -> str | None:
        """The name of the user's own metric: the function of `python`."""
        return self.python.partition(":")[2] if self.python else None

    def metric_names(self) -> list[str]:
        """Return the names of the metrics that these settings measure."""
        names = ["exact"]
        if self.json_fields:
            names += ["valid_json", "field_f1", *[f"field_{name}" for name in self.json_fields]]
        names += ["schema"] if self.json_schema else []
        names += ["rouge1", "rouge2", "rougeL"] if "rouge" in self.metrics else []
        names += [name for name in ("bleu", "chrf") if name in self.metrics]
        names += ["regex"] if self.regex else []
        names += ["label", "known_label"] if self.labels else []
        names += ["choice"] if self.choice else []
        names += [self.own_metric] if self.own_metric else []
        names += ["judge"] if self.judge else []
        return [*names, "loss", "token_accuracy"]

    @model_validator(mode="after")
    def _known_metric(self) -> "EvaluationSettings":
        if self.metric not in self.metric_names():
            raise ValueError(f"metric {self.metric!r} is not measured; with these settings there are {', '.join(self.metric_names())}")
        if self.choice and not self.labels:
            raise ValueError("choice needs labels")
        if self.own_metric is not None and not self.own_metric.isidentifier():
            raise ValueError("python is written module:function")
        return self


LOWER_IS_BETTER = frozenset({"loss"})


class GateSettings(Section):
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    metrics: dict[str, Literal["better"] | float] = Field(
        default={},
        description="What a PASS needs: `better`, or a margin by which the metric may be worse. Default: {evaluation.metric: better}.",
    )
    prompting: Literal["warn", "fail"] = Field(default="warn", description="What happens when a prompted base is as good.")
    min_stop_rate: float = Field(default=0.9, ge=0, le=1)
    max_refusal_rise: float = Field(default=0.05, ge=0, le=1, description="Share of answers, held-out and general prompts.")
    max_repetition_rise: float = Field(default=0.1, ge=0, le=1, description="Share of repeated 4-grams.")
    max_retention_loss: float = Field(default=0.2, ge=0, description="Nats a token the loss on general prompts may rise.")
    max_retention_drop: float = Field(default=0.1, ge=0, description="How far the task score on general prompts may fall.")
    dpo_margin: float = Field(default=0.0, ge=0, description="DPO is merged unless it is lower than SFT by more.")
    dpo_retention_margin: float = Field(
        default=0.02,
        ge=0,
        description="Nats a token that DPO may lose against SFT on general prompts without being better on held-out ones.",
    )
    min_heldout_rows: int = Field(default=20, ge=1)
    min_top1_agreement: float = Field(default=0.99, ge=0, le=1, description="Merged model against base + adapter.")
    override: str | None = Field(default=None, description="A written reason: merge without a PASS. It is recorded.")

    @model_validator(mode="after")
    def _margins_are_positive(self) -> "GateSettings":
        for name, goal in self.metrics.items():
            if goal != "better" and goal <= 0:
                raise ValueError(f"metrics.{name}: a margin is above 0; write `better` if it must be better")
        return self


class BaseModelSettings(Section):
    hub: str | None = Field(default=None, description="Hub id, e.g. Qwen/Qwen3-0.6B.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    folder: str | None = Field(default=None, description="A local folder with config.json and safetensors.")
    gguf: str | None = Field(default=None, description="A GGUF file, or package://<package>/<file in it>.")
    trust_remote_code: bool = False
    chat: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    sft: dict[str, Any] = {}
    dpo: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> "BaseModelSettings":
        given = [name for name in ("hub", "folder", "gguf") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of hub, folder, gguf; found {given or 'none'}")
        return self


class ScheduleSettings(Section):
    cron: str = Field(description='When to retrain, e.g. "0 3 * * 1".')
    timezone: str = "UTC"


class Recipe(Section):
    """What one base model resolves to: the defaults with its own overrides."""

    chat: ChatSettings = ChatSettings()
    lora: LoraSettings = LoraSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


class Project(Section):
    """finetune.yaml, whole."""

    store: str = ".ft/store"
    data: DataSettings
    base_models: dict[str, BaseModelSettings] = Field(min_length=1)
    chat: ChatSettings = ChatSettings()
    lora: LoraSettings = LoraSettings()
    sft: SftSettings = SftSettings()
    dpo: DpoSettings = DpoSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    schedule: ScheduleSettings | None = None
    launcher: Literal["local"] = "local"

    root: Path = Field(default=Path(), exclude=True)

    def path(self, relative: str) -> Path:
        """Return a path of finetune.yaml, relative to the folder it lies in."""
        return (self.root / relative).resolve() if not Path(relative).is_absolute() else Path(relative)

    @property
    def store_path(self) -> Path:
        return self.path(self.store)

    def base_model(self, name: str) -> BaseModelSettings:
        """Return the settings of one base model. Raises ConfigError naming the known ones."""
        if name not in self.base_models:
            raise ConfigError(
                f"base model {name!r}", "is not in finetune.yaml", f"one of {sorted(self.base_models)}", _near(name, self.base_models)
            )
        return self.base_models[name]

    def recipe(self, name: str) -> Recipe:
        """Return the settings of a base model: the project's defaults, overridden by its own section."""
        model = self.base_model(name)
        sections: dict[str, Any] = {}
        for section in ("chat", "lora", "sft", "dpo", "evaluation"):
            merged = {**getattr(self, section).model_dump(), **getattr(model, section)}
            sections[section] = merged
        return Recipe.model_validate(sections)


def settings_version(settings: Any) -> str:
    """Return the hash of settings (a model or plain data), independent of key order."""
    data = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def find_config(start: Path | None = None) -> Path:
    """Return the path of finetune.yaml: $FT_CONFIG, else upward from `start`. Raises ConfigError."""
    if given := os.environ.get("FT_CONFIG"):
        path = Path(given).resolve()
        if not path.is_file():
            raise ConfigError("FT_CONFIG", f"there is no file {path}", "the path of a finetune.yaml", "correct or unset FT_CONFIG")
        return path
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise ConfigError(str(start), f"no {CONFIG_NAME} here or above", "a project folder", "cd into the project, or set FT_CONFIG")


def load_project(path: Path | None = None) -> Project:
    """Read finetune.yaml. Raises ConfigError with the file, the key path and the fix."""
    path = path or find_config()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file", f"a {CONFIG_NAME}", "create it, or set FT_CONFIG") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}", f"is not YAML: {getattr(error, 'problem', error)}", "YAML", "correct the line") from None
    if not isinstance(raw, dict):
        raise ConfigError(str(path), f"holds a {type(raw).__name__}", "a mapping with data: and base_models:", "see the README")
    raw.pop("root", None)
    project = _validated(path, Project, {**raw, "root": path.parent.resolve()}, ())
    for name in project.base_models:
        if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise ConfigError(
                f"{path}: base_models.{name}", "has a character that a file name cannot hold", "letters, digits, . _ -", "rename it"
            )
        _check_overrides(path, project, name)
        _check_goals(path, project, name)
    return project


def _check_goals(path: Path, project: Project, name: str) -> None:
    known = project.recipe(name).evaluation.metric_names()
    for metric in project.gate.metrics:
        if metric not in known:
            raise ConfigError(
                f"{path}: gate.metrics.{metric}", f"is not measured for {name}", f"one of {', '.join(known)}", _near(metric, known)
            )


def _check_overrides(path: Path, project: Project, name: str) -> None:
    model = project.base_models[name]
    for section, kind in (
        ("chat", ChatSettings),
        ("lora", LoraSettings),
        ("sft", SftSettings),
        ("dpo", DpoSettings),
        ("evaluation", EvaluationSettings),
    ):
        merged = {**getattr(project, section).model_dump(), **getattr(model, section)}
        _validated(path, kind, merged, ("base_models", name, section))


def _validated(path: Path, kind: type[Section], data: dict[str, Any], prefix: tuple[str, ...]) -> Any:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _config_error(path, kind, error, prefix) from None


def _config_error(path: Path, kind: type[BaseModel], error: ValidationError, prefix: tuple[str, ...]) -> ConfigError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key_path = ".".join((*prefix, *location)) or "the file"
    more = len(error.errors()) - 1
    tail = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        return ConfigError(f"{path}: {key_path}", f"is not a known key{tail}", f"one of {', '.join(known)}", _near(location[-1], known))
    if first["type"] == "missing":
        return ConfigError(f"{path}: {key_path}", f"is missing{tail}", "a value", "add the key; the README shows an example")
    found = f"{first['input']!r}: " if not isinstance(first["input"], dict) else ""
    return ConfigError(f"{path}: {key_path}", f"{found}{first['msg']}{tail}", "", "correct the value")


def _keys_at(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys a section knows, following a key path through nested models and dicts of models."""
    current: Any = kind
    for part in location:
        fields = getattr(current, "model_fields", None)
        annotation = fields[part].annotation if fields and part in fields else current
        while getattr(annotation, "__args__", None):
            annotation = [arg for arg in annotation.__args__ if arg is not type(None)][-1]
        current = annotation
    return [name for name in getattr(current, "model_fields", {}) if name != "root"]


def _near(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it, or see the README"
