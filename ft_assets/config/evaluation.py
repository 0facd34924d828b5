"""`evaluation:` and `gate:` of finetune.yaml: what is measured, and what a PASS needs."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from ft_assets.config.rivals import RetrievalRival, RivalSettings
from ft_assets.config.section import Section
from ft_assets.errors import nearest
from ft_assets.metrics import Metric, Option, registered
from ft_assets.metrics.equality import composed
from ft_assets.metrics.judge import JudgeSettings
from ft_assets.metrics.label import normal_label
from ft_assets.metrics.program import ProgramSettings
from ft_assets.metrics.user_function import UserMetric
from ft_assets.metrics.values import Kind, Values


def _require_one_of(name: str, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"not one of {', '.join(known)}; {nearest(name, known)}")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


RivalName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,40}$")]
# The trained candidates of a verdict, and the asset that has each one's weights.
ADAPTERS = {"sft": "lora_adapter", "dpo": "dpo_adapter", "rl": "rl_adapter"}
CANDIDATES = {"base", "few_shot", *ADAPTERS}


def _python_form(value: Any) -> str:
    return "text" if isinstance(value, str) else "mapping"


Python = Annotated[
    Annotated[str, Tag("text")] | Annotated[UserMetric, Tag("mapping")],
    Discriminator(_python_form),
]


def scores_alone(metric: Metric) -> bool:
    """Return True if a metric scores a generated answer without a model or a person."""
    return metric.of_answer or metric.config in ("python", "program")


class EvaluationSettings(Section):
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="None: 32 on a CPU, by free memory on a GPU; halved when it runs out.",
    )
    metric: str = Field(default="exact", description="The metric the verdict is about.")
    json_fields: list[str] = Field(
        default=[], description="Keys of the JSON object that an answer must be."
    )
    normalise: dict[str, Kind] = Field(
        default={},
        description="Fields whose values are compared as a `number` or a `date`, e.g. {due: date}; "
        "of an inner object: {customer.since: date}.",
    )
    decimal: Literal[".", ","] = Field(
        default=".", description="The decimal separator of numbers in texts."
    )
    day_first: bool | None = Field(
        default=None, description="Whether 03/04/2026 is in April. None: such a date is refused."
    )
    json_schema: str | None = Field(
        default=None, description="File with a JSON schema the answer must meet: metric `schema`."
    )
    metrics: list[str] = Field(default=[], description="Further metrics: rouge, bleu, chrf, …")
    regex: Pattern | None = Field(
        default=None, description="The whole answer must match it: metric `regex`."
    )
    labels: list[str] = Field(
        default=[], description="The answer is one of these: metrics `label`, `known_label`."
    )
    choice: bool | Literal["labels", "options"] = Field(
        default=False,
        description="Also pick the most likely answer by log-probability: metric `choice`. True or "
        "`labels`: of `labels`; `options`: of the row's own field `options`.",
    )
    choice_per_token: bool = Field(
        default=False,
        description="Divide each log-probability by the number of tokens, so that long options are "
        "not less likely for their length.",
    )
    tool_calls: Literal["ordered", "unordered"] | None = Field(
        default=None,
        description="The answer calls tools, in this order or in any: metrics `tool_calls`, "
        "`tool_names`, `tool_call_f1`.",
    )
    python: Python | None = Field(
        default=None,
        description="Own metric, module:function(answer, reference, messages) -> number; or "
        "{function: module:function, higher_is_better: false}.",
    )
    program: ProgramSettings | None = Field(
        default=None,
        description="Own program, {command: [...], seconds: 5, memory_mb: 512}: it passes an "
        "answer by exit code 0. Metric `program`.",
    )
    judge: JudgeSettings | None = Field(
        default=None, description="An LLM judge: metric `judge`. Off by default."
    )
    retention_rows: int | None = Field(
        default=None, ge=1, description="Take only the first n retention rows by id."
    )
    retention_answers: int = Field(
        default=64, ge=2, description="Of these, how many are answered too; the loss is of all."
    )
    retention_metric: str = Field(
        default="chrf", description="Task score of general prompts: chrf, rougeL, exact, …"
    )
    lm_eval: list[str] = Field(
        default=[],
        description="Tasks of lm-evaluation-harness, as general prompts "
        "(needs ft_assets[lm-eval]).",
    )
    lm_eval_limit: int = Field(default=100, ge=2, description="Documents a task.")
    lm_eval_path: str | None = Field(
        default=None, description="A folder with task files of your own."
    )
    train_rows: int = Field(
        default=64,
        ge=1,
        description="Train rows whose loss is compared with the held-out loss. Of a task of few "
        "answers they are answered too.",
    )
    refusals: list[Pattern] = Field(
        default=[], description="Regular expressions of a refusal, besides the English ones."
    )
    rivals: dict[RivalName, RivalSettings] = Field(
        default={},
        description="What answers the same held-out rows, by name: a model behind an endpoint, "
        "another base model, or a model that retrieves documents.",
    )
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_serializer(mode="wrap")
    def _without_absent_rivals(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave absent rivals out, so that they do not change the version of the settings."""
        fields = dump(self)
        return fields if self.rivals else {key: fields[key] for key in fields if key != "rivals"}

    def asked(self) -> dict[str, Any]:
        """Return the settings that decide what a model is asked; all others decide its scores.

        Not `batch_size`: it decides the rounding alone.
        """
        keys = {"max_new_tokens", "retention_rows", "retention_answers", "train_rows"}
        keys |= {"choice", "labels"} if self.choice or self.labels else set()
        keys |= {"lm_eval", "lm_eval_limit"} if self.lm_eval else set()
        return self.model_dump(mode="json", include=keys)

    @property
    def user_metric(self) -> UserMetric | None:
        """The user's own metric."""
        return UserMetric(function=self.python) if isinstance(self.python, str) else self.python

    def measured(self) -> list[Metric]:
        """Return the metrics that these settings measure, in the order of their columns.

        Metrics of the answer come first, and those that are always measured. The others follow the
        order of the keys of `evaluation:` and of the entries of `metrics`.
        """
        found = [one for known in registered() for one in self._switched_on(known)]
        if self.user_metric is not None:
            found.append(self.user_metric.descriptor())
        keys = list(type(self).model_fields)

        def order(metric: Metric) -> tuple[bool, int, int]:
            entry = metric.listed_as()
            place = self.metrics.index(entry) if entry else 0
            key = -1 if metric.always else keys.index(metric.config or "metrics")
            return not metric.of_answer, key, place

        return sorted(found, key=order)

    def _switched_on(self, metric: Metric) -> list[Metric]:
        if metric.each:
            return [metric.for_item(item) for item in self.option(metric)]
        entry = metric.listed_as()
        on = metric.always or (entry in self.metrics if entry else bool(self.option(metric)))
        return [metric] if on else []

    def main_metric(self) -> Metric:
        """Return the metric that the verdict is about."""
        return next(one for one in self.measured() if one.name == self.metric)

    def scores_alone(self) -> bool:
        """Return True if the metric scores an answer without the base's answers and the model."""
        return scores_alone(self.main_metric())

    @property
    def values(self) -> Values:
        """When two values of an answer are equal."""
        kinds: dict[str, Kind] = {composed(key): kind for key, kind in self.normalise.items()}
        return Values(kinds, self.decimal, self.day_first)

    def rewards(self, weights: Mapping[str, float]) -> dict[Metric, float]:
        """Return the metrics of rl.rewards with their weights, by default the verdict's with 1."""
        known = {metric.name: metric for metric in self.measured()}
        return {known[name]: weight for name, weight in (weights or {self.metric: 1.0}).items()}

    def option(self, metric: Metric) -> Option:
        """Return the value that the metric's function gets; None if it has no key."""
        return getattr(self, metric.config) if metric.config else None

    def metric_names(self) -> list[str]:
        """Return the names of the metrics that these settings measure."""
        return [metric.name for metric in self.measured()]

    def lower_is_better(self) -> list[str]:
        """Return the names of the measured metrics that are better when they are lower."""
        return [metric.name for metric in self.measured() if not metric.higher_is_better]

    def _require_answerers(self) -> None:
        others = [one for one, its in self.rivals.items() if not isinstance(its, RetrievalRival)]
        for name, rival in self.rivals.items():
            answerer = rival.answerer if isinstance(rival, RetrievalRival) else None
            if answerer is not None and answerer not in others:
                fix = nearest(answerer, others, "leave it out for the base model itself")
                raise ValueError(
                    f"rivals.{name}.answerer: {answerer!r} is not a rival that answers; {fix}"
                )

    @field_validator("metrics")
    @classmethod
    def _known_entries(cls, entries: list[str]) -> list[str]:
        known = dict.fromkeys(filter(None, (metric.listed_as() for metric in registered())))
        for entry in entries:
            _require_one_of(entry, list(known))
        return entries

    @field_validator("refusals")
    @classmethod
    def _compile_as_one(cls, patterns: list[str]) -> list[str]:
        _compiles("|".join(("", *patterns)))  # as behaviour.py joins them
        return patterns

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        known: dict[str, str] = {}
        for label in labels:
            normal = normal_label(label)
            if not normal:
                raise ValueError(f"{label!r} is only blanks, quotes, and full stops")
            if normal in known:
                raise ValueError(
                    f"{known[normal]!r} and {label!r} are one label: case, blanks, quotes and a "
                    "final full stop do not count"
                )
            known[normal] = label
        return labels

    @field_validator("json_fields")
    @classmethod
    def _fields_differ(cls, fields: list[str]) -> list[str]:
        names = [composed(name) for name in fields]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is there twice")
        return fields

    @field_validator("retention_metric")
    @classmethod
    def _scores_texts(cls, name: str) -> str:
        known = [one for one in registered() if one.of_answer and one.needs_reference]
        texts = [one for one in known if one.any_reference]
        _require_one_of(name, [one.name for one in texts if one.listed_as() or one.always])
        return name

    @model_validator(mode="after")
    def _known_metric(self) -> "EvaluationSettings":
        names = self.metric_names()
        if self.metric not in names:
            raise ValueError(
                f"metric {self.metric!r} is not measured; "
                f"with these settings there are {', '.join(names)}"
            )
        if taken := sorted(CANDIDATES & self.rivals.keys()):
            raise ValueError(f"rivals.{taken[0]}: is the name of a candidate; take another")
        self._require_answerers()
        gate = self.main_metric()
        if self.rivals and not (gate.of_answer or gate.config == "python"):
            raise ValueError(
                f"rivals are compared by their answers, and metric {self.metric!r} needs more than "
                "an answer; take a metric of the answer, or leave out rivals"
            )
        if self.choice in (True, "labels") and not self.labels:
            raise ValueError("choice needs labels, or write `choice: options`")
        others = self.tool_calls or "json_f1" in self.metrics
        if self.normalise and not (self.json_fields or others):
            raise ValueError("normalise needs json_fields, tool_calls, or json_f1 in metrics")
        for path in () if others else self.normalise:
            if path.partition(".")[0] not in self.json_fields and path not in self.json_fields:
                raise ValueError(f"normalise.{path}: {nearest(path, self.json_fields)}")
        if self.user_metric is not None and not self.user_metric.name.isidentifier():
            raise ValueError("python is written module:function")
        return self


