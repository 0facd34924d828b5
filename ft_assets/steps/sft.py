"""Step: train the LoRA adapter by supervised fine-tuning."""

from typing import ClassVar

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import TokenizedRow
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

    split = job.inputs["heldout_split"]
    rows = read_table(split / "train.parquet", row=TokenizedRow)
    metrics = train_sft(
        snapshot=job.inputs["base_model"],
        rows=rows,
        validation=read_table(split / "validation.parquet", row=TokenizedRow),
        lora=settings.lora,
        sft=settings.sft,
        checkpoints=job.checkpoints,
        output=job.output,
        report=report,
        memory_limit_gb=settings.memory_limit_gb,
    )
    save_groups(rows, job.output)
    return StepResult(metrics)


if __name__ == "__main__":
    main(step)
