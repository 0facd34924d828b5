"""Account for the columns of a row: which are read, and which of two the user has to choose.

A text column that is not read is counted. A column that changes the prompt, or a second column for
the prompt or the answer, is a question: each of its answers is an entry of data.columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from ft_assets.rows.row_formats import (
    COMPLETION,
    CONTEXT,
    CONVERSATION_FORMATS,
    CONVERSATIONS,
    JOINED,
    MEDIA,
    PREFERENCE_FORMATS,
    PROMPT,
    RANKED,
    RANKS,
    SYSTEM,
    THOUGHTS,
    TIES,
    context_column,
    recognise,
)
from ft_assets.rows.types import DataRow, RawFields

# The user's own name of a row is shown where the row is named.
IDS = ("id", "_id", "uuid", "row_id", "example_id", "sample_id", "prompt_id", "question_id")
ALWAYS = frozenset((*IDS, *MEDIA, *THOUGHTS.values(), "tools", "functions", "group"))
# Columns that may hold what an answer is reasoned from.
REASONING = (
    *("reasoning", "reasoning_content", "thinking", "thought", "thoughts"),
    *("cot", "chain_of_thought", "rationale"),
)
CHOICES = ("choices", "options")


@dataclass(frozen=True)
class Question:
    """Columns of which the user has to choose: `answers` are (meaning, entry of data.columns)."""

    found: str
    answers: tuple[tuple[str, dict[str, str]], ...]
    column: str  # the column that is not read


@dataclass(frozen=True)
class Plan:
    """The columns of rows with the same names: read, and unread ones that can matter."""

    read: frozenset[str]
    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()  # columns with the prompt and the answer
    others: tuple[str, ...] = ()  # columns that are not read


@dataclass
class Columns:
    """Accounts for the rows of a source.

    `format` and `renamed` are its entries of data.format and data.columns; `ignored` are the
    columns that the user leaves out.
    """

    pairs: bool = False
    format: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    unread: dict[str, int] = field(default_factory=dict)
    _lost: set[str] = field(default_factory=set)
    _plans: dict[tuple[str, ...], Plan | None] = field(default_factory=dict)
    _last: tuple[RawFields | None, Plan | None] = (None, None)

    def question(self, raw: RawFields) -> Question | None:
        """Return the first question that a row asks, or None. `raw` has our names."""
        plan = self._plan(raw)
        if plan is None:
            return None
        for question in plan.questions:
            if _matters(raw, question.column, plan.texts):
                return question
        return None

    def count(self, raw: RawFields, row: DataRow) -> None:
        """Count the columns of a row whose text is not read. `row` is what was read."""
        plan = self._plan(raw)
        if plan is None or not plan.others:
            return
        texts = _texts(row)
        for name in plan.others:
            value = raw[name]
            said = [one for one in (value if isinstance(value, list) else [value]) if _is_text(one)]
            if said:
                self.unread[name] = self.unread.get(name, 0) + 1
                if name not in self._lost and not all(_stands(one, texts) for one in said):
                    self._lost.add(name)

    def others(self, raw: RawFields) -> tuple[str, ...]:
        """Return the columns of a row that are not empty and not read. `raw` has our names."""
        plan = self._plan(raw)
        return plan.others if plan else ()

    def described(self) -> str:
        """Return the unread text columns with their numbers of rows, e.g. "note (60 rows)"."""
        lost = {name: count for name, count in self.unread.items() if name in self._lost}
        names = sorted(lost, key=lambda name: (-lost[name], name))
        return ", ".join(f"{name} ({lost[name]} rows)" for name in names)

    def _plan(self, raw: RawFields) -> Plan | None:
        """Return the plan of a row, which is asked for twice in a row."""
        if raw is not self._last[0]:
            self._last = (raw, self._plan_of(raw))
        return self._last[1]

    def _plan_of(self, raw: RawFields) -> Plan | None:
        # The columns that are not empty decide which are read.
        names = tuple(name for name, value in raw.items() if value)
        if names not in self._plans:
            plan = self._planned(raw)
            if plan is not None:
                # The answers to choose from: the metric reads them, and the model may not.
                known = (plan.read - {"options"}) | ALWAYS | self.ignored
                others = tuple(name for name in names if name not in known)
                plan = replace(plan, others=others)
            self._plans[names] = plan
        return self._plans[names]

    def _planned(self, raw: RawFields) -> Plan | None:
        if self.format and self.format != "kto":
            formats: Mapping[str, Any] = PREFERENCE_FORMATS if self.pairs else CONVERSATION_FORMATS
            named = formats[self.format]
            return Plan(frozenset((*named.required, *named.optional)))
        read, prompt, answer = _pair(raw) if self.pairs else _conversation(raw)
        if not read:
            return None
        read |= set(SYSTEM)
        questions: list[Question] = []
        if prompt is not None:
            context = context_column(raw, prompt)
            read |= {"history", *([context] if context else [])}
            questions += self._prompts(raw, prompt, read)
            questions += self._contexts(raw, prompt, read)
        if answer is not None:
            questions += self._answers(raw, answer)
        questions += self._conversations(raw, read)
        questions += self._reasoning(raw, read, answer)
        asked = tuple(one for one in questions if one.column not in self.ignored)
        texts = tuple(name for name in (prompt, answer) if name)
        return Plan(frozenset(read), asked, texts)

    def _entry(self, ours: str, name: str) -> dict[str, str]:
        """Return data.columns with one more entry, for a column by our or the user's name."""
        return {**self.renamed, ours: self.renamed.get(name, name)}

    def _prompts(self, raw: RawFields, prompt: str, read: set[str]) -> list[Question]:
        others = [name for name in PROMPT if _has_content(raw, name) and name not in read]
        if prompt in self.renamed:
            return []
        return [
            Question(
                f"has two columns that can be the prompt: {prompt} and {name}",
                (
                    *([self._join(prompt, name)] if name in CONTEXT else []),
                    (f"{prompt} alone", self._entry("prompt", prompt)),
                    (f"{name} alone", self._entry("prompt", name)),
                ),
                name,
            )
            for name in others
        ]

    def _contexts(self, raw: RawFields, prompt: str, read: set[str]) -> list[Question]:
        if prompt in self.renamed and prompt not in JOINED:
            return []
        found: list[Question] = []
        for name in ("context", *CHOICES):
            value = raw.get(name)
            if name in read or not value or not isinstance(value, str | list | dict):
                continue
            is_options = name == "options" and isinstance(value, list)
            if is_options or name in self.renamed:
                continue
            answers = [(f"{prompt} alone", self._entry("prompt", prompt))]
            if isinstance(value, str):
                answers.insert(0, self._join(prompt, name))
            problem = f"has the column {name}, which is not in the prompt ({prompt})"
            found.append(Question(problem, tuple(answers), name))
        return found

    def _join(self, prompt: str, name: str) -> tuple[str, dict[str, str]]:
        """Return the answer by which the text of a column is joined to the prompt."""
        entry = self._entry("instruction", prompt)
        return f"{prompt} with {name}", {**entry, "input": self.renamed.get(name, name)}

    def _answers(self, raw: RawFields, answer: str) -> list[Question]:
        if answer in self.renamed:
            return []
        return [
            Question(
                f"has two columns that can be the answer: {answer} and {name}",
                (
                    (answer, self._entry("completion", answer)),
                    (name, self._entry("completion", name)),
                ),
                name,
            )
            for name in COMPLETION
            if name != answer and _has_content(raw, name)
        ]

    def _reasoning(self, raw: RawFields, read: set[str], answer: str | None) -> list[Question]:
        """Ask whether a column is the reasoning before the answer, which changes what is learnt."""
        sides = ("chosen", "rejected") if self.pairs else ("",)
        ours = answer or next((name for name in (*CONVERSATIONS, "chosen") if name in read), None)
        if ours is None or ours in self.renamed or not THOUGHTS.keys().isdisjoint(self.renamed):
            return []
        found: dict[str, str] = {}
        for side in sides:
            names = [
                name
                for word in REASONING
                for name in ([f"{side}_{word}", f"{word}_{side}"] if side else [word])
            ]
            name = next((name for name in names if isinstance(raw.get(name), str)), None)
            if name is not None and name not in read and _has_content(raw, name):
                found[f"{side}_reasoning" if side else "reasoning"] = name
        entry = dict(self.renamed)
        for key, name in found.items():
            entry[key] = self.renamed.get(name, name)
        return [
            Question(
                f"has the column {name}, which can be the reasoning before the answer ({ours})",
                (
                    (f"reasoning before {ours}", entry),
                    (
                        f"{ours} alone",
                        self._entry(
                            "messages"
                            if ours in CONVERSATIONS
                            else "chosen"
                            if self.pairs
                            else "completion",
                            ours,
                        ),
                    ),
                ),
                name,
            )
            for name in list(found.values())[:1]
        ]

    def _conversations(self, raw: RawFields, read: set[str]) -> list[Question]:
        lists = [name for name in CONVERSATIONS if isinstance(raw.get(name), list) and raw[name]]
        if len(lists) < 2 or lists[0] not in read or lists[0] in self.renamed:
            return []
        return [
            Question(
                f"has two columns that can be the conversation: {lists[0]} and {name}",
                (
                    (lists[0], self._entry("messages", lists[0])),
                    (name, self._entry("messages", name)),
                ),
                name,
            )
            for name in lists[1:]
            if raw[name] != raw[lists[0]]
        ]


