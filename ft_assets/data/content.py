"""The content of the data files that finetune.yaml names: their hashes, which decide the rows."""

from collections.abc import Sequence

from ft_assets.artifacts import file_sha256
from ft_assets.config import Project
from ft_assets.data.file_formats import resolve_files

CONVERSATIONS = {  # key of data: table
    "train": "conversations",
    "rehearsal": "rehearsal",
    "heldout": "heldout",
    "retention": "retention",
    "few_shot": "few_shot",
    "contamination": "contamination",
}


Hashes = dict[
    str, list[tuple[str, str]]
]  # {key of data: its files, each with the hash of its content}


def data_content(project: Project, keys: Sequence[str]) -> Hashes:
    """Return, for each key of `data`, its files with their hashes: what decides the rows."""
    settings = project.data.model_dump()
    return {
        key: [
            (
                str(path.relative_to(project.root) if path.is_relative_to(project.root) else path),
                file_sha256(path),
            )
            for path in resolve_files(project.root, settings[key], f"data.{key}")
        ]
        for key in keys
    }
