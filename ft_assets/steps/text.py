"""Step: continued pretraining of the adapter, or of all weights, on documents."""

import json
from pathlib import Path
from typing import ClassVar

from ft_assets.config import LoraSettings, TextSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import TokenizedRow
from ft_assets.step_runner import main, takes

MEASURED = ("validation_loss", "bits_per_byte", "general_loss")


class Settings(StepSettings):
    """`validation_bytes`: the bytes of UTF-8 of the validation documents."""

    STEP: ClassVar = Step("text", gpu=True, distributed=True)

    lora: LoraSettings
    text: TextSettings
    validation_bytes: int
    memory_limit_gb: float | None = None
    seeds: int = 1


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.models.adapter_files import of_seed, save_groups
    from ft_assets.training.sft import train_sft
    from ft_assets.training.text_loss import text_measure

    dataset, split = job.inputs["text_dataset"], job.inputs["heldout_split"]
    rows = read_table(dataset / "train.parquet", row=TokenizedRow)
    validation = read_table(dataset / "validation.parquet", row=TokenizedRow)
    general = read_table(split / "retention.parquet", row=TokenizedRow)
    found = []
    for number in range(settings.seeds):
        output, checkpoints = of_seed(job.output, number), of_seed(job.checkpoints, number)
        output.mkdir(parents=True, exist_ok=True)
        metrics = train_sft(
            snapshot=job.inputs["base_model"],
            rows=rows,
            validation=validation,
            lora=settings.lora,
            sft=settings.text.model_copy(update={"seed": settings.text.seed + number}),
            checkpoints=checkpoints,
            output=output,
            report=report,
            memory_limit_gb=settings.memory_limit_gb,
            measure=text_measure(settings.validation_bytes, general),
        )
        save_groups(rows, output)
        found.append({**metrics, **_before_and_after(output)})
    return StepResult(found[0])


def _before_and_after(output: Path) -> dict[str, float]:
    """Return what was measured before the first step, and of the weights that are kept."""
    curve = json.loads((output / "info" / "validation.json").read_text())
    if not curve:
        return {}
    kept = next(entry for entry in curve if entry.get("kept"))
    return {
        f"{name}_{when}": entry[name]
        for name in MEASURED
        for when, entry in (("before", curve[0]), ("after", kept))
        if name in entry
    }


if __name__ == "__main__":
    main(step)
