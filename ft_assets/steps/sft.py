"""Step: train the LoRA adapter by supervised fine-tuning, from a text adapter if there is one."""

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
    seeds: int = 1


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.models.adapter_files import of_seed, save_groups
    from ft_assets.training.sft import train_sft

    split = job.inputs["heldout_split"]
    rows = read_table(split / "train.parquet", row=TokenizedRow)
    validation = read_table(split / "validation.parquet", row=TokenizedRow)
    text_adapter = job.inputs.get("text_adapter")
    found = []
    for number in range(settings.seeds):
        output, checkpoints = of_seed(job.output, number), of_seed(job.checkpoints, number)
        output.mkdir(parents=True, exist_ok=True)
        before = of_seed(text_adapter, number) if text_adapter else None
        metrics = train_sft(
            snapshot=job.inputs["base_model"],
            rows=rows,
            validation=validation,
            lora=settings.lora,
            sft=settings.sft.model_copy(update={"seed": settings.sft.seed + number}),
            checkpoints=checkpoints,
            output=output,
            report=report,
            memory_limit_gb=settings.memory_limit_gb,
            before=before,
        )
        save_groups(rows, output, before)
        found.append(metrics)
    return StepResult(found[0])


if __name__ == "__main__":
    main(step)
