"""Check that the files of a model hold each tensor once, where the index lists it.

transformers reads the files one after the other: of two tensors of one name it keeps the last, and
it ignores an index that lists other tensors than the files hold.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ft_assets.errors import ModelError

# The names that transformers looks for, in its order: one file or its shards.
PLAIN, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDS = "model-*-of-*.safetensors"
SHOWN_NAMES = 12
SHORT = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "bool": "BOOL"}  # of torch's names

Types = dict[str, str]  # the dtype of each tensor of a file, as safetensors writes it


def shown(names: list[str]) -> str:
    """Return the first names in a message, and how many there are."""
    return f"{', '.join(sorted(names)[:SHOWN_NAMES])} ({len(names)} in all)"


def stored_types(where: str, folder: Path) -> Types:
    """Return the dtype of each tensor in the files that transformers reads.

    Empty if the folder has no weight file that is known here. Raises ModelError if a tensor is in
    two files, or if the index and the files differ.
    """
    names, listed = _chosen(where, folder)
    files = {name: _types(folder / name) for name in names}
    stored: Types = {}
    twice: list[str] = []
    for types in files.values():
        twice += stored.keys() & types.keys()
        stored |= types
    if twice:
        _refuse(where, f"{shown(twice)} in two files of {folder}", "each tensor in one file")
    if listed is not None:
        wrong = [name for name, file in listed.items() if name not in files.get(file, {})]
        unlisted = [name for name in stored if name not in listed]
        for what, which in (("not in its file", wrong), ("not in the index", unlisted)):
            if which:
                found = f"index and files of {folder} differ, {what}: {shown(which)}"
                _refuse(where, found, "an index that lists each tensor, in the file that holds it")
    return stored


def _chosen(where: str, folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the files that transformers reads, and the file of each tensor by the index."""
    index, plain = _read_index(where, folder / INDEX), (folder / PLAIN).is_file()
    shards = sorted(path.name for path in folder.glob(SHARDS))
    strays = [name for name in shards if index is None or name not in index.values()]
    if plain and (shards or (index is not None and set(index.values()) != {PLAIN})):
        found = f"{folder} has {PLAIN} and shards ({len(shards)} files, index: {index is not None})"
        _refuse(where, found, "the weights once: one file, or shards with an index")
    if strays:
        _refuse(where, f"the index of {folder} does not list {shown(strays)}", "each shard listed")
    if plain:
        return [PLAIN], index
    if index is not None:
        return sorted(set(index.values())), index
    if (folder / PICKLED).is_file():
        return [PICKLED], None
    index = _read_index(where, folder / PICKLED_INDEX)
    return sorted(set(index.values())) if index else [], index


def _read_index(where: str, path: Path) -> Mapping[str, str] | None:
    """Return the file of each tensor, None without an index. Raises ModelError."""
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A path would leave the folder.
        readable = all(Path(file).name == file for file in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        readable, listed = False, {}
    lacking = sorted({file for file in listed.values() if not (path.parent / file).is_file()})
    if not readable or not listed:
        _refuse(where, f"{path} cannot be read", "weight_map: the file of each tensor")
    if lacking:
        _refuse(where, f"{path} lists files that are not there: {shown(lacking)}", "each shard")
    return listed


def _types(path: Path) -> Types:
    """Return the dtype of each tensor of a file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    import torch

    read = torch.load(path, map_location="meta", weights_only=True)
    return {
        name: re.sub("[a-z]+", lambda word: SHORT.get(word[0], word[0]), str(value.dtype)[6:])
        for name, value in read.items()
        if isinstance(value, torch.Tensor)
    }


def _refuse(where: str, found: str, expected: str) -> None:
    raise ModelError(where=where, found=found, expected=expected, fix="get the base again, whole")
