"""Step: train DPO on top of the SFT adapter; without preference data the SFT adapter is passed on as it is."""

import shutil

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.tables import read_table
from ft_assets.job import Job, Report, StepResult
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    pairs = read_table(job.inputs["heldout_split"] / "preferences.parquet")
    lora, dpo = LoraSettings.model_validate(job.settings["lora"]), DpoSettings.model_validate(job.settings["dpo"])
    sft_adapter = job.inputs["lora_adapter"]
    if not pairs:
        for name in ("adapter_config.json", "adapter_model.safetensors", "trained_groups.json"):
            shutil.copy2(sft_adapter / name, job.output / name)
        return StepResult({"pairs": 0, "note": "no preference data: this is the SFT adapter"})
    from ft_assets.training.adapter import save_groups
    from ft_assets.training.dpo import train_dpo

    used = pairs[: dpo.max_pairs]
    metrics = train_dpo(job.inputs["base_model"], sft_adapter, used, lora, dpo, job.checkpoints, job.output, report)
    save_groups(used, job.output, before=sft_adapter)
    return StepResult({**metrics, "pairs_left_out": len(pairs) - len(used)})


if __name__ == "__main__":
    main(step)
