"""`data:` of finetune.yaml: the files, the rows that are held out, the rows that are filtered."""

import hashlib
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ft_assets.config.section import OptionalShare, Section, Share
from ft_assets.errors import nearest
from ft_assets.rows.row_formats import CONVERSATION_FORMATS, PREFERENCE_FORMATS
from ft_assets.rows.turn_keys import READ


class StratifySettings(Section):
    """Held-out shares by the value of a field.

    The side of a row depends on its own hash alone, so a stratum can only have its own share.
    """

    field: str = Field(description="A field of the train rows, e.g. category.")
    shares: dict[str, float] = Field(
        default={},
        description="Held-out share of some values: {rare: 0.5}; others: data.heldout_share.",
    )


FILES = (
    *("train", "rehearsal", "text", "preferences", "heldout", "retention", "few_shot"),
    *("contamination", "production", "rehearsal_prompts"),
)  # keys that name files, or assets of other people
ASSET = "asset://"  # before the key of an asset whose table is read


def _asset_as_path(entry: Any) -> Any:
    """Return `{asset: analytics/tickets}` as the path asset://analytics/tickets."""
    if not isinstance(entry, dict) or "asset" not in entry:
        return entry
    key, others = entry["asset"], {name: entry[name] for name in entry if name != "asset"}
    parts = key.split("/") if isinstance(key, str) else [""]
    if not all(parts) or any(part in (".", "..") for part in parts) or "path" in others:
        raise ValueError(f"{{asset: {key}}} is not the key of an asset, e.g. analytics/tickets")
    return {"path": ASSET + key, **others} if others else ASSET + key


class Source(Section):
    """An entry of data.train or data.rehearsal: a path, and how much of its rows is trained."""

    path: str = Field(description="A file, folder, glob or URL, as the entry alone would be.")
    weight: OptionalShare = Field(
        default=None,
        ge=0,
        le=100,
        description="Share of its rows that is trained. 2.5: each row twice, half of them again.",
    )
    rows: int | None = Field(
        default=None, ge=1, description="The number of its rows that is trained, at most."
    )
    seed: int | None = Field(
        default=None, description="Chooses other rows of a weight or a number of rows. Default: 0."
    )

    @property
    def name(self) -> str:
        """The path as it is stored and shown. A query may sign its URL: a hash stands for it."""
        url, _, query = self.path.partition("?")
        if "://" not in url or not query:
            return self.path
        return f"{url}?query-{hashlib.sha256(query.encode()).hexdigest()[:8]}"

    @property
    def mixed(self) -> bool:
        """Whether the entry sets how much of it is trained."""
        return self.weight is not None or self.rows is not None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        """Read an entry that is only a path."""
        if isinstance(value, str):
            return {"path": value}
        if isinstance(value, dict) and len(value) == 1 and "path" not in value:
            (path, weight), *_ = value.items()
            if isinstance(weight, int | float) and path not in cls.model_fields:
                raise ValueError(f"write the entry as {{path: {path}, weight: {weight}}}")
        if not isinstance(value, dict | Source):
            raise ValueError("expected a path, or {path: a.jsonl, weight: 0.5}")
        return value

    @model_validator(mode="after")
    def _one_measure(self) -> "Source":
        if self.weight is not None and self.rows is not None:
            raise ValueError("weight and rows are both set: keep one of them")
        if self.seed is not None and not self.mixed:
            raise ValueError("seed chooses among the rows of a weight or of rows: set one of them")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        found = {key: value for key, value in handler(self).items() if value is not None}
        return found if self.mixed else self.path


MIXED = ("train", "rehearsal")  # keys whose entries can set how much of them is trained
# Sources whose rows need no answer.
UNANSWERED = ("train", "rehearsal", "rehearsal_prompts", "text", "production")
RowSource = Literal[
    "train",
    "rehearsal",
    "rehearsal_prompts",
    "text",
    "preferences",
    "heldout",
    "retention",
    "few_shot",
    "production",
]


