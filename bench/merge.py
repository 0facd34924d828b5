"""Measure the time and the memory of the merge, against `cp` and PEFT's merge.

The base is a random Llama in bf16.

    # 16 GB of base, and two outputs of the same size: 50 GB of disk
    python bench/merge.py --shape 8b --targets attention --folder /tmp/merge
    # 2.5 GB of base: also PEFT's merge, compared bit by bit
    python bench/merge.py --shape 1b --peft

Copies and merges alternate. Each runs in its own process, and its peak memory is read at its end.
The script drops the page cache before each run if it has the permission (root). Otherwise the table
states that the cache was not dropped. Each run ends with an fsync of its files. Then the script
compares every tensor with W + s·BA, computed in fp32 from the files, and prints the largest error
in roundings to bf16.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ft_assets.config.training import TARGETS
from ft_assets.merging.tensor_files import (
    INDEX,
    blocks,
    entries_of,
    read_file,
    read_folder,
    read_tensor,
)

SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 64_128,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 15,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SHARD = 5_000_000_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYNC = """import os, sys, pathlib
for path in pathlib.Path(sys.argv[3]).glob('*.safetensors'):
    with path.open('rb') as file: os.fsync(file.fileno())
"""
# VmHWM, not getrusage: a process inherits ru_maxrss from its parent.
PEAK = """line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(int(line.split()[1]) * 1024 / 1e9)
"""
COPY = """import subprocess, sys, glob
subprocess.run(['cp', *glob.glob(sys.argv[1] + '/*'), sys.argv[3]], check=True)
"""
STREAM = """import sys; from pathlib import Path; from ft_assets.merging.merge import merge
merge(*map(Path, sys.argv[1:4]))
"""
PEFT = """import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size='5GB')
"""
IMPORTS = (
    "import sys, torch; from ft_assets.merging.merge import merge; from peft import PeftModel\n"
)


def make_base(folder: Path, shape: str) -> None:
    """Write a random base, one shard's tensors in memory at a time."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    torch.manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, dims in shapes.items():
        size += 2 * dims.numel()
        if size > SHARD:
            shards.append([])
            size = 2 * dims.numel()
        shards[-1].append(name)
    where = {}
    for number, names in enumerate(shards, 1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        where |= dict.fromkeys(names, file)
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
        )


def make_adapter(folder: Path, base: Path, targets: list[str], rank: int) -> None:
    """Write a random LoRA adapter of the base."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    tensors = {}
    for name, entry in entries_of(read_folder(base)).items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = (
                torch.randn(rank, entry.shape[1]) * 0.02
            )
            tensors[f"base_model.model.{module}.lora_B.weight"] = (
                torch.randn(entry.shape[0], rank) * 0.02
            )
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def drop_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def timed(code: str, base: Path, adapter: Path, output: Path) -> tuple[float, float]:
    """Return (seconds from the end of the imports to the fsync, peak resident GB) of a process."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    clock = "import time; begun = time.perf_counter()\n"
    done = f"print(time.perf_counter() - begun)\n{PEAK}"
    program = (IMPORTS if code != COPY else "") + clock + code + SYNC + done
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(base), str(adapter), str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak = result.stdout.split()[-2:]
    return float(seconds), float(peak)


