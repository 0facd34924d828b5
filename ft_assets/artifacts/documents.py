"""Read the JSON documents of an artifact into their models."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ft_assets.errors import ArtifactError

Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, model: type[Document], fix: str) -> Document:
    """Parse a JSON file. Raises ArtifactError, with `fix` as the advice, if that fails."""
    return _parse(path, model, _read(path, fix), fix)


def read_lines(path: Path, model: type[Document], fix: str) -> list[Document]:
    """Parse a JSON Lines file. Raises ArtifactError, with `fix` as the advice, if that fails."""
    return [_parse(path, model, line, fix) for line in _read(path, fix).splitlines()]


def _read(path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _unusable(path, "is missing", fix) from None


def _parse(path: Path, model: type[Document], text: bytes, fix: str) -> Document:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        detail = f"{key}: {first['msg']}" if key else first["msg"]
        found = f"is damaged or was written by another version of ft_assets ({detail})"
        raise _unusable(path, found, fix) from None


def _unusable(path: Path, found: str, fix: str) -> ArtifactError:
    expected = "the file as this version of ft_assets writes it"
    return ArtifactError(where=str(path), found=found, expected=expected, fix=fix)
