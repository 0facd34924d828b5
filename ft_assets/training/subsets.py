"""Train one recipe on parts of the rows, each once: for the row audit and the learning curve."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.hardware import free_unused
from ft_assets.job import Report
from ft_assets.models.adapter_files import save_groups
from ft_assets.rows.types import TokenizedRow
from ft_assets.training.sft import train_sft

Measured = TypeVar("Measured", bound=BaseModel)


@dataclass(frozen=True)
class SubsetTrainings:
    """What all trainings share. `folder` keeps what a killed step has done.

    `before`: the adapter of documents that SFT continues.
    """

    snapshot: Path
    lora: LoraSettings
    sft: SftSettings
    folder: Path
    report: Report
    memory_limit_gb: float | None = None
    before: Path | None = None

    def measure(
        self,
        name: str,
        rows: Sequence[TokenizedRow],
        how: Callable[[Path], Measured],
        kind: type[Measured],
        seed: int,
    ) -> Measured:
        """Return what `how` measures of the adapter that was trained on the rows.

        A measurement is kept in `folder` by its `name`. The adapter is deleted.
        """
        place = self.folder / name
        file, adapter = place / "measured.json", place / "adapter"
        if file.exists():
            return kind.model_validate_json(file.read_bytes())
        self.report(f"training {name}", rows=len(rows))
        if not adapter.exists():
            self._train(place, rows, seed).rename(adapter)
            free_unused()
        measured = how(adapter)
        free_unused()
        draft = place / "draft.json"
        draft.write_text(measured.model_dump_json())
        draft.rename(file)
        shutil.rmtree(adapter)
        return measured

    def _train(self, place: Path, rows: Sequence[TokenizedRow], seed: int) -> Path:
        output = place / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        train_sft(
            snapshot=self.snapshot,
            rows=rows,
            validation=[],
            lora=self.lora,
            sft=self.sft.model_copy(update={"seed": seed}),
            checkpoints=place / "checkpoints",
            output=output,
            report=self.report,
            memory_limit_gb=self.memory_limit_gb,
            before=self.before,
        )
        save_groups(rows, output, self.before)
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        return output