def _conversation(raw: RawFields) -> tuple[set[str], str | None, str | None]:
    """Return the columns that are read, with that of the prompt and that of the answer if any."""
    recognised = recognise(raw)
    if recognised is None:
        return set(), None, None
    _, keys = recognised
    prompt, answer = keys if len(keys) == 2 else (None, None)
    return set(keys), prompt, answer


def _pair(raw: RawFields) -> tuple[set[str], str | None, str | None]:
    ranked = None if "chosen" in raw else next((name for name in RANKED if name in raw), None)
    read = {"chosen", "rejected", *TIES}
    if ranked:
        read = {ranked, *(name for name in RANKS if name in raw)}
    turns = next((name for name in CONVERSATIONS if isinstance(raw.get(name), list)), None)
    is_whole = isinstance(raw.get("chosen"), list) and len(raw["chosen"]) > 1
    if turns or is_whole:
        return read | ({turns} if turns else set()), None, None
    prompt = next((name for name in PROMPT if _has_content(raw, name)), None)
    return read | ({prompt} if prompt else set()), prompt, None


def _has_content(raw: RawFields, name: str) -> bool:
    value = raw.get(name)
    return bool(value.strip() if isinstance(value, str) else isinstance(value, list) and value)


def _texts(row: DataRow) -> list[str]:
    fields = cast(Mapping[str, Any], row)
    answers = [fields[name] for name in ("chosen", "rejected") if name in fields]
    return [*(turn["content"] for turn in row["messages"]), *answers]


def _is_text(value: Any) -> bool:
    """Return True for a text that is no number: a table of texts has numbers too."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not value.strip().lstrip("-").replace(".", "", 1).isdecimal()


def _stands(value: str, texts: list[str]) -> bool:
    """Return True if a text is read in another column, or holds all that is, as a rendered row."""
    text = value.strip()
    return any(text in one for one in texts) or all(one.strip() in text for one in texts)


def _matters(raw: RawFields, name: str, texts: tuple[str, ...]) -> bool:
    """Return True unless a column says nothing new beside the texts that are read.

    It says nothing new if its texts stand in them, or if it holds all of them, as a rendered row.
    """
    known = [raw[one] for one in texts if isinstance(raw.get(one), str)]
    value = raw[name]
    parts = value.values() if isinstance(value, dict) else value
    said = [value] if isinstance(value, str) else [part for part in parts if isinstance(part, str)]
    if said and all(any(one.strip() in text for text in known) for one in said):
        return False
    if not isinstance(value, str) or not known:
        return True
    return not (value.rstrip().endswith(known[-1].strip()) or all(text in value for text in known))
