"""Read the JSON files of a base model's folder, and look at the head of a GGUF file.

transformers ends with errors of its own for each kind of damage. Here the file is named.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_assets.errors import ModelError

GGUF_MAGIC = b"GGUF"
# Files that transformers and PEFT write, and that must be JSON objects.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "*.safetensors.index.json",
)
SMALL = 1 << 20  # bytes; a tokenizer.json is larger, and is read where it is needed


def read_json_object(where: str, path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError that names the file."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise _unusable(where, path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise _unusable(
            where, path, f"is not UTF-8 text: byte {error.start} is {bad:#04x}"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise _unusable(where, path, f"is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise _unusable(where, path, f"holds {_named(found)} instead of an object")
    return found


def require_json(where: str, folder: Path, largest: int | None = SMALL) -> None:
    """Raise ModelError for the first damaged JSON file of a model, up to `largest` bytes."""
    for path in _json_files(folder):
        if largest is None or path.stat().st_size <= largest:
            found = read_json_object(where, path)
            if path.name == "config.json":
                _require_sections(where, path, found)


def require_gguf(where: str, path: Path) -> None:
    """Raise ModelError unless a file begins as a GGUF file does."""
    with path.open("rb") as file:
        head = file.read(len(GGUF_MAGIC))
    if head != GGUF_MAGIC:
        found = f"begins with {head!r}" if head else "is empty"
        raise ModelError(
            where=where,
            found=f"{path} is not a GGUF file: it {found}",
            expected="a file that begins with GGUF",
            fix="get the file again: a download may have stopped, or may be an error page",
        )


def _json_files(folder: Path) -> Iterator[Path]:
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)


def _require_sections(where: str, path: Path, config: dict[str, Any]) -> None:
    """Raise ModelError for a part of config.json that is read as an object, and is none."""
    for key in ("text_config", "quantization_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise _unusable(where, path, f"holds {_named(config[key])} as {key}")


def _named(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "a bool", type(None): "null"}
    return names.get(type(value), "a number")


def _unusable(where: str, path: Path, found: str) -> ModelError:
    return ModelError(
        where=where,
        found=f"{path} {found}",
        expected="the file as it was saved with the model",
        fix="get the file again from the model's source",
    )
