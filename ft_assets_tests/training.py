"""Make tokenized rows and pairs for a tiny model, and train SFT and DPO on them without a graph."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft_assets.config import DpoSettings, LoraSettings, RlSettings, SftSettings, TextSettings

LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
SFT = {
    "num_train_epochs": 3,
    "learning_rate": 5e-3,
    "effective_batch": 4,
    "micro_batch": 2,
    "save_steps": 2,
}
DPO = {
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "effective_batch": 4,
    "micro_batch": 2,
    "save_steps": 2,
}
RL = {
    "num_train_epochs": 2,
    "learning_rate": 5e-3,
    "n": 4,
    "effective_batch": 8,
    "micro_batch": 4,
    "save_steps": 2,
}
EOS = 2  # <|im_end|> of the tiny tokenizer


def ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(4, 250) for _ in range(count)]


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of several lengths, each in its own group.

    The answers share a pattern that a model can learn.
    """
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = ids(chance, chance.randrange(4, 16))
        answer = [*[7, 8, 9][: chance.randrange(1, 4)], EOS]
        rows.append(
            {
                "id": f"{seed}-{number}",
                "group": f"{seed}-{number}",
                "input_ids": prompt + answer,
                "supervised": [False] * len(prompt) + [True] * len(answer),
            }
        )
    return rows


def make_pairs(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return preference pairs: short answers are chosen, long answers are rejected."""
    chance = random.Random(seed)
    return [
        {
            "id": f"p{number}",
            "group": f"p{number}",
            "prompt_ids": ids(chance, chance.randrange(6, 24)),
            "chosen_ids": [*ids(chance, chance.randrange(1, 4)), EOS],
            "rejected_ids": [*ids(chance, chance.randrange(3, 9)), EOS],
        }
        for number in range(count)
    ]


def silent(*_: Any, **__: Any) -> None:
    pass


def sft_into(
    work: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train SFT and return the metrics.

    The keys of `work` are base, lora, settings and rows. The last three are optional.
    """
    from ft_assets.models.adapter_files import save_groups
    from ft_assets.training.sft import train_sft

    rows = make_rows(work.get("rows", 18))
    lora = LoraSettings.model_validate({**LORA, **work.get("lora", {})})
    settings = SftSettings.model_validate({**SFT, **work.get("settings", {})})
    metrics = train_sft(
        snapshot=Path(work["base"]),
        rows=rows,
        validation=make_rows(4, seed=9),
        lora=lora,
        sft=settings,
        checkpoints=checkpoints,
        output=output,
        report=report,
    )
    save_groups(rows, output)
    return metrics


def text_into(
    work: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train on documents and return the metrics.

    The keys of `work` are base, lora and settings. The last two are optional.
    """
    from ft_assets.training.sft import train_sft
    from ft_assets.training.text_loss import text_measure

    return train_sft(
        snapshot=Path(work["base"]),
        rows=make_rows(8, seed=3),  # type: ignore[arg-type]
        validation=make_rows(4, seed=9),  # type: ignore[arg-type]
        lora=LoraSettings.model_validate({**LORA, **work.get("lora", {})}),
        sft=TextSettings.model_validate({**SFT, **work.get("settings", {})}),
        checkpoints=checkpoints,
        output=output,
        report=report,
        measure=text_measure(100, make_rows(2, seed=5)),  # type: ignore[arg-type]
    )


def dpo_into(
    work: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train DPO and return the metrics.

    The keys of `work` are base, adapter, lora, settings, rows, validation and labels. The last
    five are optional. `rows` and `validation` are numbers of pairs; with `labels` their answers are
    trained by KTO.
    """
    from ft_assets.training.dpo import train_dpo

    lora = LoraSettings.model_validate({**LORA, **work.get("lora", {})})
    settings = DpoSettings.model_validate({**DPO, **work.get("settings", {})})
    pairs: Any = make_pairs(work.get("rows", 10))
    validation: Any = make_pairs(work.get("validation", 0), seed=5)
    if work.get("labels"):
        from ft_assets.training.label_trainer import labelled

        pairs, validation = labelled(pairs, settings.seed), labelled(validation, settings.seed)
    return train_dpo(
        snapshot=Path(work["base"]),
        sft_adapter=Path(work["adapter"]),
        pairs=pairs,
        validation=validation,
        lora=lora,
        dpo=settings,
        checkpoints=checkpoints,
        output=output,
        report=report,
    )


def rl_into(
    work: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train RL for short answers, of at most 6 tokens, and return the metrics.

    The keys of `work` are base, adapter, lora, settings and rows. The last three are optional.
    """
    from ft_assets.training.rl import train_rl
    from ft_assets.training.rl_trainer import Given, Prompt, Reward

    def short(answers: Sequence[Given]) -> list[float]:
        return [-float(len(answer.text)) for answer in answers]

    def prompts(count: int, seed: int = 0) -> list[Prompt]:
        split = [(row, row["supervised"].index(True)) for row in make_rows(count, seed)]
        return [
            Prompt(row["id"], row["input_ids"][:begin], row["input_ids"][begin:])
            for row, begin in split
        ]

    return train_rl(
        snapshot=Path(work["base"]),
        sft_adapter=Path(work["adapter"]),
        prompts=prompts(work.get("rows", 7)),
        validation=prompts(3, seed=9),
        rewards=[Reward("short", 1.0, short)],
        lora=LoraSettings.model_validate({**LORA, **work.get("lora", {})}),
        rl=RlSettings.model_validate({**RL, **work.get("settings", {})}),
        max_new_tokens=6,
        checkpoints=checkpoints,
        output=output,
        report=report,
    )


def sft(
    base: Path,
    folder: Path,
    report: Any = silent,
    lora: Any = None,
    rows: int = 18,
    **settings: Any,
) -> dict[str, Any]:
    """Train SFT in `folder` (`checkpoints/`, `output/`) and return the metrics."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    work = {"base": base, "lora": lora or {}, "settings": settings, "rows": rows}
    return sft_into(work, folder / "checkpoints", folder / "output", report)


def dpo(
    base: Path,
    adapter: Path,
    folder: Path,
    report: Any = silent,
    lora: Any = None,
    rows: int = 10,
    validation: int = 0,
    labels: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train DPO in `folder` and return the metrics."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    work = {
        "base": base,
        "adapter": adapter,
        "lora": lora or {},
        "settings": settings,
        "rows": rows,
        "validation": validation,
        "labels": labels,
    }
    return dpo_into(work, folder / "checkpoints", folder / "output", report)


def rl(
    base: Path, adapter: Path, folder: Path, report: Any = silent, rows: int = 7, **settings: Any
) -> dict[str, Any]:
    """Train RL in `folder` and return the metrics."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    work = {"base": base, "adapter": adapter, "settings": settings, "rows": rows}
    return rl_into(work, folder / "checkpoints", folder / "output", report)


def score_by_the_base(trainer: Any, *rest: Any) -> Any:
    """Score the reference without the adapter: a wrong reference, which the proof must refuse."""
    from ft_assets.training.reference import score_reference

    with trainer.model.disable_adapter():
        return score_reference(trainer, *rest)


def weights(folder: Path) -> dict[str, Any]:
    """Return the tensors of a trained artifact."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(left: Path, right: Path) -> bool:
    """Return True if two trained artifacts have the same bits."""
    ours, theirs = weights(left), weights(right)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(bool((ours[name] == theirs[name]).all()) for name in ours)
    )
