"""`review:` of finetune.yaml: people compare answers without knowing which model gave them."""

from pydantic import Field

from ft_assets.config.section import Section, Share


class ReviewSettings(Section):
    folder: str = Field(
        default="reviews",
        description="Folder of the judgements, one JSONL file for each reviewer. Commit it.",
    )
    prompts: int | None = Field(
        default=None,
        ge=1,
        description="How many held-out prompts are reviewed, drawn by chance. None: all.",
    )
    overlap: Share = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the prompts that every reviewer judges; each other prompt is judged "
        "by the reviewer who gets to it first.",
    )
    min_judge_agreement: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Krippendorff's alpha between `evaluation.judge` and people below which a "
        "verdict by the judge does not count.",
    )
    seed: int = Field(default=42, ge=0, lt=2**32)
