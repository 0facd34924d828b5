"""Step: train the LoRA adapter by supervised fine-tuning."""

from typing import ClassVar

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    STEP: ClassVar = Step("sft", gpu=True, distributed=True)

    lora: LoraSettings
    sft: SftSettings
    memory_limit_gb: float | None = None


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.models.adapter_files import save_groups
    from ft_assets.training.sft import train_sft

    rows = read_table(job.inputs["heldout_split"] / "train.parquet")
    validation = read_table(job.inputs["heldout_split"] / "validation.parquet")
    metrics = train_sft(
        job.inputs["base_model"],
        rows,
        validation,
        settings.lora,
        settings.sft,
        job.checkpoints,
        job.output,
        report,
        settings.memory_limit_gb,
    )
    save_groups(rows, job.output)
    return StepResult(metrics)


if __name__ == "__main__":
    main(step)
