"""`advise:` of finetune.yaml: what a fine-tune is compared with before it is paid for."""

from pydantic import Field

from ft_assets.config.section import Section


class AdviseSettings(Section):
    rows: int = Field(default=32, ge=8, le=1000, description="Train rows that are asked.")
    bar: float | None = Field(
        default=None,
        description="Score of evaluation.metric from which no fine-tune is needed. None: 0.9 of a "
        "metric between 0 and 1 of which more is better, otherwise none.",
    )
