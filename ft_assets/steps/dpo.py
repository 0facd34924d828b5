"""Step: train DPO on top of the SFT adapter.

Without preference data the SFT adapter is published unchanged.
"""

import shutil
from typing import ClassVar

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ArtifactError
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import PairRow
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    STEP: ClassVar = Step("dpo", gpu=True, distributed=True)

    lora: LoraSettings
    dpo: DpoSettings
    memory_limit_gb: float | None = None
    seeds: int = 1


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.models.adapter_files import of_seed, save_groups
    from ft_assets.training.dpo import train_dpo

    split = job.inputs["heldout_split"]
    if not (split / "preferences_validation.parquet").exists():
        raise ArtifactError(
            where="heldout_split",
            found="an older version made it, without validation pairs",
            expected="a preferences_validation table",
            fix="materialize heldout_split again",
        )
    pairs = read_table(split / "preferences.parquet", row=PairRow)
    validation = read_table(split / "preferences_validation.parquet", row=PairRow)
    if not pairs:
        return _publish_sft(job, settings.lora)
    used = pairs[: settings.dpo.max_pairs]
    found = []
    for number in range(settings.seeds):
        sft_adapter = of_seed(job.inputs["lora_adapter"], number)
        output, checkpoints = of_seed(job.output, number), of_seed(job.checkpoints, number)
        output.mkdir(parents=True, exist_ok=True)
        metrics = train_dpo(
            snapshot=job.inputs["base_model"],
            sft_adapter=sft_adapter,
            pairs=used,
            validation=validation,
            lora=settings.lora,
            dpo=settings.dpo.model_copy(update={"seed": settings.dpo.seed + number}),
            checkpoints=checkpoints,
            output=output,
            report=report,
            memory_limit_gb=settings.memory_limit_gb,
        )
        save_groups(used, output, before=sft_adapter)
        found.append(metrics)
    return StepResult({**found[0], "pairs_left_out": len(pairs) - len(used)})


def _publish_sft(job: Job, lora: LoraSettings) -> StepResult:
    """Publish the SFT adapter as the DPO adapter."""
    from ft_assets.models.adapter_files import copy_trained
    from ft_assets.training.method_choice import PLAN_FILE, resolve_method

    sft_adapter = job.inputs["lora_adapter"]
    copy_trained(sft_adapter, job.output)
    (job.output / "info").mkdir()
    shutil.copy2(sft_adapter / PLAN_FILE, job.output / PLAN_FILE)
    method = resolve_method(sft_adapter, lora).method
    return StepResult(
        {"pairs": 0, "note": "no preference data: this is the SFT adapter", "method": method}
    )


if __name__ == "__main__":
    main(step)
