"""`data:` of finetune.yaml: which files, which rows are held out, what may be left out."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from ft_assets.config.section import Section, Share


class StratifySettings(Section):
    """Which side a row is on depends on its own hash alone; a stratum can only have another share than the rest."""

    field: str = Field(description="A field of the train rows, e.g. category.")
    shares: dict[str, float] = Field(
        default={},
        description="Held-out share of some values: {rare: 0.5}; others: data.heldout_share.",
    )


ConversationFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
PreferenceFormat = Literal["preference", "sharegpt_preference", "ranked", "kto"]
Format = ConversationFormat | PreferenceFormat


class DataSettings(Section):
    train: list[str] = Field(
        description="Files or globs of conversations, relative to finetune.yaml."
    )
    rehearsal: list[str] = Field(
        default=[], description="General conversations trained beside the task; never held out."
    )
    preferences: list[str] = Field(
        default=[], description="Files of prompt/chosen/rejected triples; none: no DPO."
    )
    heldout: list[str] = Field(
        default=[], description="A fixed held-out file that looks like production traffic."
    )
    retention: list[str] = Field(
        default=[], description="General prompts the model must not get worse at."
    )
    few_shot: list[str] = Field(
        default=[], description="Examples for the prompted base, the rival of the fine-tune."
    )
    few_shot_system: str | None = Field(
        default=None, description="System prompt of the prompted base."
    )
    heldout_share: Share = Field(
        default=0.1, gt=0, lt=0.9, description="Held-out share when no file is given."
    )
    validation_share: Share = Field(
        default=0.05,
        ge=0,
        lt=0.9,
        description="Share of the train rows (and of the pairs, where it makes 8 or more) that is watched each epoch and never trained on: it shows overfitting.",
    )
    split_salt: str = Field(
        default="", description="Changes which rows are held out; change it only deliberately."
    )
    columns: dict[
        Literal["train", "rehearsal", "preferences", "heldout", "retention", "few_shot"],
        dict[str, str],
    ] = Field(
        default={},
        description="Names of columns that are not recognised: {train: {prompt: text, completion: category}}.",
    )
    format: dict[
        Literal["train", "rehearsal", "preferences", "heldout", "retention", "few_shot"], Format
    ] = Field(
        default={},
        description="What rows are where their keys do not say it: {train: alpaca, rehearsal: text}; default: by each row's keys.",
    )
    encoding: str | None = Field(
        default=None, description="Of text files that are not UTF-8, e.g. latin-1."
    )
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
    contamination: list[str] = Field(
        default=[], description="Evaluation files of yours: what is trained must not stand in them."
    )
    stratify: StratifySettings | None = Field(
        default=None, description="A field whose values are held out by their own shares."
    )
    max_invalid: Share = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of unusable rows of a source above which it stops, e.g. 1%.",
    )

    @model_validator(mode="after")
    def _formats_fit(self) -> "DataSettings":
        for key, name in self.format.items():
            known = get_args(PreferenceFormat if key == "preferences" else ConversationFormat)
            if name not in known:
                raise ValueError(f"format.{key}: {name} is not one of {', '.join(known)}")
            if name == "text" and key not in ("train", "rehearsal"):
                raise ValueError(
                    f"format.{key}: a text has no answer to compare; text is for train and rehearsal"
                )
        return self
