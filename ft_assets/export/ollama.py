"""The Ollama Modelfile of a GGUF file, with the model's chat template as a Go template where that is proven equal.

Ollama executes no Jinja: it looks whether the file's `tokenizer.chat_template` resembles one of its own Go templates (edit
distance below 100), and takes that one or, without a match, none at all (its template/template.go and server/model.go).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.rows.types import Message

Messages = Sequence[Message]
Write = Callable[
    [Messages, bool], str
]  # messages, whether the generation prompt follows -> text. Raises ProofFailed
SYSTEM: Message = {"role": "system", "content": "ft first text"}
USER: Message = {"role": "user", "content": "ft second text"}
ANSWER: Message = {"role": "assistant", "content": "ft third text"}
AGAIN: Message = {"role": "user", "content": "ft fourth text"}
PROBES = ([USER], [SYSTEM, USER], [USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN])


@dataclass(frozen=True)
class Pieces:
    """A chat template as constant texts: what begins a conversation without a system turn, what stands around each role's
    content, what asks for the answer."""

    head: str
    around: Mapping[str, tuple[str, str]]
    prompt: str

    def render(self, messages: Messages) -> str:
        """Return what Ollama writes by `go_template`: it joins turns of one role that follow each other by an empty line."""
        turns: list[tuple[str, str]] = []
        for message in messages:
            if turns and turns[-1][0] == message["role"]:
                turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n\n{message['content']}")
            else:
                turns.append((message["role"], message["content"]))
        text = "" if any(role == "system" and content for role, content in turns) else self.head
        for role, content in turns:
            if role in self.around:
                text += content.join(self.around[role])
        return text + self.prompt

    def go_template(self) -> str:
        """Return the Go template, on one line; texts are string constants, so that nothing in them is an action or is trimmed."""
        branches = [
            f'{{{{ {"if" if index == 0 else "else if"} eq .Role "{role}" }}}}{_text(before)}{{{{ .Content }}}}{_text(after)}'
            for index, (role, (before, after)) in enumerate(self.around.items())
        ]
        head = f"{{{{ if not .System }}}}{_text(self.head)}{{{{ end }}}}" if self.head else ""
        return f"{head}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{_text(self.prompt)}"


def _text(text: str) -> str:
    return (
        f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
    )  # JSON's escapes are Go's


def pieces_of(write: Write, asked: Sequence[Messages]) -> Pieces | str:
    """Return the pieces of a template, which write the same as it does for every probe and every conversation of `asked`; else
    the reason why there are none."""
    try:
        found = _taken_apart(write)
        for messages in (*PROBES, *asked):
            if found is None or found.render(messages) != write(messages, True):
                return "is not constant text around each turn's content"
    except ProofFailed as problem:
        return f"cannot be taken apart ({problem})"
    return found or "is not constant text around each turn's content"


def _taken_apart(write: Write) -> Pieces | None:
    """Return the pieces as far as the probes tell: contents are searched in what is written, the texts between divided."""
    whole, one, two = (
        write([USER, ANSWER, AGAIN], False),
        write([USER], False),
        write([USER, ANSWER], False),
    )
    first, headed = (
        _between(whole, USER, ANSWER, AGAIN),
        _between(write([SYSTEM, USER], False), SYSTEM, USER),
    )
    if (
        first is None
        or headed is None
        or USER["content"] not in one
        or ANSWER["content"] not in two
    ):
        return None
    after_user, after_answer = (
        one.partition(USER["content"])[2],
        two.partition(ANSWER["content"])[2],
    )
    before_user = first[2].removeprefix(after_answer)
    around = {
        "system": (headed[0], headed[1].removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (first[1].removeprefix(after_user), after_answer),
    }
    return Pieces(first[0].removesuffix(before_user), around, write([USER], True).removeprefix(one))


def _between(text: str, *turns: Message) -> list[str] | None:
    """Return what stands before, between and after the turns' contents; None if one is not there."""
    parts = []
    for turn in turns:
        before, found, text = text.partition(turn["content"])
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def modelfile(
    gguf: str, folder: Path, asked: Sequence[Messages], adds_bos: bool | None
) -> tuple[str, str | None]:
    """Return (the Modelfile of a model folder's GGUF file, why it holds no TEMPLATE or None).

    adds_bos: whether llama.cpp, which tokenizes for Ollama, puts BOS before every text of this file; None: it does not say.
    """
    tokenizer, stops = load_tokenizer(folder), stop_ids(folder)
    renderer, bos = Renderer(tokenizer, stops), tokenizer.bos_token
    found: Pieces | str

    def write(messages: Messages, prompt: bool) -> str:
        text = renderer.text(messages, generation_prompt=prompt)
        if adds_bos and not text.startswith(bos):
            raise ProofFailed("the file adds BOS to a text, the template writes none")
        return text.removeprefix(bos) if adds_bos else text

    if adds_bos is None and bos is not None:
        found = "cannot be compared: the GGUF file does not say whether BOS is added to it"
    else:
        found = pieces_of(write, asked)
    lines = [f"FROM ./{gguf}"]
    if isinstance(found, Pieces):
        lines += [
            f"# The chat template: on {len(asked)} held-out prompts its texts are those of the proven Jinja template."
        ]
        lines += [f'TEMPLATE """{found.go_template()}"""']
    else:
        lines += [
            f"# No TEMPLATE: the model's chat template {found}.".replace("\n", " "),
            "# Ollama does not execute the Jinja template in the GGUF file: it takes one of its own that resembles it, or none.",
            f"# For the template that was proven: llama-server -m {gguf} --jinja",
        ]
    # Ollama takes a quoted value as it stands between the quotes, without escapes.
    lines += [
        "PARAMETER temperature 0",
        *(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in sorted(stops)),
        "",
    ]
    return "\n".join(lines), None if isinstance(found, Pieces) else found
