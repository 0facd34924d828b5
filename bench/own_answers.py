"""Compare learning from own answers with SFT: DPO on sampled pairs, and RL, on held-out rows.

    python bench/own_answers.py train SNAPSHOT BANKING77 SEED OUTPUT [--seconds N] [--small]
    python bench/own_answers.py compare OUTPUT/*.json

`train` trains SFT on 20 rows of each of the 77 intents. It samples four answers to each training
prompt at two temperatures, trains DPO on their pairs, and RL with as many sampled answers. It
writes for each model whether it is right on each of 1,000 held-out rows, and skips what would
begin after N seconds. SNAPSHOT is a folder as `base_model` has it. `compare` prints the paired
differences over the seeds, by row. Each seed draws other training rows.
"""

import argparse
import csv
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LORA = {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
BATCH = {"micro_batch": 64, "gradient_checkpointing": False}
TOKENS = 20  # of the longest label
SAMPLES = 4
TEMPERATURES = (0.8, 1.2)
# The name, the temperature of the samples, and the settings that differ.
DPO = [
    ("dpo T0.8", 0.8, {}),
    ("dpo T0.8 + sft 1", 0.8, {"sft_weight": 1.0}),
    ("dpo T1.2 + sft 1", 1.2, {"sft_weight": 1.0}),
    ("dpo T1.2 + sft 1, beta 0.5", 1.2, {"sft_weight": 1.0, "beta": 0.5}),
    ("dpo T1.2 + sft 1, 1e-4", 1.2, {"sft_weight": 1.0, "learning_rate": 1e-4}),
]
RL = [
    ("grpo 1e-4", {"learning_rate": 1e-4}),
    ("grpo 3e-5", {"learning_rate": 3e-5}),
    ("rloo 1e-4", {"learning_rate": 1e-4, "method": "rloo"}),
]


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    label: str
    prompt: list[int]
    whole: list[int]  # the prompt with the answer

    @property
    def answer(self) -> list[int]:
        return self.whole[len(self.prompt) :]

    def sequence(self) -> dict[str, Any]:
        supervised = [place >= len(self.prompt) for place in range(len(self.whole))]
        return {"id": self.id, "group": self.id, "input_ids": self.whole, "supervised": supervised}


class Bench:
    """The rows of a seed, and what is done with them."""

    def __init__(self, snapshot: Path, data: Path, seed: int, work: Path, small: bool) -> None:
        from ft_assets.models.loading import load_tokenizer, stop_ids

        self.snapshot, self.seed, self.work = snapshot, seed, work
        self.tokenizer, self.stops = load_tokenizer(snapshot), stop_ids(snapshot)
        every, test = (_read(data / f"{name}.csv") for name in ("train", "test"))
        known = {text.lower() for text, _ in every}
        chance = random.Random(seed)
        chance.shuffle(every)
        taken: Counter[str] = Counter()
        train = []
        for text, label in every:
            if taken[label] < 20:
                taken[label] += 1
                train.append((text, label))
        unseen = [row for row in test if row[0].lower() not in known]
        random.Random(0).shuffle(unseen)
        self.train = self._rows("train", train[:64] if small else train)
        self.heldout = self._rows("heldout", unseen[: 16 if small else 1000])
        self.small = {"max_steps": 2} if small else {}

    def _rows(self, side: str, rows: Sequence[tuple[str, str]]) -> list[Row]:
        from ft_assets.chat.rendering import ProofFailed, Renderer

        renderer, conversations = Renderer(self.tokenizer, self.stops), []
        for number, (text, label) in enumerate(rows):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
            conversations.append({"id": f"{side}{number}", "messages": messages})
        asked = [{**row, "messages": row["messages"][:-1]} for row in conversations]
        prompts = renderer.prompts(asked)
        wholes: Any = renderer.train(conversations)
        return [
            Row(row["id"], row["messages"][1]["content"], prompt, whole[0].input_ids)
            for row, prompt, whole in zip(conversations, prompts, wholes, strict=True)
            if not isinstance(prompt, ProofFailed) and not isinstance(whole, ProofFailed)
        ]

    def folder(self, name: str) -> tuple[Path, Path]:
        place = self.work / name.replace(" ", "-")
        (place / "output").mkdir(parents=True)
        return place / "checkpoints", place / "output"

    def sft(self, name: str, epochs: float) -> Path:
        from ft_assets.config import LoraSettings, SftSettings
        from ft_assets.training.sft import train_sft

        checkpoints, output = self.folder(name)
        settings = {"num_train_epochs": epochs, "learning_rate": 1e-3, "effective_batch": 64}
        train_sft(
            snapshot=self.snapshot,
            rows=[row.sequence() for row in self.train],  # type: ignore[misc]
            validation=[],
            lora=LoraSettings.model_validate(LORA),
            sft=SftSettings.model_validate(
                {**settings, **BATCH, **self.small, "seed": self.seed, "packing": False}
            ),
            checkpoints=checkpoints,
            output=output,
            report=silent,
            memory_limit_gb=30,
        )
        return output

    def answers(
        self, adapter: Path, rows: Sequence[Row], temperature: float | None = None, n: int = 1
    ) -> tuple[list[list[Any]], float]:
        """Return n answers to each row, and tokens/s."""
        from ft_assets.evaluation.candidate_proofs import load_candidates
        from ft_assets.inference.generation import generate
        from ft_assets.inference.sampling import Sampling

        model = load_candidates(self.snapshot, {"model": adapter})
        asked = [(row, f"{row.id}/{number}") for row in rows for number in range(n)]
        sampling = None
        if temperature is not None:
            sampling = Sampling(temperature, 1.0, self.seed, [key for _, key in asked])
        begun = time.perf_counter()
        found = generate(
            model,
            self.tokenizer,
            [row.prompt for row, _ in asked],
            self.stops,
            TOKENS,
            512,
            sampling=sampling,
        )
        seconds = time.perf_counter() - begun
        grouped = [found[place : place + n] for place in range(0, len(found), n)]
        return grouped, sum(len(one.ids) for one in found) / seconds

    def right(self, adapter: Path) -> list[int]:
        answers, _ = self.answers(adapter, self.heldout)
        return [
            int(answer.stopped and answer.text.strip() == row.label)
            for row, (answer,) in zip(self.heldout, answers, strict=True)
        ]

    def pairs(self, samples: list[list[Any]]) -> list[dict[str, Any]]:
        """Return pairs by the rule of sampled_preferences."""
        pairs = []
        for row, answers in zip(self.train, samples, strict=True):
            ended = [one for one in answers if one.stopped]
            wrong = Counter(one.ids for one in ended if one.text.strip() != row.label)
            good = Counter(one.ids for one in ended if one.text.strip() == row.label)
            if wrong:
                chosen = list(good.most_common(1)[0][0]) if good else row.answer
                rejected = list(wrong.most_common(1)[0][0])
                pair = {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}
                pairs.append(pair)
        return pairs

    def dpo(self, name: str, sft: Path, pairs: list[Any], more: dict[str, Any]) -> Path:
        from ft_assets.config import DpoSettings, LoraSettings
        from ft_assets.training.dpo import train_dpo

        checkpoints, output = self.folder(name)
        settings = {"learning_rate": 2e-5, "effective_batch": 32, "num_train_epochs": 2}
        train_dpo(
            snapshot=self.snapshot,
            sft_adapter=sft,
            pairs=pairs,
            lora=LoraSettings.model_validate(LORA),
            dpo=DpoSettings.model_validate(
                {**settings, **BATCH, "micro_batch": 32, **self.small, "seed": self.seed, **more}
            ),
            checkpoints=checkpoints,
            output=output,
            report=silent,
            memory_limit_gb=30,
        )
        return output

    def rl(self, name: str, sft: Path, more: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Train RL with as many sampled answers as DPO's pairs needed."""
        from ft_assets.config import LoraSettings, RlSettings
        from ft_assets.training.rl import train_rl
        from ft_assets.training.rl_trainer import Given, Prompt, Reward

        labels = {row.id: row.label for row in self.train}

        def exact(answers: Sequence[Given]) -> list[float]:
            return [float(one.text.strip() == labels[one.id]) for one in answers]

        checkpoints, output = self.folder(name)
        settings = {"n": SAMPLES, "effective_batch": 128, "temperature": 1.0, "num_train_epochs": 1}
        if self.small:
            settings = {**settings, "effective_batch": 64}
        metrics = train_rl(
            snapshot=self.snapshot,
            sft_adapter=sft,
            prompts=[Prompt(row.id, row.prompt, row.answer) for row in self.train],
            rewards=[Reward("exact", 1.0, exact)],
            lora=LoraSettings.model_validate(LORA),
            rl=RlSettings.model_validate(
                {**settings, **BATCH, **self.small, "seed": self.seed, **more}
            ),
            max_new_tokens=TOKENS,
            checkpoints=checkpoints,
            output=output,
            report=silent,
            memory_limit_gb=30,
            batch_size=512,
        )
        curve = json.loads((output / "info" / "curve.json").read_text())
        return output, {**metrics, "reward": [step["reward"] for step in curve]}


def silent(*_: Any, **__: Any) -> None:
    pass


def _read(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def train(given: argparse.Namespace) -> None:
    begun = time.perf_counter()
    work = given.output / f"s{given.seed}"
    bench = Bench(given.snapshot, given.data, given.seed, work, given.small)
    found: dict[str, Any] = {}

    def note(name: str, adapter: Path, **numbers: Any) -> None:
        right = bench.right(adapter)
        found[name] = {"right": right, **numbers}
        (given.output / f"seed-{given.seed}.json").write_text(json.dumps(found))
        score = sum(right) / len(right)
        shown = {key: value for key, value in numbers.items() if not isinstance(value, list | dict)}
        spent = time.perf_counter() - begun
        print(f"{spent:5.0f} s  seed {given.seed}  {name}: {score:.3f}  {shown}", flush=True)

    def in_time() -> bool:
        return time.perf_counter() - begun < given.seconds

    sft = bench.sft("sft", 2)
    note("sft", sft, rows=len(bench.train))
    sampled: dict[float, list[Any]] = {}
    for temperature in TEMPERATURES:
        samples, speed = bench.answers(sft, bench.train, temperature, SAMPLES)
        sampled[temperature] = bench.pairs(samples)
        right = [
            [one.text.strip() == row.label for one in its]
            for row, its in zip(bench.train, samples, strict=True)
        ]
        share = sum(map(sum, right)) / sum(map(len, right))
        some = sum(map(any, right)) / len(right)
        print(
            f"seed {given.seed}  T {temperature}: right {share:.3f}, some right {some:.3f}, "
            f"{len(sampled[temperature])} pairs, {speed:.0f} tokens/s",
            flush=True,
        )

    def one_dpo(name: str, temperature: float, more: dict[str, Any]) -> None:
        pairs = sampled[temperature]
        note(name, bench.dpo(name, sft, pairs, more), pairs=len(pairs))

    def one_rl(name: str, more: dict[str, Any]) -> None:
        output, metrics = bench.rl(name, sft, more)
        kept = ("seconds", "sampling_share", "sampled_tokens_per_s", "kl_last", "reward", "steps")
        note(name, output, **{key: metrics[key] for key in kept if key in metrics})

    steps: list[Callable[[], None]] = [
        lambda: note("sft, 4 epochs", bench.sft("sft4", 4)),
        lambda: one_dpo(*DPO[1]),
        lambda: one_rl(*RL[0]),
        lambda: one_dpo(*DPO[0]),
        lambda: one_dpo(*DPO[2]),
        lambda: one_rl(*RL[1]),
        lambda: one_dpo(*DPO[4]),
        lambda: one_dpo(*DPO[3]),
        lambda: one_rl(*RL[2]),
    ]
    for one in steps:
        if in_time():
            one()
    print(f"seed {given.seed} done in {time.perf_counter() - begun:.0f} s", flush=True)


def compare(files: Sequence[Path]) -> None:
    """Print each model's score, and its difference from SFT, paired by row over the seeds."""
    from ft_assets.evaluation.verdict.statistics import compare as paired

    seeds = [json.loads(file.read_text()) for file in files]
    names = [name for name in seeds[0] if all(name in one for one in seeds)]
    print("| model | exact | - SFT | interval | p | by seed |\n|---|---|---|---|---|---|")
    for name in names:
        mean, base = (_by_row([one[kind]["right"] for one in seeds]) for kind in (name, "sft"))
        score = f"{sum(mean) / len(mean):.3f}"
        if name == "sft":
            print(f"| {name} | {score} | | | | |")
            continue
        entry = paired(mean, base, 0.95, 0)
        by_seed = ", ".join(
            f"{(sum(one[name]['right']) - sum(one['sft']['right'])) / len(mean):+.3f}"
            for one in seeds
        )
        interval = f"[{entry.low:+.3f}, {entry.high:+.3f}]"
        print(f"| {name} | {score} | {entry.mean:+.3f} | {interval} | {entry.p:.2g} | {by_seed} |")


def _by_row(seeds: Sequence[Sequence[int]]) -> list[float]:
    """Return the mean of each row over the seeds."""
    return [sum(row) / len(seeds) for row in zip(*seeds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("train")
    one.add_argument("snapshot", type=Path)
    one.add_argument("data", type=Path)
    one.add_argument("seed", type=int)
    one.add_argument("output", type=Path)
    one.add_argument("--seconds", type=float, default=10**9)
    one.add_argument("--small", action="store_true", help="two steps of everything, for a check")
    verbs.add_parser("compare").add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.verb == "train":
        given.output.mkdir(parents=True, exist_ok=True)
        train(given)
    else:
        compare(given.files)


if __name__ == "__main__":
    main()
