"""`evaluation.rivals` of finetune.yaml: models behind an endpoint that answer the same rows."""

from typing import Self

from pydantic import Field, JsonValue, model_validator

from ft_assets.metrics.endpoint import Endpoint


class RivalSettings(Endpoint):
    """A model that the fine-tune is compared with: any OpenAI-compatible chat endpoint.

    The held-out prompts are sent to it.
    """

    prompt: str | None = Field(
        default=None, description="A system turn in place of the row's own. None: the row's turns."
    )
    must_beat: bool = Field(
        default=False, description="A PASS needs proof that the candidate is better than it."
    )
    reported_model: str | None = Field(
        default=None,
        description="The name that the endpoint reports for `model`, where it is another one.",
    )
    options: dict[str, JsonValue] = Field(
        default={},
        description="Further fields of the request, e.g. {temperature: 1}. null leaves one out.",
    )
    price_in: float | None = Field(default=None, ge=0, description="Of a million prompt tokens.")
    price_out: float | None = Field(default=None, ge=0, description="Of a million new tokens.")
    max_cost: float | None = Field(
        default=None, gt=0, description="Ask no more once the answers have cost this much."
    )
    max_minutes: float = Field(default=60, gt=0, description="Limit of the time for all rows.")
    parallel: int = Field(default=4, ge=1, le=64, description="Requests at the same time.")
    tries: int = Field(default=5, ge=1, le=20, description="Of a request that may pass, e.g. 429.")

    @model_validator(mode="after")
    def _limit_has_a_price(self) -> Self:
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            raise ValueError("max_cost needs price_in and price_out")
        return self
