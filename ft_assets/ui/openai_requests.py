"""Requests of OpenAI clients in the form that transformers' server takes.

A field that the server would pass over is refused if it changes the answer, and left out if not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_assets.models.chat_template import reads

Body = dict[str, Any]
MAX_NEW_TOKENS = 1024  # transformers' own default
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
# The values with which a field changes nothing. transformers ignores the field with any value.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),  # transformers would apply another formula
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
}
TAKEN = {
    CHAT: "messages tools max_completion_tokens chat_template_kwargs",
    COMPLETION: "prompt suffix",
}
BOTH = "model stream max_tokens temperature top_p seed stop logit_bias generation_config"
POSITIVE = ("max_tokens", "max_completion_tokens")


class Refused(ValueError):
    """A request that cannot be answered as it asks; `field` is the field that is at fault."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.field = field


@dataclass(frozen=True)
class Served:
    """The released model as its server sees it: the generation settings and the chat template."""

    generation: Body = field(default_factory=dict)
    template: str = ""

    @classmethod
    def of(cls, folder: Path) -> "Served":
        """Return what the files of a model say. Missing files mean no settings."""
        generation, template = folder / "generation_config.json", folder / "chat_template.jinja"
        return cls(
            json.loads(generation.read_text()) if generation.exists() else {},
            template.read_text() if template.exists() else "",
        )

    def body(self, path: str, body: Body) -> Body:
        """Return a request's body with only the fields that the server honours.

        Raises Refused.
        """
        if path not in TAKEN:
            return body
        body = {name: value for name, value in body.items() if value is not None}
        for name, values in HARMLESS.items():
            if name in body and body[name] not in values:
                raise Refused(
                    f"{name} {json.dumps(body[name])[:80]} is not supported by this server; "
                    "remove the field",
                    name,
                )
        for name in POSITIVE:
            if name in body and not (type(body[name]) is int and body[name] > 0):
                raise Refused(f"{name} must be a whole number above 0", name)
        if path == CHAT:
            _require_messages(body)
            self._settle_tools(body)
        else:
            body["prompt"] = _prompt(body)
        self._settle_sampling(body)
        taken = f"{TAKEN[path]} {BOTH}".split()
        return {name: value for name, value in body.items() if name in taken}

    def _settle_tools(self, body: Body) -> None:
        """Leave out tools that must not be called. Raises Refused if the template has none."""
        if not body.get("tools") or body.get("tool_choice") == "none":
            body.pop("tools", None)
        elif not reads(self.template, "tools"):
            raise Refused("the chat template of this model takes no tools; remove tools", "tools")

    def _settle_sampling(self, body: Body) -> None:
        """Turn sampling on for a temperature or a top_p: the model's own setting is greedy."""
        for name, most in (("temperature", 2), ("top_p", 1)):
            value = body.get(name, 0)
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise Refused(f"{name} must be a number from 0 to {most}", name)
        sampled = body.get("temperature", 1) > 0 and ("temperature" in body or "top_p" in body)
        if not sampled:
            body.pop("temperature", None)
            body.pop("top_p", None)
        if "generation_config" not in body:
            own = {"max_new_tokens": MAX_NEW_TOKENS, **self.generation, "do_sample": sampled}
            body["generation_config"] = json.dumps(own)


def _require_messages(body: Body) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list of at least one message", "messages")
    for index, turn in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise Refused(f"{where} must be an object with a role", where)
        content = turn.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise Refused(f"{where}: the model reads text only", where)
        if content is not None and not isinstance(content, str | list):
            raise Refused(f"{where}: content must be text or a list of parts", where)
        turn.pop("tool_calls", None) if not turn.get("tool_calls") else _require_calls(turn, where)
        if turn["role"] == "developer":  # OpenAI's newer name; templates know system
            turn["role"] = "system"


def _require_calls(turn: Body, where: str) -> None:
    try:
        for call in turn["tool_calls"]:
            arguments = call["function"]["arguments"]
            if not isinstance(json.loads(arguments), dict):
                raise ValueError
    except (TypeError, KeyError, ValueError):
        raise Refused(
            f"{where}: each call needs a function with a name and arguments, the JSON text of an "
            "object",
            where,
        ) from None


def _prompt(body: Body) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise Refused("prompt must be one text; send several prompts one by one", "prompt")
    return prompt
