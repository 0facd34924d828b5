"""Hash the content of the data files that finetune.yaml names. The content decides the rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ft_assets.artifacts import file_sha256
from ft_assets.config import Project
from ft_assets.data.data_files import resolve_files

CONVERSATIONS = {  # key of data: table
    "train": "conversations",
    "rehearsal": "rehearsal",
    "heldout": "heldout",
    "retention": "retention",
    "few_shot": "few_shot",
    "contamination": "contamination",
}
PRODUCTION = "production"  # a key of data, and its table, which only projects with the key have
PROMPTS = "rehearsal_prompts"  # the same: prompts that each base answers
TEXT = "text"  # a key of data with documents, which only projects with the key have
KEYS = (*CONVERSATIONS, PRODUCTION, PROMPTS, TEXT, "preferences")  # of data that name files
# {key of data: its files, each with the hash of its content}
Hashes = dict[str, list[tuple[str, str]]]
Sha256 = Callable[[Path], str]  # of a file's content


def data_content(project: Project, keys: Sequence[str], sha256: Sha256 = file_sha256) -> Hashes:
    """Return the files of each key of `data`, with the hashes of their content."""
    return {
        key: [
            (file_name(project, path), sha256(path))
            for path in resolve_files(project.root, project.data.paths(key), f"data.{key}")
        ]
        for key in keys
    }


def file_name(project: Project, path: Path) -> str:
    """Return the name of a file in messages: relative to finetune.yaml where it is below it."""
    inside = path.is_relative_to(project.root)
    return str(path.relative_to(project.root) if inside else path)
