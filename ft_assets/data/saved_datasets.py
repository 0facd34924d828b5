"""Find the data files of folders that `datasets` wrote with `save_to_disk`.

A saved dataset has its Arrow files beside state.json, which names them. A saved DatasetDict has a
saved dataset for each split beside dataset_dict.json.
"""

import json
import re
from pathlib import Path

from ft_assets.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = (STATE, SPLITS, "dataset_info.json")
# The first word of a file's or folder's name that names a split.
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev|eval|heldout)(?![a-z])", re.IGNORECASE)
_ALIKE = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}


def is_description(path: Path) -> bool:
    """Return True for a file that describes a saved dataset and has no rows."""
    return path.name in DESCRIPTIONS and any(
        (path.parent / name).is_file() for name in (STATE, SPLITS)
    )


def saved_files(folder: Path) -> list[Path] | None:
    """Return the Arrow files of a saved dataset in its order, or None for another folder.

    Raises DataError if one is missing, or if rows were selected and only their indices are saved.
    """
    if not (folder / STATE).is_file():
        return None
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            where=str(folder / STATE),
            found="does not name the files of a dataset",
            expected="a folder as `save_to_disk` writes it",
            fix="save the dataset again, or name the .arrow files",
        ) from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            where=str(folder / STATE),
            found="selects rows by an index file of an old version of `datasets`",
            expected="a folder that holds exactly its rows",
            fix="load it, call flatten_indices(), and save it again",
        )
    if missing := [path for path in files if not path.is_file()]:
        raise DataError(
            where=str(missing[0]),
            found="does not exist",
            expected=f"the {len(files)} files that {STATE} names",
            fix="copy the folder again, whole",
        )
    return files


def splits_of(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the entries of a folder by split: files, and folders of saved datasets.

    A split is the first word of a file's name, or the name of a folder.
    """
    splits: dict[str, set[Path]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        found = next((match for part in parts if (match := _SPLIT.match(part))), None)
        if found:
            split = found.group(1).lower()
            entry = path.parent if (path.parent / STATE).is_file() else path
            splits.setdefault(_ALIKE.get(split, split), set()).add(entry)
    return {split: sorted(splits[split]) for split in sorted(splits)}


def require_one_split(folder: Path, files: list[Path], key: str, pattern: str) -> None:
    """Raise DataError if a folder's files are of several splits: test rows would be trained."""
    splits = splits_of(folder, files)
    if len(splits) < 2:
        return
    name, base = key.removeprefix("data."), pattern.rstrip("/")
    answers = [
        [f"{base}/{entry.relative_to(folder).as_posix()}" for entry in entries]
        for entries in splits.values()
    ]
    raise DataError(
        where=f"finetune.yaml: {key}: {pattern}",
        found="holds several splits: "
        + ", ".join(f"{split} ({len(entries)})" for split, entries in splits.items()),
        expected="the files of one split",
        fix="name the split that this key is for: "
        + ", or ".join(f"data: {{{name}: {json.dumps(answer)}}}" for answer in answers),
    )
