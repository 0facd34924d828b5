"""`ft init --from NAME`: a ready project, as files of the package."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import ft_assets
from ft_assets.config import CONFIG_NAME, load_project
from ft_assets.errors import ConfigError, nearest

PACKAGE = Path(ft_assets.__file__).parent
EXAMPLES = PACKAGE / "examples"
TASK = ("conversations", "general", "retention", "few_shot")  # the files of the demo's task


@dataclass(frozen=True)
class Ready:
    """A ready project.

    `task`: the files of the demo's task that it reads, without ending. `yours`: what it lacks.
    """

    about: str
    task: tuple[str, ...] = ()
    yours: str = ""


READY = {
    "demo": Ready("the demo: SmolLM2-135M, SFT and DPO, on a CPU", (*TASK, "preferences")),
    "llama-8b-24gb": Ready("Llama-3.1-8B on alpaca-cleaned, one card of 24 GB"),
    "llama-70b-2x80gb": Ready(
        "QLoRA of Llama-3.3-70B, two cards of 80 GB", yours="data/train.jsonl"
    ),
    "qwen3-no-thinking": Ready("Qwen3-0.6B with thinking off", TASK),
    "kto-thumbs": Ready("KTO from thumbs, the demo's model", TASK[:3]),
}


def write_ready(name: str, folder: Path) -> list[Path]:
    """Copy a ready project into `folder`. Returns its files, finetune.yaml first.

    Raises ConfigError for a name that is not known and for a file that is there.
    """
    if name not in READY:
        raise ConfigError(
            where=f"--from {name}",
            found="is not a ready project",
            expected=f"one of {', '.join(READY)}",
            fix=nearest(name, READY, "choose one"),
        )
    files = files_of(name)
    there = [target for target in files if (folder / target).exists()]
    if there:
        raise ConfigError(
            where=str(folder / there[0]),
            found="is there already",
            expected="a folder without it: nothing is overwritten",
            fix="give another --dir",
        )
    for target, source in files.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / target)
    load_project(folder / CONFIG_NAME)
    return [folder / target for target in files]


def files_of(name: str) -> dict[Path, Path]:
    """Return {path in the project: file of the package}, finetune.yaml first."""
    own = _demo() if name == "demo" else EXAMPLES / name
    found = {Path(CONFIG_NAME): own / CONFIG_NAME}
    data = sorted((own / "data").glob("*.jsonl")) if name != "demo" else []
    shared = [_demo() / "data" / f"{file}.jsonl" for file in READY[name].task]
    return found | {Path("data") / file.name: file for file in (*data, *shared)}


def _demo() -> Path:
    """Return the folder of the demo: in the wheel, or the root of a checkout."""
    packaged = EXAMPLES / "demo"
    return packaged if packaged.is_dir() else PACKAGE.parent


def describe(name: str, files: list[Path]) -> str:
    """Return the text that `ft init --from` prints."""
    ready = READY[name]
    first = f"put your rows into {ready.yours}, then " if ready.yours else ""
    return "\n".join(
        [
            ready.about,
            *(f"wrote {file}" for file in files),
            f"next: {first}ft doctor, then ft plan, then ft run",
        ]
    )
