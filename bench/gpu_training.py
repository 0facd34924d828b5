"""Measure SFT with plain TRL and with ft_assets on one GPU: tokens/s, MFU and peak memory.

    python bench/gpu_training.py                  # 8B Llama shape with random weights
    python bench/gpu_training.py --memory         # and predicted against measured peaks
    python bench/gpu_training.py --unsloth DIR    # and unsloth, from a folder of its packages
    python bench/gpu_training.py --check          # only: packed and fused against plain

Plain TRL is the reference: QLoRA NF4 with packing, sdpa and checkpointing, 4 x 4 packs of 1,024
tokens. Ours is `train_sft` itself (plan, proof, trainer), with random weights that are not read
from a disk. All have about 16 x 1,024 tokens in an optimizer step, targets q, k, v and o, r 16, and
the same dropout. Each setup runs in its own process. With --unsloth, which has dropout 0, ours also
runs with dropout 0. DIR has unsloth with the trl and datasets that it needs.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

from gpu_checks import check, matmul_tflops
from gpu_ways import MEMORY, OURS, SWEEP, UNSLOTH, Result, Way, ours, plain
from random_base import SHAPES


def child(arguments: argparse.Namespace) -> None:
    """Measure one setup in this process and print its result as JSON."""
    import torch

    torch.set_num_threads(min(8, torch.get_num_threads()))
    way = Way(**json.loads(arguments.job))
    shape = SHAPES[way.shape or arguments.shape]
    dropout = arguments.dropout if way.dropout is None else way.dropout
    result: Result | dict[str, float]
    if way.kind in ("plain", "unsloth"):
        result = plain(way, arguments.steps, dropout, shape)
    elif way.kind == "check":
        result = check()
    elif way.kind == "machine":
        result = {
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "matmul_tflops": round(matmul_tflops()),
        }
    else:
        steps = way.steps or (2 if way.profile else arguments.steps + 4)
        result = ours(way, steps, dropout, shape)
    print("RESULT " + json.dumps(result), flush=True)


def run(arguments: argparse.Namespace, way: Way) -> Result:
    """Measure one setup in its own process."""
    command = [sys.executable, __file__, "--job", json.dumps(dataclasses.asdict(way))]
    command += ["--steps", str(arguments.steps), "--dropout", str(arguments.dropout)]
    command += ["--shape", arguments.shape]
    paths = [arguments.unsloth] * (way.kind == "unsloth") + [os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=environment
    )
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines or way.profile:
        print(done.stderr[-26000 if way.profile else -2500 :], flush=True)
    return json.loads(lines[0]) if lines else {"failed": done.returncode}


def ways_of(arguments: argparse.Namespace) -> list[tuple[str, Way]]:
    """Return the setups to measure: plain TRL first, then those whose name matches --only."""
    ways: list[tuple[str, Way]] = []
    if arguments.unsloth:
        ways += [(f"unsloth, {name}", way) for name, way in UNSLOTH.items()]
    profile = arguments.profile
    ways += [(name, dataclasses.replace(way, profile=profile)) for name, way in OURS.items()]
    if arguments.unsloth:
        ways += [
            (f"{name}, dropout 0", dataclasses.replace(way, dropout=0.0))
            for name, way in OURS.items()
        ]
    if arguments.sweep:
        ways += SWEEP.items()
    chosen = [(name, way) for name, way in ways if re.search(arguments.only, name)]
    return [("plain TRL", Way("plain")), *chosen] if chosen else []


def print_speed(arguments: argparse.Namespace, machine: Result) -> None:
    """Print a line of tokens/s, MFU and memory for each setup."""
    from ft_assets.training.flops import flops_per_token, peak_flops
    from ft_assets.training.memory_plan.model_shape import shape_of

    useful = flops_per_token(shape_of({**SHAPES[arguments.shape]}))
    peak = peak_flops(machine["machine"]) or 0.0
    rate = machine["matmul_tflops"] * 1e12
    print(
        f"\n{'way':<34} tokens/s  spread  ratio   MFU  of matmul  peak GB  predicted"
        "  micro-batch (tokens)  checkpointed  loss",
        flush=True,
    )
    first = None
    for name, way in ways_of(arguments):
        found = run(arguments, way)
        if "tokens_per_s" not in found:
            print(f"{name:<34} failed: {found}", flush=True)
            continue
        speed = found["tokens_per_s"]
        first = first or speed
        print(
            f"{name:<34} {speed:8,}  {found.get('spread', 0):6.3f}  {speed / first:5.2f}"
            f"  {100 * speed * useful / peak if peak else 0:4.1f}"
            f"  {100 * speed * useful / rate if rate else 0:9.1f}  {found.get('peak_gb', 0):7.2f}"
            f"  {found.get('predicted_memory_gb', 0):9.2f}  {found.get('micro_batch', 4)!s:>4}"
            f" ({found.get('largest_micro_batch_tokens', 0):,})"
            f"  {found.get('checkpointed_layers')!s:>12}  {found.get('loss')}"
            f"  {found.get('method', 'qlora')}",
            flush=True,
        )
        if "fp8_linears" in found:
            print(
                f"{'':<34} FP8 against bf16 on these random weights: {found['fp8_linears']} "
                f"linears, {found['fp8_mlps']} fused MLPs, "
                f"{'fast' if found['fp8_fast_sums'] else 'exact'} sums, "
                f"loss {found['fp8_loss_shift']:+}, gradient cosine "
                f"{found['fp8_gradient_cosine']}, packing leak {found['packing_leak']}",
                flush=True,
            )
        if "attention" in found:
            print(f"{'':<34} attention kernels in a step: {found['attention']}", flush=True)


def print_memory(arguments: argparse.Namespace) -> None:
    """Print a line of predicted and measured memory for each setup."""
    print(f"\n{'setup':<46} predicted GB  reserved GB  allocated GB   error  chosen", flush=True)
    for name, way in MEMORY.items():
        if not re.search(arguments.only, name):
            continue
        found = run(arguments, dataclasses.replace(way, steps=way.steps or 3))
        if "peak_gb" not in found or "allocated_gb" not in found:
            print(f"{name:<46} failed: {found}", flush=True)
            continue
        predicted = found.get("predicted_memory_gb", 0.0)
        error = 100 * (predicted / found["peak_gb"] - 1)
        print(
            f"{name:<46} {predicted:12.2f} {found['peak_gb']:12.2f} {found['allocated_gb']:13.2f}"
            f" {error:+6.1f}%  {found.get('method')}, {found.get('micro_batch')} rows,"
            f" {found.get('largest_micro_batch_tokens', 0):,} tokens,"
            f" {found.get('checkpointed_layers')} layers checkpointed,"
            f" {found.get('tokens_per_s', '-')} tokens/s, loss {found.get('loss')}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--unsloth", default="", metavar="DIR", help="and unsloth, from this folder of packages"
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="and fixed micro-batches under 24 GB")
    parser.add_argument(
        "--profile", action="store_true", help="a profile of the time (with --only)"
    )
    parser.add_argument("--only", default="", help="beside plain TRL: names that match this")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        child(arguments)
        return
    machine = run(arguments, Way("machine"))
    print(json.dumps(machine))
    if not arguments.only:
        for name, value in run(arguments, Way("check")).items():
            print(f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}")
    if arguments.check:
        return
    print_speed(arguments, machine)
    if arguments.memory:
        print_memory(arguments)


if __name__ == "__main__":
    main()
