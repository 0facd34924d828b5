"""Step: write the champion's serving formats, and measure how far each agrees with the champion."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ft_assets.data.tables import read_table
from ft_assets.errors import FtError
from ft_assets.export.export_report import Agreement, ExportedFormat, ExportReport
from ft_assets.hardware import free_unused
from ft_assets.job import Job, Report, Step, StepResult, StepSettings
from ft_assets.step_runner import main, takes

if TYPE_CHECKING:
    from ft_assets.export.formats import ServingFacts, Source
    from ft_assets.export.readers import Expected, Found
    from ft_assets.rows.types import Message

DEFAULT = "gguf-q8_0"


class Settings(StepSettings):
    """`forms`: the formats; None for the default one, if the champion's architecture allows it.

    name: the partition. base, revision: the name of the base for the reader of an adapter: its hub
    id and commit, or a folder and None.
    """

    STEP: ClassVar = Step("export", gpu=True)

    forms: Sequence[str] | None
    smoke_rows: int
    max_new_tokens: int
    name: str
    license: str | None
    llama_cpp: str | None
    base: str
    revision: str | None


@takes(Settings)
def step(job: Job, settings: Settings, report: Report) -> StepResult:
    from ft_assets.export import readers
    from ft_assets.export.formats import ServingFacts, Source
    from ft_assets.export.gguf import why_not

    merged = job.inputs["champion"]
    formats = settings.forms
    skipped = None
    if formats is None:
        skipped = None if settings.llama_cpp else why_not(merged)
        formats = [] if skipped else [DEFAULT]
    rows = read_table(job.inputs["heldout_split"] / "heldout.parquet")
    rows.sort(key=lambda row: row["id"])
    prompts = [row["messages"][:-1] for row in rows[: settings.smoke_rows]]
    expected: list[Expected] = []
    dtype = None
    if formats:
        expected, dtype = readers.by_merged(merged, prompts, settings.max_new_tokens)
        free_unused()
    export = Export(
        source=Source(merged, job.inputs["base_model"], job.inputs.get("champion_adapter")),
        facts=ServingFacts(
            name=settings.name,
            license=settings.license,
            llama_cpp=Path(settings.llama_cpp) if settings.llama_cpp else None,
            base=settings.base,
            revision=settings.revision,
        ),
        prompts=prompts,
        expected=expected,
        max_new_tokens=settings.max_new_tokens,
        output=job.output,
        report=report,
    )
    document = ExportReport(
        prompts=len(prompts),
        tokens=sum(len(one.ids) for one in expected),
        logits_dtype=dtype,
        formats=[export.make(name) for name in formats],
        skipped=skipped,
    )
    document.write(job.output)
    return StepResult(_metrics(document))


@dataclass(frozen=True)
class Export:
    """The shared part of all formats: the models, the prompts and the merged model's answers."""

    source: Source
    facts: ServingFacts
    prompts: list[list[Message]]
    expected: list[Expected]
    max_new_tokens: int
    output: Path
    report: Report

    def make(self, name: str) -> ExportedFormat:
        """Write a format and read it back.

        An error belongs to this format, or to one reader of it; the other formats are made.
        """
        from ft_assets.export import readers
        from ft_assets.export.formats import make_format

        folder = self.output / name
        try:
            written = make_format(name, self.source, folder, self.facts, self.prompts)
            file = folder / written.file if written.file else None
            carried = readers.carried_over(file, self.source.merged) if file else {}
        except Exception as error:  # torch, CUDA, the gguf package and the disk raise anything
            shutil.rmtree(folder, ignore_errors=True)
            self.report("refused", form=name)
            return ExportedFormat(format=name, refused=_reason(error))
        shares, failed = self._read_back(self._readers(name, folder, file))
        numbers = {f"top-1 {reader}": share.top1 for reader, share in shares.items()}
        self.report("exported", form=name, **numbers)
        gguf: dict[str, Any] = {}
        if written.gguf is not None:
            gguf = {"tensors": written.gguf.tensors, "file": written.file}
        return ExportedFormat(
            format=name,
            refused=None,
            agreement=shares,
            failed=failed,
            carried_over=carried,
            bytes=written.bytes,
            writer=written.writer,
            notes=written.notes,
            serve=written.serve,
            **gguf,
        )

    def _readers(
        self, name: str, folder: Path, file: Path | None
    ) -> dict[str, Callable[[], Found | None]]:
        from ft_assets.export import readers

        given = (self.prompts, self.expected, self.max_new_tokens)
        if file is not None:
            return {
                "transformers": lambda: readers.by_transformers_gguf(file, *given),
                "llama.cpp": lambda: readers.by_llama_cpp(file, *given),
            }
        if name == "adapter":
            return {"peft": lambda: readers.by_adapter(self.source.base, folder, *given)}
        return {"transformers": lambda: readers.by_transformers(folder, *given)}

    def _read_back(
        self, by_reader: dict[str, Callable[[], Found | None]]
    ) -> tuple[dict[str, Agreement], dict[str, str]]:
        """Return the agreement of each reader, and the error of each that failed."""
        from ft_assets.export.readers import agreement

        shares = dict[str, Agreement]()
        failed = dict[str, str]()
        for reader, read in by_reader.items():
            try:
                if (found := read()) is not None:
                    shares[reader] = agreement(self.expected, found)
            except Exception as error:  # out of memory, an architecture that the reader lacks
                failed[reader] = _reason(error)
            free_unused()
        return shares, failed


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, FtError):
        return ";".join(lines)
    return f"{type(error).__name__}: {lines[0][:200]}"


def _metrics(document: ExportReport) -> dict[str, str | int | float | None]:
    """Return the manifest's metrics: names, reasons, and the smallest share of each format."""
    refused = [f"{entry.format}: {entry.refused}" for entry in document.formats if entry.refused]
    failed = [
        f"{entry.format} by {reader}: {reason}"
        for entry in document.written
        for reader, reason in entry.failed.items()
    ]
    shares: dict[str, str | int | float | None] = {}
    for entry in document.written:
        if found := entry.agreement.values():
            shares[f"{entry.format}_top1"] = min(share.top1 for share in found)
            shares[f"{entry.format}_greedy"] = min(share.greedy for share in found)
    return {
        "forms": ", ".join(entry.format for entry in document.written) or "none",
        "refused": "; ".join(refused) or document.skipped,
        "not_read": "; ".join(failed) or None,
        "asked": document.prompts,
        **shares,
    }


if __name__ == "__main__":
    main(step)
