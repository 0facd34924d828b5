"""Join the messages of trees, as Open Assistant publishes them, into conversations or rankings.

A row of such a table is one message with the id of its parent, or a whole tree with `replies`. All
messages are in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ft_assets.data.raw_row import RawRow
from ft_assets.rows.messages import ROLES
from ft_assets.rows.types import RawFields

KEYS = frozenset(("message_id", "parent_id", "text", "role"))
UNRANKED = 10**9


@dataclass(frozen=True)
class _Message:
    """A message of a tree."""

    where: str
    value: RawFields

    @property
    def id(self) -> str:
        return str(self.value["message_id"])

    @property
    def role(self) -> str:
        return ROLES.get(str(self.value["role"]).lower(), str(self.value["role"]))

    @property
    def rank(self) -> float:
        rank = self.value.get("rank")
        return rank if isinstance(rank, int | float) else UNRANKED


def join_threads(
    rows: Iterable[RawRow], kind: Literal["conversations", "rankings"]
) -> Iterator[RawRow]:
    """Yield the rows, and at the end the threads of the rows that are messages of trees.

    `conversations`: a thread from a first message to each last answer, the best ranked first. Each
    answer is trained in one thread and is context in the others. `rankings`: the ranked answers to
    each message. A message without an answer is counted apart, as `unanswered`.
    """
    messages: list[_Message] = []
    for row in rows:
        found = _messages(row)
        messages += found
        if not found:
            yield row
    if messages:
        trees = _Trees(messages)
        yield from trees.threads() if kind == "conversations" else trees.rankings()


def _messages(row: RawRow) -> list[_Message]:
    value = row.value or {}
    root = value.get("prompt")
    if isinstance(root, dict) and isinstance(root.get("replies"), list):
        return list(_flat(row.where, root, None, value.get("message_tree_id")))
    return [_Message(row.where, value)] if value.keys() >= KEYS else []


def _flat(where: str, node: RawFields, parent: Any, tree: Any) -> Iterator[_Message]:
    own = {key: part for key, part in node.items() if key != "replies"}
    given = {"message_id": f"{where}:{id(node)}", "role": None, "text": None, **own}
    yield _Message(where, {**given, "parent_id": parent, "message_tree_id": tree})
    for reply in node.get("replies") or []:
        if isinstance(reply, dict):
            yield from _flat(where, reply, given["message_id"], tree)


class _Trees:
    """Messages with their replies, the best ranked first."""

    def __init__(self, messages: list[_Message]) -> None:
        self.messages = messages
        known = {message.id for message in messages}
        self.replies: dict[str | None, list[_Message]] = {}
        for message in messages:
            parent = message.value["parent_id"]
            key = None if parent is None or str(parent) not in known else str(parent)
            self.replies.setdefault(key, []).append(message)
        for siblings in self.replies.values():
            siblings.sort(key=lambda message: message.rank)  # stable: else the order of the file
        self.used: set[str] = set()

    def threads(self) -> Iterator[RawRow]:
        trained: set[str] = set()
        for path in self._paths():
            turns = [
                {**_turn(message), **({"train": False} if message.id in trained else {})}
                for message in path
            ]
            trained.update(message.id for message in path if message.role == "assistant")
            yield RawRow(path[-1].where, {"messages": turns, **_group(path[0])})
        for message in self.messages:
            if message.id not in self.used:
                yield RawRow(message.where, None, "is a message without an answer", "unanswered")

    def rankings(self) -> Iterator[RawRow]:
        for path in self._paths(every=True):
            answers = [
                reply
                for reply in self.replies.get(path[-1].id, [])
                if reply.role == "assistant" and reply.rank != UNRANKED
            ]
            if len(answers) > 1:
                ranking = {
                    "messages": list(map(_turn, path)),
                    "responses": [str(answer.value["text"]) for answer in answers],
                    "ranks": [answer.rank for answer in answers],
                }
                yield RawRow(path[-1].where, {**ranking, **_group(path[0])})

    def _paths(self, every: bool = False) -> Iterator[list[_Message]]:
        """Yield the path to each answer that no answer follows, or to every user's message."""
        open_paths = [[root] for root in reversed(self.replies.get(None, []))]
        while open_paths:
            path = open_paths.pop()
            last = path[-1]
            replies = self.replies.get(last.id, [])
            goes_on = any(self._leads_to_answer(reply) for reply in replies)
            if last.role == "user" if every else last.role == "assistant" and not goes_on:
                self.used.update(message.id for message in path)
                yield path
            open_paths += [[*path, reply] for reply in reversed(replies)]

    def _leads_to_answer(self, message: _Message) -> bool:
        stack = [message]  # trees can be deep
        while stack:
            last = stack.pop()
            if last.role == "assistant":
                return True
            stack += self.replies.get(last.id, [])
        return False


def _turn(message: _Message) -> RawFields:
    return {"role": message.role, "content": message.value["text"]}


def _group(root: _Message) -> RawFields:
    """Return the group of a tree: its threads stay on one side of the split."""
    tree = root.value.get("message_tree_id")
    return {"group": str(root.id if tree is None else tree)}
