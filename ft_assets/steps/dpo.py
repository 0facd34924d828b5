"""Step: train DPO, or KTO, on top of the SFT adapter.

Without preference data the SFT adapter is published unchanged.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.data.tables import read_table
from ft_assets.errors import ArtifactError, ConfigError
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.rows.types import PairRow
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.training.pairs import TokenPair


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
    from ft_assets.training.label_trainer import labelled

    given, sampled = (_read(job, source) for source in ("heldout_split", "sampled_preferences"))
    pairs, validation = given.pairs + sampled.pairs, given.validation + sampled.validation
    if sampled.pairs:
        pairs.sort(key=lambda row: row["id"])  # so that max_pairs takes of both
    used, by_label = _used(pairs, settings.dpo)
    if not used:
        return _publish_sft(job, settings.lora)
    tokens = [_tokens(row) for row in used]
    watched = [_tokens(row) for row in validation if by_label or _is_pair(row)]
    found = []
    for number in range(settings.seeds):
        sft_adapter = of_seed(job.inputs["lora_adapter"], number)
        output, checkpoints = of_seed(job.output, number), of_seed(job.checkpoints, number)
        output.mkdir(parents=True, exist_ok=True)
        metrics = train_dpo(
            snapshot=job.inputs["base_model"],
            sft_adapter=sft_adapter,
            pairs=labelled(tokens, settings.dpo.seed + number) if by_label else tokens,
            validation=labelled(watched, settings.dpo.seed) if by_label else watched,
            lora=settings.lora,
            dpo=settings.dpo.model_copy(update={"seed": settings.dpo.seed + number}),
            checkpoints=checkpoints,
            output=output,
            report=report,
            memory_limit_gb=settings.memory_limit_gb,
        )
        save_groups(used, output, before=sft_adapter)
        found.append(metrics)
    counts = {"pairs_left_out": len(pairs) - len(used)}
    if sampled.pairs:
        own = {row["id"] for row in sampled.pairs}
        counts["pairs_sampled"] = sum(row["id"] in own for row in used)
    return StepResult({**found[0], **counts})


@dataclass(frozen=True)
class _Tables:
    pairs: list[PairRow]
    validation: list[PairRow]


def _read(job: Job, source: str) -> _Tables:
    """Return the pairs of an input; none if DPO does not train on it."""
    if (folder := job.inputs.get(source)) is None:
        return _Tables([], [])
    if not (folder / "preferences_validation.parquet").exists():
        raise ArtifactError(
            where=source,
            found="an older version made it, without validation pairs",
            expected="a preferences_validation table",
            fix=f"materialize {source} again",
        )
    return _Tables(
        read_table(folder / "preferences.parquet", row=PairRow),
        read_table(folder / "preferences_validation.parquet", row=PairRow),
    )


def _tokens(row: PairRow) -> TokenPair:
    return {
        "prompt_ids": row["prompt_ids"],
        "chosen_ids": row["chosen_ids"],
        "rejected_ids": row["rejected_ids"],
    }


def _is_pair(row: PairRow) -> bool:
    return bool(row["chosen_ids"] and row["rejected_ids"])


def _used(rows: list[PairRow], dpo: DpoSettings) -> tuple[list[PairRow], bool]:
    """Return the rows to train on, and whether they are trained by their labels (KTO).

    Raises ConfigError if the labels cannot be trained with these settings.
    """
    pairs = [row for row in rows if _is_pair(row)]
    if dpo.method == "dpo" or (dpo.method == "auto" and pairs) or not rows:
        return pairs[: dpo.max_pairs], False
    used = rows[: dpo.max_pairs]
    for answer, label in (("chosen_ids", "true"), ("rejected_ids", "false")):
        if not any(row[answer] for row in used):
            raise ConfigError(
                where="data.preferences",
                found=f"no answer with the label {label}",
                expected="labelled answers of both kinds: KTO weighs one against the other",
                fix="add such answers, or remove the files from data.preferences",
            )
    if dpo.sft_weight:
        raise ConfigError(
            where="dpo.sft_weight",
            found=f"{dpo.sft_weight:g}, a term of the loss of pairs",
            expected="no sft_weight: the rows are labelled answers without partners, for KTO",
            fix="remove dpo.sft_weight, or add pairs",
        )
    if dpo.loss_type != "sigmoid":
        raise ConfigError(
            where="dpo.loss_type",
            found=f"{dpo.loss_type}, a loss of pairs",
            expected="no loss_type: the rows are labelled answers without partners, for KTO",
            fix="remove dpo.loss_type, or add pairs",
        )
    return used, True


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
        {"pairs": 0, "note": "no preference pairs: this is the SFT adapter", "method": method}
    )


if __name__ == "__main__":
    main(step)