class DataSettings(Section):
    train: list[Source] = Field(
        description="Files or globs of conversations, relative to finetune.yaml. An entry is a "
        "path, or {path: …, weight: 0.5} or {path: …, rows: 500}: how much of it is trained."
    )
    rehearsal: list[Source] = Field(
        default=[],
        description="General conversations trained beside the task; never held out. `self`: the "
        "base's own answers to general prompts. Entries as in data.train.",
    )
    rehearsal_self: bool = Field(
        default=False,
        description="Train the base's own answers to general prompts; `rehearsal: self` sets it.",
    )
    rehearsal_prompts: list[str] = Field(
        default=[],
        description="Files of the prompts that the base answers for `rehearsal: self`; none: "
        "prompts that ft_assets has.",
    )
    rehearsal_max_new_tokens: int = Field(
        default=256,
        ge=1,
        description="Longest answer of the base to such a prompt, in tokens; a longer one is left "
        "out.",
    )
    text: list[str] = Field(
        default=[],
        description="Documents for continued pretraining before SFT: .txt, .md, or tables with a "
        "column `text`; none: no such stage.",
    )
    preferences: list[str] = Field(
        default=[], description="Files of prompt/chosen/rejected triples; none: no DPO."
    )
    heldout: list[str] = Field(
        default=[], description="A fixed held-out file that looks like production traffic."
    )
    retention: list[str] = Field(
        default=[], description="General prompts the model must not get worse at."
    )
    few_shot: list[str] = Field(
        default=[], description="Examples for the prompted base, the rival of the fine-tune."
    )
    few_shot_auto: bool = Field(
        default=False,
        description="Choose the examples from the training rows; `few_shot: auto` sets it.",
    )
    few_shot_system: str | None = Field(
        default=None, description="System prompt of the prompted base."
    )
    heldout_share: Share = Field(
        default=0.1, gt=0, lt=0.9, description="Held-out share when no file is given."
    )
    validation_share: Share = Field(
        default=0.05,
        ge=0,
        lt=0.9,
        description="Share of the train rows (and of the pairs, where it makes 8 or more) that is "
        "validation: measured each epoch and never trained on, it shows overfitting.",
    )
    heldout_slice: int = Field(
        default=0,
        ge=0,
        description="Which slice of the hash range is held out. 1, 2, … hold out rows that no "
        "slice before has, for when the rows of this one were used for many verdicts.",
    )
    split_salt: str = Field(
        default="", description="Changes which rows are held out; change it only deliberately."
    )
    columns: dict[RowSource, dict[str, str]] = Field(
        default={},
        description="Names of columns that are not recognised: "
        "{train: {prompt: text, completion: category}}.",
    )
    ignored: list[str] = Field(
        default=[],
        description="Text columns that are left out on purpose: no check warns of them.",
    )
    format: dict[RowSource, str] = Field(
        default={},
        description="Formats of rows, by source: {train: alpaca, rehearsal: text}. Default: the "
        "keys of each row decide.",
    )
    transcript: dict[Literal["user", "assistant", "system", "tool"], str] = Field(
        default={},
        description="Marks of conversations that are one text: "
        '{user: "### Human:", assistant: "### Assistant:"}.',
    )
    ignore_turn_keys: list[str] = Field(
        default=[], description="Keys of a turn that are not needed, e.g. [emotion]."
    )
    min_agreement: Share = Field(
        default=0.5,
        ge=0.5,
        le=1,
        description="Share of the annotators of a pair, more than half, who must prefer the same "
        "answer; else the pair is left out.",
    )
    encoding: str | dict[str, str] | None = Field(
        default=None,
        description="Of text files that are not UTF-8, e.g. latin-1, or by file: "
        "{old/*.csv: cp1252}. A file that is UTF-8 is read as UTF-8 whatever it says.",
    )
    exclude: list[str] = Field(
        default=[],
        description="Rows that are left out of training: ids, or files with an id in each line.",
    )
    near_duplicate: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Jaccard similarity from which a trained prompt is a copy of a held-out one "
        "and is filtered; a short prompt is a copy if one word differs; null: both off.",
    )
    quoted: float | None = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the 13-word runs of a held-out prompt or answer from which a trained "
        "text quotes it and is filtered; a short one must stand in it as a whole; null: off.",
    )
    max_left_out: Share = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of the rows of a source that repeat held-out rows and are left out, "
        "above which the graph stops.",
    )
    contamination: list[str] = Field(
        default=[], description="Your evaluation files: trained rows must not be in them."
    )
    production: list[str] = Field(
        default=[],
        description="A sample of real prompts, with or without answers: held-out rows are compared "
        "with it. It is never trained on.",
    )
    max_production_auc: float = Field(
        default=0.65,
        ge=0.5,
        le=1,
        description="AUC of a classifier that tells production from held-out prompts, above which "
        "heldout_looks_like_production fails; 0.5: no difference.",
    )
    production_shift: Literal["warn", "stop"] = Field(
        default="warn",
        description="What heldout_looks_like_production does when it fails; stop: before training.",
    )
    stratify: StratifySettings | None = Field(
        default=None, description="A field whose values are held out by their own shares."
    )
    max_invalid: Share = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of rejected rows of a source above which the graph stops, e.g. 1%.",
    )

    max_echoed: Share = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the rows of a source whose answer stands in its own prompt, above "
        "which the graph stops. 1: the task is to copy.",
    )

    def paths(self, key: str) -> list[str]:
        """Return the paths of a key that names files."""
        return [one.path if isinstance(one, Source) else one for one in getattr(self, key)]

    def sources(self, key: str) -> list[Source]:
        """Return the entries of a key of MIXED; the base's own answers are one, `self`."""
        own = [Source(path="self")] if self.rehearsal_self else self.rehearsal
        return self.train if key == "train" else own

    def mixing(self) -> list[Any]:
        """Return the entries that set how much of them is trained, as plain data with their key."""
        return [
            [key, {**one.model_dump(mode="json"), "path": one.name}]
            for key in MIXED
            for one in self.sources(key)
            if one.mixed
        ]

    @model_validator(mode="after")
    def _entries_are_distinct(self) -> "DataSettings":
        for key in MIXED:
            paths = self.paths(key)
            twice = next((path for path in paths if paths.count(path) > 1), None)
            if twice and any(one.mixed for one in self.sources(key)):
                raise ValueError(f"{key}: {twice} is there twice; a weight of 2 repeats its rows")
        return self

    @model_validator(mode="after")
    def _slice_exists(self) -> "DataSettings":
        shares = [self.heldout_share, *(self.stratify.shares.values() if self.stratify else ())]
        slices = int(1 / max(shares) + 1e-9)
        if self.heldout_slice >= slices:
            raise ValueError(
                f"heldout_slice: a share of {max(shares)} has {slices} slices, 0 to {slices - 1}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _assets(cls, values: Any) -> Any:
        """Read `train: {asset: analytics/tickets}`, alone or as an entry."""
        if not isinstance(values, dict):
            return values
        changed = dict(values)
        for key in FILES:
            given = values.get(key)
            if isinstance(given, list | dict) and given:
                entries = given if isinstance(given, list) else [given]
                changed[key] = [_asset_as_path(entry) for entry in entries]
        return changed

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        """Read `few_shot: auto` and `rehearsal: self`."""
        for key, word in (("few_shot", "auto"), ("rehearsal", "self")):
            if isinstance(values, dict) and values.get(key) in (word, [word]):
                values = {**values, key: [], f"{key}_{word}": True}
        return values

    @model_validator(mode="after")
    def _rehearsal_is_given_or_made(self) -> "DataSettings":
        if self.rehearsal_self and self.rehearsal:
            raise ValueError("rehearsal names files, and rehearsal_self makes answers: drop one")
        if "self" in self.paths("rehearsal"):
            raise ValueError("rehearsal: self stands alone; drop it or the files")
        given = self.rehearsal_prompts or self.rehearsal_max_new_tokens != 256
        if given and not self.rehearsal_self:
            key = "rehearsal_prompts" if self.rehearsal_prompts else "rehearsal_max_new_tokens"
            raise ValueError(f"{key} is of `rehearsal: self`: set it, or remove {key}")
        return self

    @model_validator(mode="after")
    def _examples_are_named_or_chosen(self) -> "DataSettings":
        if self.few_shot and self.few_shot_auto:
            raise ValueError("few_shot names files, and few_shot_auto chooses rows: drop one")
        return self

    @model_validator(mode="after")
    def _marks_are_distinct(self) -> "DataSettings":
        marks = [mark.strip() for mark in self.transcript.values()]
        if marks and not ({"user", "assistant"} <= set(self.transcript) and all(marks)):
            raise ValueError("transcript: expected a mark of user and one of assistant, not blank")
        if len(set(marks)) < len(marks):
            raise ValueError("transcript: two roles have the same mark; expected distinct marks")
        if read := next((key for key in self.ignore_turn_keys if key in READ), None):
            raise ValueError(f"ignore_turn_keys: {read} is read, so it cannot be ignored")
        return self

    @model_validator(mode="after")
    def _formats_fit(self) -> "DataSettings":
        for key, name in self.format.items():
            formats = PREFERENCE_FORMATS if key == "preferences" else CONVERSATION_FORMATS
            if name not in formats:
                advice = nearest(name, formats, "use one of these")
                raise ValueError(
                    f"format.{key}: {name} is not one of {', '.join(formats)}; {advice}"
                )
            if key == "text" and name != "text":
                raise ValueError(f"format.text: {name} is of conversations; documents are text")
            if not formats[name].has_answer and key not in UNANSWERED:
                raise ValueError(
                    f"format.{key}: {name} has no answer to compare; it is for train and rehearsal"
                )
        return self
