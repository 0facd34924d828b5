"""`evaluation.rivals` of finetune.yaml: what the fine-tune is compared with, on the same rows."""

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from ft_assets.metrics.endpoint import Endpoint

DOCUMENTS, QUESTION = "{documents}", "{question}"
TEMPLATE = f"Use these documents where they help.\n\n{DOCUMENTS}\n\n{QUESTION}"


class Rival(BaseModel):
    """What all rivals have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str | None = Field(
        default=None, description="A system turn in place of the row's own. None: the row's turns."
    )
    must_beat: bool = Field(
        default=False, description="A PASS needs proof that the candidate is better than it."
    )


class EndpointRival(Rival, Endpoint):
    """A model behind any OpenAI-compatible chat endpoint. The held-out prompts are sent to it."""

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


class BaseRival(Rival):
    """Another base model of finetune.yaml, as it is."""

    base_model: str = Field(description="Its name in base_models.")


class RetrievalRival(Rival):
    """A model that is given the chunks of documents that fit a question best (BM25)."""

    documents: list[str] = Field(
        min_length=1, description="Files, folders, or globs: .txt, .md, or tables with a `text`."
    )
    answerer: str | None = Field(
        default=None, description="The rival that answers. None: the base model itself."
    )
    top_k: int = Field(default=3, ge=1, le=50, description="Chunks before a question, at most.")
    chunk_words: int = Field(default=150, ge=10, le=4000, description="Words of a chunk, at most.")
    template: str = Field(
        default=TEMPLATE, description="The last user turn, with {documents} and {question}."
    )

    @field_validator("template")
    @classmethod
    def _has_both(cls, text: str) -> str:
        for part in (DOCUMENTS, QUESTION):
            if text.count(part) != 1:
                raise ValueError(f"has {part} {text.count(part)} times; write it once")
        return text


def _kind(value: Any) -> str:
    keys = value if isinstance(value, dict) else dict(value) if isinstance(value, Rival) else {}
    return "retrieval" if "documents" in keys else "base" if "base_model" in keys else "endpoint"


RivalSettings = Annotated[
    Annotated[EndpointRival, Tag("endpoint")]
    | Annotated[BaseRival, Tag("base")]
    | Annotated[RetrievalRival, Tag("retrieval")],
    Discriminator(_kind),
]


# By pydantic's name of the kind in the place of an error.
KINDS: dict[str, type[Rival]] = {
    "endpoint": EndpointRival,
    "base": BaseRival,
    "retrieval": RetrievalRival,
}


def answerer_of(
    rivals: dict[str, RivalSettings], name: str, own: str
) -> tuple[str, EndpointRival | BaseRival]:
    """Return the rival that gives the answers of `name`, and its name; the base `own` by default.

    It is the rival itself unless the rival retrieves.
    """
    rival = rivals[name]
    if not isinstance(rival, RetrievalRival):
        return name, rival
    if rival.answerer is None:
        return own, BaseRival(base_model=own)
    found = rivals[rival.answerer]
    assert not isinstance(found, RetrievalRival), "refused when the settings are read"
    return rival.answerer, found
