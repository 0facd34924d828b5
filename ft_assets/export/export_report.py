"""The document of an export: export.json as types, and its page for a reader.

The JSON keys are `forms` and `form` for formats. A key that was not set is not written, so that
keys of GGUF files are absent for the other formats.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from ft_assets.artifacts.documents import read_document
from ft_assets.markdown import table

FILE = "export.json"
HEADER = ("format", "size", "top-1", "greedy", "carried over", "serve it")


class Agreement(BaseModel):
    """The agreement of one reader's answers with the merged model's, as shares in [0, 1].

    top1: of the merged model's answer tokens, those that are the format's most likely ones, given
    the tokens before them. greedy: of the greedy answers, those that are equal. A greedy answer
    differs from its first near-tie on.
    """

    model_config = ConfigDict(frozen=True)

    top1: float
    greedy: float


class ExportedFormat(BaseModel):
    """One format of the export. `refused`: why it was not written; None if it was.

    agreement, failed: by reader, its agreement or its error. carried_over: the parts of the model
    that the GGUF file has. tensors: None if llama.cpp wrote the file. serve: shell commands.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    format: str = Field(validation_alias="form", serialization_alias="form")
    refused: str | None
    agreement: dict[str, Agreement] = {}
    failed: dict[str, str] = {}
    carried_over: dict[str, bool] = {}
    tensors: int | None = None
    bytes: int = 0
    writer: str = ""
    notes: list[str] = []
    file: str | None = None
    serve: list[str] = []


class ExportReport(BaseModel):
    """export.json. prompts: the held-out prompts that each format answered. tokens: of the merged
    model's answers. logits_dtype: of the merged model's logits. skipped: why nothing was exported.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    prompts: int = Field(validation_alias="asked", serialization_alias="asked")
    tokens: int
    logits_dtype: str | None = Field(validation_alias="logits_in", serialization_alias="logits_in")
    formats: list[ExportedFormat] = Field(validation_alias="forms", serialization_alias="forms")
    skipped: str | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the document of an export. Raises ArtifactError if it is damaged."""
        return read_document(folder / FILE, cls, "materialize export again")

    def write(self, folder: Path) -> None:
        """Write export.json and the page README.md."""
        data = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        (folder / FILE).write_text(json.dumps(data, indent=1, ensure_ascii=False))
        (folder / "README.md").write_text(self.page(), encoding="utf-8")

    @property
    def written(self) -> list[ExportedFormat]:
        """The formats that were not refused."""
        return [entry for entry in self.formats if entry.refused is None]

    def page(self) -> str:
        """Write the export as a markdown page."""
        notes = [f"- {entry.format}: {note}" for entry in self.formats for note in entry.notes]
        notes += [
            f"- {entry.format}: {reader} did not read it: {reason}"
            for entry in self.formats
            for reader, reason in entry.failed.items()
        ]
        rows = table(HEADER, map(_row, self.formats))
        return "\n".join([self._introduction(), "", rows, "", *notes]) + "\n"

    def _introduction(self) -> str:
        if self.skipped:
            names = "`release.forms` names formats, `release.llama_cpp` a converter."
            return f"Nothing was exported: {self.skipped}. {names}"
        return (
            f"Each format answered {self.prompts} held-out prompts. Top-1: the share of the merged "
            f"model's {self.tokens} answer tokens ({self.logits_dtype}) that are also the format's "
            "most likely ones, except near-ties. Greedy: the share of equal greedy answers, which "
            "differ from the first near-tie on."
        )


def _row(entry: ExportedFormat) -> Sequence[str]:
    if entry.refused is not None:
        return [entry.format, "–", "refused", "–", "–", entry.refused]
    return [
        entry.format,
        f"{entry.bytes / 1e9:.3f} GB",
        ", ".join(f"{reader} {share.top1:.3f}" for reader, share in entry.agreement.items()),
        ", ".join(f"{reader} {share.greedy:.3f}" for reader, share in entry.agreement.items()),
        _carried_over(entry) or "–",
        "<br>".join(f"`{line}`" for line in entry.serve),
    ]


def _carried_over(entry: ExportedFormat) -> str:
    return ", ".join(
        name.replace("_", " ") + ("" if good else " **NOT**")
        for name, good in entry.carried_over.items()
    )
