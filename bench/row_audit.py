"""Wrong labels that are planted in real rows, and what the row audit finds of them.

    python bench/row_audit.py train.csv <folder of base_model>

Real rows of banking77, a few intents, in which 5 % of the labels are replaced by another one. Each
rule takes as many rows as were planted: the audit's probability, the loss under the folds' models,
the loss under one model that was trained on all rows, and chance. `audit` takes the rows that it
names. A set without planted labels shows the false alarms.
"""

import argparse
import csv
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from ft_assets.chat.rendering import Renderer
from ft_assets.config import AuditSettings, LoraSettings, SftSettings
from ft_assets.data.canonical import conversation
from ft_assets.evaluation.row_audit import FoldScores, audit, fold_of, score_rows
from ft_assets.markdown import table
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.training.subsets import SubsetTrainings

LORA = LoraSettings(method="lora", target_modules="all-linear", lora_dropout=0.0)
SFT = SftSettings(learning_rate=1e-3, effective_batch=8, micro_batch=8)
PLANTED = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="banking77's train file: csv with text, category")
    parser.add_argument("snapshot", type=Path, help="a folder of base_model in a store")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--intents", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--no-clean", action="store_true", help="only sets with planted labels")
    given = parser.parse_args()
    counts: dict[str, list[tuple[int, int, int]]] = {}
    for seed in range(given.seeds):
        if not given.no_clean:
            clean = one_set(given, seed, 0.0)
            print(f"seed {seed}: without planted labels {len(clean['named'])} named", flush=True)
        planted = one_set(given, seed, PLANTED)
        for name, chosen in planted["chosen"].items():
            hits = len(set(chosen) & planted["wrong"])
            counts.setdefault(name, []).append((hits, len(chosen), len(planted["wrong"])))
            print(f"seed {seed}: {name}: {hits} of {len(chosen)}, {len(planted['wrong'])} planted")
    print(table(["rule", "precision", "recall"], lines(counts)), flush=True)


def lines(counts: dict[str, list[tuple[int, int, int]]]) -> list[list[str]]:
    sums = {name: [sum(one) for one in zip(*found, strict=True)] for name, found in counts.items()}
    return [
        [name, share(hits, named), share(hits, bad)] for name, (hits, named, bad) in sums.items()
    ]


def share(part: int, whole: int) -> str:
    """Return a share with its Clopper-Pearson interval of 95 %."""
    if not whole:
        return "–"
    low = beta.ppf(0.025, part, whole - part + 1) if part else 0.0
    high = beta.ppf(0.975, part + 1, whole - part) if part < whole else 1.0
    return f"{part / whole:.2f} [{low:.2f}, {high:.2f}]"


def one_set(given: Any, seed: int, planted: float) -> dict[str, Any]:
    rows, wrong = tokenized(given, seed, planted)
    tokenizer = load_tokenizer(given.snapshot)
    settings = AuditSettings(folds=given.folds, num_train_epochs=given.epochs, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainings = SubsetTrainings(
            given.snapshot,
            LORA,
            SFT.model_copy(update={"num_train_epochs": given.epochs, "keep": "last"}),
            Path(folder),
            lambda *_, **__: None,
        )

        def scores(name: str, train: Sequence[Any], judged: Sequence[Any]) -> FoldScores:
            return trainings.measure(
                name,
                train,
                lambda adapter: score_rows(given.snapshot, adapter, tokenizer, judged),
                FoldScores,
                seed,
            )

        parts = [
            (
                [row for row in rows if fold_of(row, settings) != fold],
                [row for row in rows if fold_of(row, settings) == fold],
            )
            for fold in range(given.folds)
        ]
        unseen = {
            line.id: line
            for fold, part in enumerate(parts)
            for line in scores(f"fold-{fold}", *part).rows
        }
        done = audit(rows, [], unseen, [], {}, tokenizer, settings)
        seen = scores("all", rows, rows).rows if planted else []
    named = {row["id"] for row in done.named if row["reason"] == "wrong answer"}
    print(
        f"  evidence {done.found.evidence:.3g}, share {done.found.share:.3f}, "
        f"T {done.found.temperature}, informed {done.found.informed}",
        flush=True,
    )
    ids = [row["id"] for row in rows]
    ranks = {
        "one model's loss, as many": [line.loss for line in seen],
        "folds' loss, as many": done.losses,
        "audit, as many": [row.probability for row in done.found.rows],
        "chance, as many": list(np.random.default_rng(seed).random(len(rows))),
    }
    chosen = {"audit": named} | {
        name: {ids[at] for at in np.argsort(values)[::-1][: len(wrong)]}
        for name, values in ranks.items()
        if len(values)
    }
    return {"named": named, "wrong": wrong, "chosen": chosen}


def tokenized(given: Any, seed: int, planted: float) -> tuple[list[Any], set[str]]:
    """Return rendered rows, and the ids of those whose label was replaced."""
    with given.data.open(newline="") as file:
        read = [(line["text"], line["category"]) for line in csv.DictReader(file)]
    chance = random.Random(seed)
    intents = chance.sample(sorted({label for _, label in read}), given.intents)
    taken = chance.sample([one for one in read if one[1] in intents], given.rows)
    bad = set(chance.sample(range(len(taken)), round(planted * len(taken))))
    renderer = Renderer(load_tokenizer(given.snapshot), stop_ids(given.snapshot))
    raw = [
        conversation(
            {
                "prompt": text,
                "completion": chance.choice([one for one in intents if one != label])
                if at in bad
                else label,
            }
        )
        for at, (text, label) in enumerate(taken)
    ]
    found = []
    for row, rendered in zip(raw, renderer.train(raw), strict=True):
        (one,) = rendered
        found.append(
            {**row, "judged": True, "input_ids": one.input_ids, "supervised": one.supervised}
        )
    return found, {raw[at]["id"] for at in bad}


if __name__ == "__main__":
    main()
