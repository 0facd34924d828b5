"""Read the JSON documents of an artifact into their models."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ft_assets.errors import ArtifactError

Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, model: type[Document], fix: str) -> Document:
    """Parse a JSON file. Raises ArtifactError, with `fix` as the advice, if that fails."""
    return parse_document(str(path), model, _read(path, fix), fix)


def read_lines(path: Path, model: type[Document], fix: str) -> list[Document]:
    """Parse a JSON Lines file. Raises ArtifactError, with `fix` as the advice, if that fails."""
    lines = _read(path, fix).splitlines()
    return [parse_document(str(path), model, line, fix) for line in lines]


def _read(path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _unusable(str(path), "is missing", fix) from None
    except OSError as error:
        raise _unusable(str(path), f"cannot be read ({error.strerror})", fix) from None


def parse_document(where: str, model: type[Document], text: bytes | str, fix: str) -> Document:
    """Parse the text of a JSON file at `where`. Raises ArtifactError if that fails."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        detail = f"{key}: {first['msg']}" if key else first["msg"]
        found = f"is damaged or was written by another version of ft_assets ({detail})"
        raise _unusable(where, found, fix) from None


def _unusable(where: str, found: str, fix: str) -> ArtifactError:
    expected = "the file as this version of ft_assets writes it"
    return ArtifactError(where=where, found=found, expected=expected, fix=fix)
