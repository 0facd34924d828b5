"""Step: train DPO on top of the SFT adapter.

Without preference data the SFT adapter is published unchanged.
"""

import shutil
from typing import ClassVar

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ArtifactError
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.step_runner import main, takes


class Settings(StepSettings):
    STEP: ClassVar = Step("dpo", gpu=True, distributed=True)

    lora: LoraSettings
    dpo: DpoSettings
    memory_limit_gb: float | None = None


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.models.adapter_files import copy_trained, save_groups
    from ft_assets.training.dpo import train_dpo
    from ft_assets.training.method_choice import CHOICE, chosen_method

    if not (job.inputs["heldout_split"] / "preferences_validation.parquet").exists():
        raise ArtifactError(
            where="heldout_split",
            found="an older version made it, without pairs to watch",
            expected="preferences_validation",
            fix="materialize heldout_split again",
        )
    pairs, validation = (
        read_table(job.inputs["heldout_split"] / f"{part}.parquet")
        for part in ("preferences", "preferences_validation")
    )
    lora, dpo = settings.lora, settings.dpo
    sft_adapter = job.inputs["lora_adapter"]
    if not pairs:
        copy_trained(sft_adapter, job.output)
        (job.output / "info").mkdir()
        shutil.copy2(sft_adapter / CHOICE, job.output / CHOICE)
        method = chosen_method(sft_adapter, lora).method
        return StepResult(
            {"pairs": 0, "note": "no preference data: this is the SFT adapter", "method": method}
        )
    used = pairs[: dpo.max_pairs]
    metrics = train_dpo(
        job.inputs["base_model"],
        sft_adapter,
        used,
        lora,
        dpo,
        job.checkpoints,
        job.output,
        report,
        settings.memory_limit_gb,
        validation,
    )
    save_groups(used, job.output, before=sft_adapter)
    return StepResult({**metrics, "pairs_left_out": len(pairs) - len(used)})


if __name__ == "__main__":
    main(step)
