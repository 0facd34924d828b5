"""Find the setting of a chat template that proves a row which the template's default does not."""

from collections.abc import Callable
from typing import Any

from ft_assets.chat.row_proofs import ProofFailed, SettingMayHelp
from ft_assets.chat.thinking import split
from ft_assets.models.chat_template import bake, switches
from ft_assets.rows.types import Conversation

Proves = Callable[[str, Conversation], bool]  # (another template, row)
_Shape = tuple[tuple[tuple[str, bool, bool], ...], bool]


class Advice:
    """Tries the switches of a template, once for each sequence of roles."""

    def __init__(self, template: str, proves: Proves) -> None:
        self._template = template
        self._proves = proves
        self._found: dict[_Shape, dict[str, Any] | None] = {}

    def of(self, row: Conversation, problem: SettingMayHelp) -> ProofFailed:
        """Return the problem with the setting that helps, or with what else to do."""
        turns = tuple(
            (turn["role"], split(turn) is not None, "tool_calls" in turn)
            for turn in row["messages"]
        )
        shape = (turns, bool(row.get("tools")))
        if shape not in self._found:
            self._found[shape] = self._setting(row, any(thinks for _, thinks, _ in turns))
        setting = self._found[shape]
        if setting is None:
            return ProofFailed(f"{problem}: {problem.otherwise}")
        ((name, value),) = setting.items()
        value = str(value).lower()  # as YAML writes a bool
        return ProofFailed(f"{problem}: set chat.template_kwargs: {{{name}: {value}}}")

    def _setting(self, row: Conversation, thinking: bool) -> dict[str, Any] | None:
        tried = switches(self._template, thinking)
        return next(
            (one for one in tried if self._proves(bake(self._template, one, "template"), row)), None
        )
