"""Kill training at each point, run it again, and compare the result with an undisturbed run.

    python bench/kill_matrix.py [sft] [dpo] [rl] [full]

The results must be equal bit for bit. The script trains a tiny random Llama on the CPU, with
dropout, in real child processes. It kills them with SIGKILL at a patched call, without any sleep.
`full` is SFT of all weights. The script prints a table. Its exit code is 1 if a line is wrong.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ft_assets.artifacts import ArtifactStore
from ft_assets_tests.factories import make_tiny_model
from ft_assets_tests.kill_points import run
from ft_assets_tests.training import same, sft

# the point, and the number of the call
COMMON = [
    ("load", 1),
    ("before the first step", 1),
    ("mid-accumulation", 1),
    ("mid-accumulation", 7),
    ("optimizer step", 1),
    ("optimizer step", 4),
    ("checkpoint: weights written", 1),
    ("checkpoint: optimizer written", 2),
    ("checkpoint: before its rename", 2),
    ("checkpoint: after its rename", 2),
    ("between epochs", 1),
    ("manifest", 1),
    ("publish: before its rename", 1),
    ("before CURRENT", 1),
]
SFT = [
    ("forward pass", 1),
    ("validation", 1),
    ("validation", 3),
    ("best weights: before their rename", 1),
    ("final save", 1),
    *COMMON,
]
SAVED = ("final save of a preference training", 1)
DPO = [("forward pass of a pair", 1), ("reference written", 1), SAVED, *COMMON]
RL = [("sampling", 2), ("sampling", 5), ("rewards of a step", 3), SAVED, *COMMON]
POINTS = {"sft": SFT, "dpo": DPO, "rl": RL, "full": SFT}


def line(
    kind: str, point: str, call: int, work: dict[str, Any], whole: Path, home: Path
) -> tuple[str, bool]:
    folder = home / f"{kind}-{point}-{call}".replace(" ", "-").replace(":", "")
    folder.mkdir()
    (folder / "work.json").write_text(json.dumps(work))
    killed = run(point, call, folder)
    store = ArtifactStore(folder / "store")
    visible = store.current(work["kind"], "tiny") is not None
    ended = run("none", 0, folder)
    done = store.current(work["kind"], "tiny")
    equal = done is not None and same(done.path, whole)
    good = killed == -9 and not visible and ended == 0 and equal
    facts = done.metrics if done else {}
    cells = [
        kind,
        f"{point} ({call})",
        killed,
        "nothing" if not visible else "something",
        facts.get("resumed_from_step", "-"),
        facts.get("steps", "-"),
    ]
    return " | ".join(map(str, ["", *cells, "equal" if equal else "DIFFERENT", ""])).strip(), good


def main() -> int:
    wanted, home = sys.argv[1:] or list(POINTS), Path(tempfile.mkdtemp())
    base = home / "base"
    make_tiny_model(base)
    sft(base, home / "adapter")
    works: dict[str, dict[str, Any]] = {
        "sft": {"kind": "sft", "base": str(base)},
        "dpo": {
            "kind": "dpo",
            "base": str(base),
            "adapter": str(home / "adapter/output"),
            "settings": {"trainer": {"disable_dropout": False}},
        },
        "rl": {"kind": "rl", "base": str(base), "adapter": str(home / "adapter/output")},
        "full": {
            "kind": "sft",
            "base": str(base),
            "lora": {"method": "full"},
            "settings": {"learning_rate": 1e-3},
        },
    }
    print(
        "| what | killed at (which call) | exit | published then | resumed from step | steps"
        " | result |\n|---|---|---:|---|---:|---:|---|"
    )
    fine = True
    for name in wanted:
        whole = home / f"{name}-whole"
        whole.mkdir()
        (whole / "work.json").write_text(json.dumps(works[name]))
        if run("none", 0, whole) != 0:
            raise SystemExit((whole / "log-0.txt").read_text()[-2000:])
        undisturbed = ArtifactStore(whole / "store").need(works[name]["kind"], "tiny").path
        for point, call in POINTS[name]:
            text, good = line(name, point, call, works[name], undisturbed, home)
            fine &= good
            print(text if good else f"{text} <- WRONG", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
