"""The rows of the data tables, as types.

Rows travel as Arrow tables and reach chat templates as dicts, so they are TypedDicts: a check
costs nothing at run time, and a million rows keep their speed. A key that is not required is
absent where it has no value; it is never None. tables.py holds the schema of each table.
Not here: rows of the evaluation report.
"""

from typing import Any, Literal, NotRequired, TypedDict

# The fields of a row of a user's file. Their shape is unknown until row_formats.py and
# messages.py have checked them: a Parquet file also has dates and bytes.
RawFields = dict[str, Any]

# A value that JSON holds: the arguments of a call, the parameters of a tool.
Json = bool | int | float | str | None | list["Json"] | dict[str, "Json"]
JsonObject = dict[str, Json]


class FunctionCall(TypedDict):
    name: str
    arguments: JsonObject


class ToolCall(TypedDict):
    """A call of one function in OpenAI's spelling."""

    id: NotRequired[str]
    type: Literal["function"]
    function: FunctionCall


class ToolFunction(TypedDict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[JsonObject]


class Tool(TypedDict):
    type: Literal["function"]
    function: ToolFunction


class Message(TypedDict):
    """One turn of a conversation: what chat templates call a message.

    `train` is False on an assistant turn that is context only. `reasoned`: the content begins with
    reasoning that the row had apart from it. `tool_call_id` and `name` belong to tool turns. A
    plain text is one message of the role `text`.
    """

    role: str  # system, user, assistant, tool or text
    content: str
    train: NotRequired[bool]
    reasoned: NotRequired[bool]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Conversation(TypedDict):
    """The part of a row that a chat template renders."""

    messages: list[Message]
    tools: NotRequired[list[Tool]]


class DataRow(Conversation):
    """The part that all tables of conversations and preferences share.

    `id` is a hash of the content. Rows of one `group` stay on one side of the split. `stratum` is
    the value of the field that data.stratify names. `digest` is a hash of the stored row.
    """

    id: str
    group: str
    stratum: NotRequired[str]
    digest: NotRequired[str]


class AnsweredRow(DataRow):
    """A conversation whose last turn is an answer. `options`: the answers to choose from."""

    options: NotRequired[list[str]]


class ConversationRow(AnsweredRow):
    """A row of the raw dataset; `source` is the file and the line (or index) it came from."""

    source: str


class Preference(DataRow):
    """A prompt (`messages`) with the preferred and the other answer.

    `reasoned`: an answer begins with reasoning that the row had apart from it.
    """

    chosen: str
    rejected: str
    reasoned: NotRequired[bool]


class PreferenceRow(Preference):
    """A row of the raw preferences; `source` is the file and the line it came from."""

    source: str


class TokenSequence(TypedDict):
    """Token ids and, for each, whether the loss covers it."""

    input_ids: list[int]
    supervised: list[bool]


class TokenizedRow(AnsweredRow, TokenSequence):
    """A conversation in the model's own template.

    `judged`: a whole conversation that ends in an answer. Only such a row can be held out.
    `expected`: the text that answers are compared with, where it is not the last message's.
    `decoded`: the text that the answer's tokens decode to, where it is not the expected one.
    """

    judged: bool
    expected: NotRequired[str]
    decoded: NotRequired[str]


class JudgedRow(TokenizedRow):
    """A held-out or retention row.

    Rows of one `cluster` are not independent: they share a group, or one is nearly the other.
    """

    cluster: str


class PairRow(DataRow):
    """A tokenized preference pair: the ids of the prompt and of both answers, and their texts."""

    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


Outcome = Literal[
    "own", "reference", "alike", "unfinished", "no margin", "repeated", "too long", "leak"
]


PAIRED: tuple[Outcome, ...] = ("own", "reference")  # the outcomes of a row that has a pair


class OwnAnswerRow(TypedDict):
    """One distinct answer that the SFT model sampled to a row (`id`) of a `side` of the split.

    `times`: how many of the row's samples are this text. `stopped`: it ended by itself. `score`:
    by evaluation.metric; `right`: it is accepted. `used` is `chosen` or `rejected` in the row's
    pair, else "". `outcome` is that of the row.
    """

    id: str
    side: str
    prompt: str
    reference: str
    answer: str
    times: int
    tokens: int
    stopped: bool
    score: float
    right: bool
    used: str
    outcome: Outcome


AuditReason = Literal["wrong answer", "contradiction", "outlier", "personal data", "secret"]


class AuditRow(TypedDict):
    """A training row that the audit names, once for each reason.

    `source`: its file and line. `score`: the probability of a wrong answer, the similarity of the
    two prompts, the loss in nats a token, or the number of pieces found. `text` is its question.
    `twin` and `twin_text` are the place and the answer of the row that it contradicts, else "".
    """

    id: str
    source: str
    reason: AuditReason
    score: float
    problem: str
    text: str
    answer: str
    twin: str
    twin_text: str


class MemberRow(TypedDict):
    """The columns that decide the side of a row; `judged` is absent in a table of pairs."""

    id: str
    group: str
    stratum: NotRequired[str]
    judged: NotRequired[bool]


class TextRow(TypedDict):
    """The columns that are compared to find copies; `chosen` and `rejected` only in pairs."""

    id: str
    group: str
    messages: list[Message]
    chosen: NotRequired[str]
    rejected: NotRequired[str]


CopyKind = Literal[
    "same-prompt",
    "same-group",
    "same-chat",
    "near-duplicate",
    "one-word",
    "family",
    "contained",
    "quoted",
    "answer",
    "within",
]


class CopyRow(TypedDict):
    """A row (`id`, on `side`) that repeats a row (`of`, on `of_side`), and how similar they are.

    `source` and `of_source` are their files and lines, `text` and `of_text` the beginnings of their
    questions, all absent for a row that raw_dataset does not have.
    """

    kind: CopyKind
    side: str
    id: str
    source: NotRequired[str]
    of_side: str
    of: str
    of_source: NotRequired[str]
    text: NotRequired[str]
    of_text: NotRequired[str]
    similarity: float


class RejectedRow(TypedDict):
    """A row that is left out: its file and line, the reason, and its text.

    `kind` is the reason's name, absent in a table of an older version: `invalid` in a table of raw
    rows, `template` in one of rendered rows.
    """

    where: str
    problem: str
    row: str
    kind: NotRequired[str]


class LeftOutRow(TypedDict):
    """A row that is left out of training, at any step: what `ft status --left-out` prints.

    `where` and `twin` are the file, the line and the user's own id of a row; `twin` is the held-out
    row that this one repeats, "" if there is none.
    """

    reason: str
    source: str
    where: str
    problem: str
    text: str
    twin: str
    twin_text: str
