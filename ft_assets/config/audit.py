"""`audit:` of finetune.yaml: which training rows are probably wrong."""

from pydantic import Field

from ft_assets.config.section import Section, Share


class AuditSettings(Section):
    folds: int = Field(
        default=4,
        ge=2,
        le=20,
        description="Trainings, each without the rows of one fold. They take about folds - 1 times "
        "num_train_epochs passes over the train rows.",
    )
    num_train_epochs: float = Field(
        default=1, gt=0, le=10_000, description="Passes of each training over its rows."
    )
    false_alarms: Share = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Most that a set without wrong rows may have any row named for its answer, as "
        "a probability.",
    )
    min_probability: Share = Field(
        default=0.5,
        ge=0,
        le=1,
        description="A row is named from this probability of a wrong answer on.",
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Of the folds and the trainings.")
