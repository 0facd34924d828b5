"""Tokenized rows and pairs of a tiny model, and SFT and DPO on them without a graph around."""

import random
from pathlib import Path
from typing import Any

from ft_assets.config import DpoSettings, LoraSettings, SftSettings

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
EOS = 2  # <|im_end|> of the tiny tokenizer


def ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(4, 250) for _ in range(count)]


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of several lengths with a group each; their answers have something in common that can be learnt."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, answer = (
            ids(chance, chance.randrange(4, 16)),
            [*[7, 8, 9][: chance.randrange(1, 4)], EOS],
        )
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
    """Return preference pairs: short answers are chosen, long ones are not."""
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
    told: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train SFT as `told` ({"base", "lora", "settings", "rows"}) and return the metrics."""
    from ft_assets.models.adapter_files import save_groups
    from ft_assets.training.sft import train_sft

    rows = make_rows(told.get("rows", 18))
    lora = LoraSettings.model_validate({**LORA, **told.get("lora", {})})
    settings = SftSettings.model_validate({**SFT, **told.get("settings", {})})
    metrics = train_sft(
        snapshot=Path(told["base"]),
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


def dpo_into(
    told: dict[str, Any], checkpoints: Path, output: Path, report: Any = silent
) -> dict[str, Any]:
    """Train DPO as `told` ({"base", "adapter", "lora", "settings", "rows", "watched"}) and return the metrics."""
    from ft_assets.training.dpo import train_dpo

    lora = LoraSettings.model_validate({**LORA, **told.get("lora", {})})
    settings = DpoSettings.model_validate({**DPO, **told.get("settings", {})})
    pairs, watched = make_pairs(told.get("rows", 10)), make_pairs(told.get("watched", 0), seed=5)
    return train_dpo(
        snapshot=Path(told["base"]),
        sft_adapter=Path(told["adapter"]),
        pairs=pairs,
        validation=watched,
        lora=lora,
        dpo=settings,
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
    """Train in `folder` (`checkpoints/`, `output/`) and return the metrics."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    told = {"base": base, "lora": lora or {}, "settings": settings, "rows": rows}
    return sft_into(told, folder / "checkpoints", folder / "output", report)


def dpo(
    base: Path,
    adapter: Path,
    folder: Path,
    report: Any = silent,
    lora: Any = None,
    rows: int = 10,
    watched: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Train DPO in `folder` and return the metrics."""
    (folder / "output").mkdir(parents=True, exist_ok=True)
    told = {
        "base": base,
        "adapter": adapter,
        "lora": lora or {},
        "settings": settings,
        "rows": rows,
        "watched": watched,
    }
    return dpo_into(told, folder / "checkpoints", folder / "output", report)


def weights(folder: Path) -> dict[str, Any]:
    """Return the tensors of a trained artifact."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(left: Path, right: Path) -> bool:
    """Return whether two trained artifacts hold the same bits."""
    ours, theirs = weights(left), weights(right)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(bool((ours[name] == theirs[name]).all()) for name in ours)
    )
