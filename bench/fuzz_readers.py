"""Fuzz the readers: any bytes are rows or a DataError, any row is canonical or a RowProblem.

    pip install atheris
    python bench/fuzz_readers.py <folder for the corpus> -max_total_time=600

The script first fills an empty folder with small files of each kind. Options after the folder are
libFuzzer's. The first byte of an input chooses the suffix of the file, the second the format of its
rows, and the third the encoding. The rest is the file. With BUILT, the rest instead chooses a JSON
value of known keys and values, because random bytes seldom form one.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import atheris  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit(
        "fuzz_readers.py: atheris is not installed\n  to do:    pip install atheris (it is not a "
        "dependency: Linux and few Pythons only)"
    )

with atheris.instrument_imports(include=["ft_assets.data", "ft_assets.rows"]):
    from ft_assets.data.canonical import conversation, preference
    from ft_assets.data.file_formats import read_rows
    from ft_assets.data.kto import pair_labels
    from ft_assets.errors import DataError
    from ft_assets.rows.values import RowProblem

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

PACKERS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
# This script compresses the inputs named `packed`, so that a mutation reaches their content. The
# others are compressed bytes.
BUILT = "built"
ENDINGS = [
    *[
        (kind, "")
        for kind in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
    ],
    *[(f".jsonl{packed}", "") for packed in PACKERS],
    *[(f".csv{packed}", packed) for packed in PACKERS],
    *[(".jsonl", BUILT)] * 6,
]
KEYS = (
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "ranks",
    "group",
    "tool_calls",
    "function_call",
    "type",
    "text",
    "tools",
    "functions",
    "function",
    "name",
    "arguments",
    "id",
    "tool_call_id",
    "train",
    "weight",
    "label",
    "images",
    "thinking",
)
VALUES = (
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "tool",
    "function",
    "function_call",
    "observation",
    "f",
    "a",
    "hi",
    "",
    " ",
    "{}",
    "[]",
    '{"name": "f", "arguments": {}}',
    '[{"name": "f"}]',
    "\x00",
    "\ud83d",
    "text",
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    10**30,
)
TURNS = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "a", "train": False},
    {
        "role": "assistant",
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "a", "tool_call_id": "a"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    {"from": "observation", "value": "x"},
    {"role": "system", "content": "s"},
)
FORMS = [
    *[
        (conversation, name)
        for name in (None, "messages", "sharegpt", "alpaca", "prompt_completion", "text")
    ],
    *[(preference, name) for name in (None, "preference", "sharegpt_preference", "ranked", "kto")],
]
ENCODINGS = [None, None, None, "latin-1", "utf-16", "gb18030", "utf-8", "shift_jis"]
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz_readers"))


def built_row(given: "atheris.FuzzedDataProvider") -> dict[str, Any]:
    """Return an object of known keys."""
    return {
        KEYS[given.ConsumeIntInRange(0, len(KEYS) - 1)]: built(given, 0)
        for _ in range(given.ConsumeIntInRange(1, 5))
    }


def built(given: "atheris.FuzzedDataProvider", depth: int) -> Any:
    """Return a known JSON value, a list, an object, a conversation of known turns, or any text."""
    kind = given.ConsumeIntInRange(0, 7)
    if kind == 0 and depth < 5:
        return [built(given, depth + 1) for _ in range(given.ConsumeIntInRange(0, 4))]
    if kind == 1 and depth < 5:
        return built_row(given)
    if kind in (2, 3):
        return [
            dict(TURNS[given.ConsumeIntInRange(0, len(TURNS) - 1)])
            for _ in range(given.ConsumeIntInRange(1, 6))
        ]
    if kind == 4:
        return given.ConsumeUnicode(8)
    return VALUES[given.ConsumeIntInRange(0, len(VALUES) - 1)]


def one(data: bytes) -> None:
    """Read one input as a file of rows. Anything but a row or our error is a finding."""
    if len(data) < 3:
        return
    ending, packed = ENDINGS[data[0] % len(ENDINGS)]
    form, name = FORMS[data[1] % len(FORMS)]
    content = data[3:]
    path = FOLDER / f"rows{ending}"
    if packed == BUILT:
        given = atheris.FuzzedDataProvider(content)
        content = "".join(
            json.dumps(built_row(given)) + "\n" for _ in range(given.ConsumeIntInRange(1, 3))
        ).encode()
    path.write_bytes(PACKERS[packed](content) if packed in PACKERS else content)
    try:
        rows = read_rows(path, ENCODINGS[data[2] % len(ENCODINGS)], name)
        for row in pair_labels(rows, name) if form is preference else rows:
            if (row.value is None) != (row.problem is not None):
                raise AssertionError(f"neither a row nor a problem: {row}")
            if row.value is None:
                continue
            try:
                canonical = form(row.value, name)
            except RowProblem as problem:
                str(problem).encode()
                continue
            again = (
                form({key: value for key, value in canonical.items() if key not in ("id", "group")})
                if name != "text"
                else canonical
            )
            if again["id"] != canonical["id"]:
                raise AssertionError(f"another id when read again: {canonical}")
    except DataError as error:
        if str(path) not in str(error) and "data.encoding" not in str(error):
            raise AssertionError(f"names no file: {error}") from error


def seeds() -> list[bytes]:
    """Return an input of each container, shape and spelling."""
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talks = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                user,
                {**answer, "train": False},
                user,
                {**answer, "weight": 1},
            ]
        },
        {
            "messages": [
                user,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "name": "f", "content": "2"},
                answer,
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
        {
            "messages": [
                user,
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "2"},
                answer,
            ],
            "functions": [{"name": "f"}],
            "group": "g",
        },
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "hello"},
            ],
            "tools": '[{"name": "f"}]',
        },
        {
            "instruction": "hi",
            "input": "there",
            "output": "hello",
            "system": "s",
            "history": [["a", "b"]],
        },
        {"prompt": [user], "completion": [answer]},
        {"prompt": "Grüße, 今天", "completion": "\u2028x"},
        {"text": "once"},
    ]
    pairs = [
        {"prompt": "hi", "chosen": "a", "rejected": "b"},
        {"chosen": [user, answer], "rejected": [user, {"role": "assistant", "content": "b"}]},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": "hi", "responses": ["a", "b"], "scores": [0.5, 1]},
        {"prompt": "hi", "completion": "a", "label": True},
        {"messages": [user, answer], "label": False},
    ]
    found = []
    for rows, forms in ((talks, range(6)), (pairs, range(6, 11))):
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        listed = json.dumps(rows, indent=1, ensure_ascii=False)
        flat = [row for row in rows if all(isinstance(value, str) for value in row.values())]
        table = pa.Table.from_pylist(flat)
        files = {".parquet": io.BytesIO(), ".feather": io.BytesIO(), ".arrow": io.BytesIO()}
        pq.write_table(table, files[".parquet"])
        feather.write_feather(table, files[".feather"])
        with pa.ipc.new_stream(files[".arrow"], table.schema) as stream:
            stream.write_table(table)
        csv = (
            'prompt,completion\nhi,hello\n"a ""b""\nc",d\n'
            if rows is talks
            else "prompt,chosen,rejected\nhi,a,b\n"
        ).encode()
        for form in forms:
            for index, (ending, packed) in enumerate(ENDINGS):
                if ending in files:
                    content = files[ending].getvalue()
                elif ending.startswith((".csv", ".tsv")):
                    content = csv.replace(b",", b"\t") if ending == ".tsv" else csv
                else:
                    content = listed.encode() if ending == ".json" else lines
                if packed == BUILT:
                    content = hashlib.sha512(bytes([index, form])).digest()
                inner = f".{ending.split('.')[-1]}"
                found.append(
                    bytes([index, form, 0])
                    + (PACKERS[inner](content) if inner in PACKERS and not packed else content)
                )
            found.append(
                bytes([0, form, 0]) + "\n".join(lines.decode().splitlines()).encode("utf-16")
            )
            found += [bytes([0, form, 0]) + json.dumps(row).encode() for row in rows]
    return found


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number:03}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