def errors(base: Path, adapter: Path, merged: Path) -> str:
    """Compare the merged file with fp32 sums.

    Returns the largest error of an updated tensor in roundings to bf16, and the count of other
    tensors that differ.
    """
    before = entries_of(read_folder(base))
    after = entries_of(read_folder(merged))
    pairs = read_file(adapter / "adapter_model.safetensors").entries
    config = json.loads((adapter / "adapter_config.json").read_text())
    worst, touched, differ = 0.0, 0, 0
    for name, entry in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        old, new = read_tensor(entry), read_tensor(after[name])
        if key not in pairs:
            differ += not torch.equal(old, new)
            continue
        touched += 1
        low, high = read_tensor(pairs[key]), read_tensor(pairs[key.replace("lora_A", "lora_B")])
        for first, last in blocks(entry, 1 << 26):
            exact = torch.addmm(
                old[first:last].float(),
                high[first:last],
                low,
                alpha=config["lora_alpha"] / config["r"],
            )
            rounding = torch.ldexp(torch.full_like(exact, 2**-9), torch.frexp(exact).exponent)
            worst = max(worst, float(((new[first:last].float() - exact).abs() / rounding).max()))
    return f"{touched} updated, at most {worst} roundings; {differ} of the others differ"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--targets", choices=["attention", "all-linear"], default="attention")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--peft", action="store_true", help="also PEFT's merge, which holds the model in memory"
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_merge"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    base = arguments.folder / f"base-{arguments.shape}"
    adapter = arguments.folder / "adapter"
    if not base.exists():
        make_base(base, arguments.shape)
    shutil.rmtree(adapter, ignore_errors=True)
    targets = list(TARGETS["attention"]) if arguments.targets == "attention" else LINEAR
    make_adapter(adapter, base, targets, arguments.rank)
    size = sum(file.size for file in read_folder(base))
    largest = max(entry.bytes for entry in entries_of(read_folder(base)).values())
    ways = {"cp": COPY, "streaming": STREAM, **({"PEFT": PEFT} if arguments.peft else {})}
    seconds, peaks, cold = run(ways, arguments, base, adapter)
    cache = "dropped before each run" if cold else "not dropped"
    print(
        f"\n{arguments.shape}, {size / 1e9:.1f} GB in bf16, LoRA r {arguments.rank} on "
        f"{arguments.targets}, {os.cpu_count()} cores, page cache {cache}; limit of memory: "
        f"2 x {largest / 1e9:.2f} + 1 GB\n"
    )
    print("| way | seconds, each run | best | against cp, run by run | peak GB |")
    print("|---|---|---|---|---|")
    for way in ways:
        pairs = zip(seconds[way], seconds["cp"], strict=True)
        ratios = ", ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs)
        runs = ", ".join(f"{value:.1f}" for value in seconds[way])
        print(f"| {way} | {runs} | {min(seconds[way]):.1f} | {ratios} | {peaks[way]:.2f} |")
    compare_bits(arguments, base, adapter)
    shutil.rmtree(arguments.folder)


def run(
    ways: dict[str, str], arguments: argparse.Namespace, base: Path, adapter: Path
) -> tuple[dict[str, list[float]], dict[str, float], bool]:
    """Run each variant in turn; return its seconds, peak GB, and True if the cache was dropped."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
    cold = True
    for _ in range(arguments.runs):
        for way, code in ways.items():
            output = arguments.folder / way
            for other in ways:
                # With PEFT, the end of the run compares the outputs of both merges.
                if other != way and not (arguments.peft and other != "cp"):
                    shutil.rmtree(arguments.folder / other, ignore_errors=True)
            cold = drop_cache() and cold
            taken, peak = timed(code, base, adapter, output)
            seconds[way].append(taken)
            peaks[way] = max(peaks[way], peak)
            print(f"{time.strftime('%H:%M:%S')} {way}: {taken:.1f} s, {peak:.2f} GB", flush=True)
    return seconds, peaks, cold


def compare_bits(arguments: argparse.Namespace, base: Path, adapter: Path) -> None:
    """Compare the streaming merge with fp32 sums, and with PEFT's merge if it ran."""
    merged = arguments.folder / "streaming"
    if not merged.exists():
        timed(STREAM, base, adapter, merged)
    print("\nstreaming against fp32:", errors(base, adapter, merged))
    if arguments.peft:
        ours = entries_of(read_folder(merged))
        theirs = entries_of(read_folder(arguments.folder / "PEFT"))
        equal = sum(
            torch.equal(read_tensor(ours[name]), read_tensor(theirs[name])) for name in theirs
        )
        print(f"streaming against PEFT: {equal} of {len(theirs)} tensors are the same bits")


if __name__ == "__main__":
    main()
