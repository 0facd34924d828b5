"""Step: train the LoRA adapter by supervised fine-tuning."""

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.adapter_files import save_groups
from ft_assets.step_runner import main
from ft_assets.training.sft import train_sft


def step(job: Job, report: Report) -> StepResult:
    rows = read_table(job.inputs["heldout_split"] / "train.parquet")
    validation = read_table(job.inputs["heldout_split"] / "validation.parquet")
    lora, sft = (
        LoraSettings.model_validate(job.settings["lora"]),
        SftSettings.model_validate(job.settings["sft"]),
    )
    limit = job.settings.get("memory_limit_gb")
    metrics = train_sft(
        job.inputs["base_model"],
        rows,
        validation,
        lora,
        sft,
        job.checkpoints,
        job.output,
        report,
        limit,
    )
    save_groups(rows, job.output)
    return StepResult(metrics)


if __name__ == "__main__":
    main(step)
