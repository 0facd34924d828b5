"""Write the Ollama Modelfile of a GGUF file.

It has the model's chat template as a Go template if that is proven equal. Ollama does not execute
Jinja: if the file's `tokenizer.chat_template` resembles one of its own Go templates (edit distance
below 100) it takes that one, else none (its template/template.go and server/model.go).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.rows.types import Message

Messages = Sequence[Message]
# (messages, with the generation prompt?) -> text. Raises ProofFailed.
Write = Callable[[Messages, bool], str]
SYSTEM: Message = {"role": "system", "content": "ft first text"}
USER: Message = {"role": "user", "content": "ft second text"}
ANSWER: Message = {"role": "assistant", "content": "ft third text"}
AGAIN: Message = {"role": "user", "content": "ft fourth text"}
PROBES = ([USER], [SYSTEM, USER], [USER, ANSWER, AGAIN], [SYSTEM, USER, ANSWER, AGAIN])
NOT_CONSTANT = "is not constant text around the content of each turn"


@dataclass(frozen=True)
class Pieces:
    """A chat template as constant texts.

    head: the beginning of a conversation without a system turn. around: the texts before and after
    the content, by role. prompt: the generation prompt.
    """

    head: str
    around: Mapping[str, tuple[str, str]]
    prompt: str

    def render(self, messages: Messages) -> str:
        """Render messages as Ollama does by `go_template`.

        It joins consecutive turns of one role by an empty line.
        """
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
        """Write the Go template on one line.

        Texts are string constants, so that they are never trimmed or executed as actions.
        """
        branches = ""
        for role, (before, after) in self.around.items():
            word = "else if" if branches else "if"
            condition = f'{{{{ {word} eq .Role "{role}" }}}}'
            branches += f"{condition}{_constant(before)}{{{{ .Content }}}}{_constant(after)}"
        head = f"{{{{ if not .System }}}}{_constant(self.head)}{{{{ end }}}}" if self.head else ""
        turns = f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}"
        return f"{head}{turns}{_constant(self.prompt)}"


def _constant(text: str) -> str:
    """Write a text as a Go string constant; Go has JSON's escapes."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def pieces_of(write: Write, prompts: Sequence[Messages]) -> Pieces | str:
    """Split a template into its constant pieces, or return the reason why that is not possible.

    The pieces render every probe and every conversation of `prompts` as the template does.
    """
    try:
        pieces = _split(write)
        for messages in (*PROBES, *prompts):
            if pieces is None or pieces.render(messages) != write(messages, True):
                return NOT_CONSTANT
    except ProofFailed as problem:
        return f"cannot be split into constant texts ({problem})"
    return pieces or NOT_CONSTANT


def _split(write: Write) -> Pieces | None:
    """Find the probes' contents in rendered conversations, and take the texts between them."""
    whole = write([USER, ANSWER, AGAIN], False)
    one = write([USER], False)
    two = write([USER, ANSWER], False)
    texts = _between(whole, USER, ANSWER, AGAIN)
    headed = _between(write([SYSTEM, USER], False), SYSTEM, USER)
    if texts is None or headed is None:
        return None
    if USER["content"] not in one or ANSWER["content"] not in two:
        return None
    after_user = one.partition(USER["content"])[2]
    after_answer = two.partition(ANSWER["content"])[2]
    before_user = texts[2].removeprefix(after_answer)
    around = {
        "system": (headed[0], headed[1].removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (texts[1].removeprefix(after_user), after_answer),
    }
    prompt = write([USER], True).removeprefix(one)
    return Pieces(texts[0].removesuffix(before_user), around, prompt)


def _between(text: str, *turns: Message) -> list[str] | None:
    """Return the texts before, between and after the turns' contents; None if one is missing."""
    parts = []
    for turn in turns:
        before, found, text = text.partition(turn["content"])
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def modelfile(
    gguf: str, folder: Path, prompts: Sequence[Messages], adds_bos: bool | None
) -> tuple[str, str | None]:
    """Write the Modelfile of a GGUF file made from a model folder.

    Returns the text, and the reason why it does not have a TEMPLATE, or None. adds_bos: True if
    llama.cpp, which tokenizes for Ollama, puts BOS before every text; None if the file has no such
    key.
    """
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(folder)
    renderer = Renderer(tokenizer, stops)
    bos = tokenizer.bos_token

    def write(messages: Messages, prompt: bool) -> str:
        text = renderer.text(messages, generation_prompt=prompt)
        if adds_bos and not text.startswith(bos):
            raise ProofFailed("the file adds BOS to a text, the template does not")
        return text.removeprefix(bos) if adds_bos else text

    if adds_bos is None and bos is not None:
        pieces = "cannot be compared: the GGUF file does not have the key for BOS before a text"
    else:
        pieces = pieces_of(write, prompts)
    stop_lines = [
        f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in sorted(stops)
    ]
    # Ollama takes the text between the quotes unchanged: it has no escapes.
    lines = [
        f"FROM ./{gguf}",
        *_template_lines(pieces, gguf, len(prompts)),
        "PARAMETER temperature 0",
        *stop_lines,
        "",
    ]
    return "\n".join(lines), None if isinstance(pieces, Pieces) else pieces


def _template_lines(pieces: Pieces | str, gguf: str, prompts: int) -> list[str]:
    if isinstance(pieces, Pieces):
        return [
            f"# This template renders {prompts} held-out prompts as the proven Jinja template.",
            f'TEMPLATE """{pieces.go_template()}"""',
        ]
    return [
        f"# No TEMPLATE: the model's chat template {pieces}.".replace("\n", " "),
        "# Ollama does not execute the Jinja template in the GGUF file: it takes one of its own "
        "that resembles it, or none.",
        f"# For the template that was proven: llama-server -m {gguf} --jinja",
    ]
