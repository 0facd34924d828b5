"""Where the rows of each table are, and what became of them: what `ft rows` and its page show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ft_assets.config import Project
from ft_assets.data.content import PRODUCTION, PROMPTS
from ft_assets.data.documents import DOCUMENTS

LEFT_OUT = "left out"


@dataclass(frozen=True)
class Place:
    """Where the rows of a table are: a file of an asset, and what became of them.

    sides: {file of the asset `split`: the side's name}. copies: the side by which its copies name
    these rows. rendered: the asset that has their tokens, in the files `tokens`. fixed: the side of
    all rows of a table that is not split. only_if: whether a project has the table.
    """

    asset: str
    file: str
    sides: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    split: str = "heldout_split"
    rendered: str = "chat_dataset"
    fixed: str = ""
    only_if: Callable[[Project], object] = lambda project: True

    @property
    def assets(self) -> set[str]:
        """The assets that are read to show a row."""
        return {self.asset, self.split, self.rendered}


def _raw(table: str, *copies: str, **sides: str) -> Place:
    asset = "raw_preferences" if table == "preferences" else "raw_dataset"
    return Place(asset, table, sides, copies or (table,), (table,))


def _own(project: Project) -> bool:
    return project.data.rehearsal_self


def _sampled(file: str, side: str) -> Place:
    return Place(
        "sampled_preferences",
        file,
        tokens=(file,),
        rendered="sampled_preferences",
        fixed=side,
        only_if=Project.samples,
    )


PLACES = {
    "conversations": _raw(
        *("conversations", "conversations", "train", "validation"),
        train="train",
        validation="validation",
        heldout="held-out",
    ),
    "rehearsal": _raw("rehearsal", train="train"),
    "own_rehearsal": Place(
        *("own_rehearsal", "rehearsal", {"train": "train"}, ("rehearsal",), ("rehearsal",)),
        only_if=_own,
    ),
    "heldout": _raw("heldout", heldout="held-out"),
    "retention": _raw("retention", retention="general prompts"),
    "few_shot": Place("raw_dataset", "few_shot", fixed="examples of the prompt"),
    "contamination": Place("raw_dataset", "contamination", fixed="never trained"),
    PRODUCTION: Place("raw_dataset", PRODUCTION, fixed="a sample of production"),
    PROMPTS: Place("raw_dataset", PROMPTS, fixed="prompts that the base answers"),
    "documents": Place(
        *("raw_text", DOCUMENTS, {"train": "train", "validation": "validation"}, (DOCUMENTS,)),
        tokens=("train", "validation"),
        split="text_dataset",
        rendered="text_dataset",
        only_if=lambda project: project.data.text,
    ),
    "preferences": _raw("preferences", preferences="train", preferences_validation="validation"),
    "sampled_pairs": _sampled("preferences", "train"),
    "sampled_validation_pairs": _sampled("preferences_validation", "validation"),
    "sampled_answers": Place("sampled_preferences", "info/answers", only_if=Project.samples),
    "invalid": Place("raw_dataset", "info/rejected", fixed=LEFT_OUT),
    "invalid_pairs": Place("raw_preferences", "info/rejected", fixed=LEFT_OUT),
    "invalid_documents": Place(
        "raw_text", "info/rejected", fixed=LEFT_OUT, only_if=lambda project: project.data.text
    ),
    "unused_answers": Place("own_rehearsal", "info/rejected", fixed=LEFT_OUT, only_if=_own),
}
TABLES = tuple(PLACES)
SIDE_NAMES = (
    *dict.fromkeys(name for place in PLACES.values() for name in place.sides.values()),
    LEFT_OUT,
)