class GateSettings(Section):
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    metrics: dict[str, Literal["better"] | float] = Field(
        default={},
        description="What a PASS needs: `better`, or a margin by which the metric may be worse. "
        "Default: {evaluation.metric: better}.",
    )
    better: Literal["all", "any"] = Field(
        default="all",
        description="Of several metrics that must be `better`: all of them, or any one.",
    )
    prompting: str | list[str] = Field(
        default="warn",
        description="What happens when a prompted base is as good: `warn` or `fail`; or the names "
        "of what a PASS must be better than: few_shot and rivals, e.g. [few_shot, rag].",
    )
    form: Literal["fail", "warn"] = Field(
        default="fail",
        description="What happens when rivals with the form of an answer alone are as good, e.g. "
        "the most frequent answer.",
    )
    min_stop_rate: float = Field(default=0.9, ge=0, le=1)
    max_refusal_rise: float = Field(
        default=0.05, ge=0, le=1, description="Share of answers, held-out and general prompts."
    )
    max_repetition_rise: float = Field(
        default=0.1, ge=0, le=1, description="Share of repeated 4-grams."
    )
    max_retention_loss: float = Field(
        default=0.2, ge=0, description="Nats a token the loss on general prompts may rise."
    )
    max_retention_drop: float = Field(
        default=0.1, ge=0, description="How far the task score on general prompts may fall."
    )
    dpo_margin: float = Field(
        default=0.0, ge=0, description="DPO is merged unless it is lower than SFT by more."
    )
    dpo_retention_margin: float = Field(
        default=0.02,
        ge=0,
        description="Nats per token that DPO may lose against SFT on general prompts without being "
        "better on held-out ones.",
    )
    min_heldout_rows: int = Field(
        default=20, ge=1, description="Groups of held-out rows; a row without a group is one."
    )
    min_graded_rows: int = Field(
        default=36,
        ge=1,
        description="The same for a metric with scores between 0 and 1, e.g. chrf.",
    )
    min_retention_rows: int = Field(
        default=36, ge=1, description="Groups of general prompts, for the loss and the task score."
    )
    seeds: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Trainings with consecutive seeds; the gain must hold over all of them. The "
        "first is merged.",
    )
    min_top1_agreement: float = Field(
        default=0.99, ge=0, le=1, description="Merged model against base + adapter; a tie agrees."
    )
    override: str | None = Field(
        default=None, description="A written reason: merge without a PASS. It is recorded."
    )

    @field_validator("metrics", mode="before")
    @classmethod
    def _margins_are_numbers(cls, goals: Any) -> Any:
        for name, goal in goals.items() if isinstance(goals, dict) else ():
            number = isinstance(goal, int | float) and not isinstance(goal, bool)
            if goal != "better" and not (number and math.isfinite(goal) and goal > 0):
                raise ValueError(
                    f"{name}: {goal!r} is not a margin, a finite number above 0; write `better` if "
                    "it must be better"
                )
        return goals

    @property
    def must_beat(self) -> frozenset[str]:
        """What `prompting` asks a PASS to be better than: `few_shot` and names of rivals."""
        if isinstance(self.prompting, list):
            return frozenset(self.prompting)
        known: dict[str, frozenset[str]] = {"warn": frozenset(), "fail": frozenset({"few_shot"})}
        return known.get(self.prompting, frozenset({self.prompting}))

    @field_validator("override")
    @classmethod
    def _reason_is_written(cls, reason: str | None) -> str | None:
        if reason is not None and not reason.strip():
            raise ValueError("a blank text is not a reason; write one, or remove the key")
        return reason
