"""`evaluation:` and `gate:` of finetune.yaml: what is measured, and what a PASS needs."""

from typing import Literal

from pydantic import Field, model_validator

from ft_assets.config.section import Section


class JudgeSettings(Section):
    """A judge: any OpenAI-compatible chat endpoint. It compares a candidate's answer with the base's, in both orders."""

    base_url: str = Field(description="e.g. https://api.openai.com/v1, or http://127.0.0.1:8000/v1")
    model: str
    api_key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds the key."
    )
    criteria: str = Field(
        default="Which answer serves the user better?", description="What the judge is asked."
    )
    timeout: float = Field(default=60, gt=0, description="Seconds a request.")


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
    json_schema: str | None = Field(
        default=None, description="File with a JSON schema the answer must meet: metric `schema`."
    )
    metrics: list[Literal["rouge", "bleu", "chrf"]] = Field(
        default=[], description="Text metrics measured besides."
    )
    regex: str | None = Field(
        default=None, description="The whole answer must match it: metric `regex`."
    )
    labels: list[str] = Field(
        default=[], description="The answer is one of these: metrics `label`, `known_label`."
    )
    choice: bool = Field(
        default=False,
        description="Also pick the most likely of `labels` by log-probability: metric `choice`.",
    )
    python: str | None = Field(
        default=None,
        description="Own metric, module:function(answer, reference, messages) -> number.",
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
    retention_metric: Literal["chrf", "rougeL", "exact"] = Field(
        default="chrf", description="Task score of general prompts."
    )
    lm_eval: list[str] = Field(
        default=[],
        description="Tasks of lm-evaluation-harness, as general prompts (needs ft_assets[lm-eval]).",
    )
    lm_eval_limit: int = Field(default=100, ge=2, description="Documents a task.")
    lm_eval_path: str | None = Field(
        default=None, description="A folder with task files of your own."
    )
    train_rows: int = Field(
        default=32, ge=1, description="Train rows whose loss is compared with the held-out loss."
    )
    refusals: list[str] = Field(
        default=[], description="Regular expressions of a refusal, besides the English ones."
    )
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
            raise ValueError(
                f"metric {self.metric!r} is not measured; with these settings there are {', '.join(self.metric_names())}"
            )
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
    prompting: Literal["warn", "fail"] = Field(
        default="warn", description="What happens when a prompted base is as good."
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
        description="Nats a token that DPO may lose against SFT on general prompts without being better on held-out ones.",
    )
    min_heldout_rows: int = Field(default=20, ge=1)
    min_top1_agreement: float = Field(
        default=0.99, ge=0, le=1, description="Merged model against base + adapter; a tie agrees."
    )
    override: str | None = Field(
        default=None, description="A written reason: merge without a PASS. It is recorded."
    )

    @model_validator(mode="after")
    def _margins_are_positive(self) -> "GateSettings":
        for name, goal in self.metrics.items():
            if goal != "better" and goal <= 0:
                raise ValueError(
                    f"metrics.{name}: a margin is above 0; write `better` if it must be better"
                )
        return self
