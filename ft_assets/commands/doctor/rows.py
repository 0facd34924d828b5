"""`ft doctor`, the rows: what a run would find in them later, before anything is trained."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ft_assets.assets.raw_rows import read_source
from ft_assets.commands.doctor.base_models import folders
from ft_assets.commands.doctor.check import Check, fail, guarded, ok, warn
from ft_assets.config import Project
from ft_assets.data.boilerplate import common_of
from ft_assets.data.canonical import conversation, preference, prompt
from ft_assets.data.content import CONVERSATIONS, PRODUCTION, PROMPTS
from ft_assets.data.ingest import Ingest, target
from ft_assets.data.leakage import find_copies
from ft_assets.data.left_out import require_few
from ft_assets.data.split import is_heldout
from ft_assets.data.tables import CONVERSATION, PREFERENCE, REJECTED, TableWriter, read_table
from ft_assets.errors import FtError
from ft_assets.evaluation.reachable import Target, unscored
from ft_assets.evaluation.setting_files import read_schema
from ft_assets.models.loading import context_length
from ft_assets.rows.types import ConversationRow

MOST = 20_000  # rows of a source that are read
COMPARED = 5_000  # rows that are compared with the held-out ones
Rows = list[ConversationRow]


def rows(project: Project, keys: list[str]) -> Iterator[Check]:
    """Yield the checks of the rows of these keys of `data`, which name local files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key in keys:
            yield from guarded(f"data.{key}: rows", partial(_source, project, key, folder))
        if not (folder / "conversations.parquet").exists() or "train" not in keys:
            return
        trained = read_table(folder / "conversations.parquet", row=ConversationRow)
        fixed = folder / "heldout.parquet"
        if project.data.heldout and not fixed.exists():
            return  # it cannot be read, which a check has told
        heldout = read_table(fixed, row=ConversationRow) if project.data.heldout else []
        if not project.data.heldout:
            heldout = [row for row in trained if _is_heldout(project, row)]
            own = {row["id"] for row in heldout}
            trained = [row for row in trained if row["id"] not in own]
        yield from guarded("held-out rows", partial(_heldout, project, heldout, trained))
        yield from guarded("left out", partial(_left_out, project, heldout, trained))
        for base in project.base_models:
            yield from guarded(f"{base}: references", partial(_references, project, base, heldout))
            yield from guarded(
                f"{base}: lengths", partial(_lengths, project, base, heldout, trained)
            )


def _source(project: Project, key: str, folder: Path) -> Iterator[Check]:
    """Check the rows of a key as raw_dataset and raw_preferences read them."""
    table = CONVERSATIONS.get(key, key)
    forms = {"preferences": preference, "contamination": target}
    forms |= dict.fromkeys((PRODUCTION, PROMPTS), prompt)
    form: Any = forms.get(key, conversation)
    layout: Any = PREFERENCE if key == "preferences" else CONVERSATION
    with TableWriter(folder / f"{key}.rejected", REJECTED) as rejected:
        ingest = Ingest(folder, folder, rejected)
        done = read_source(project, ingest, key, table, form, layout, MOST)
    name = f"data.{key}: rows"
    looked = f"the first {done.total}" if done.total >= MOST else f"{done.total}"
    found = f"{done.rows} of {looked} can be used"
    found += f", {done.duplicates} are duplicates" if done.duplicates else ""
    if not done.total:
        yield fail(name, "there are none", "put rows into the files")
    elif done.rejected > project.data.max_invalid * done.total:
        yield fail(name, f"{found}; first {done.first[0]}", "correct them, or data.max_invalid")
    elif done.rejected:
        yield warn(name, f"{found}; first {done.first[0]}", "the others are left out")
    else:
        yield ok(name, found)
    if done.unread:
        yield warn(
            f"data.{key}: columns",
            f"not read: {done.unread}",
            "write what the model needs into the prompt; name the others in data.ignored",
        )


def _is_heldout(project: Project, row: ConversationRow) -> bool:
    data = project.data
    shares = data.stratify.shares if data.stratify else {}
    share = shares.get(row.get("stratum", ""), data.heldout_share)
    return is_heldout(row["group"], share, data.split_salt, data.heldout_slice)


def _heldout(project: Project, heldout: Rows, trained: Rows) -> Iterator[Check]:
    groups = len({row["group"] for row in heldout})
    total = len({row["group"] for row in (*heldout, *trained)})
    least = project.gate.min_heldout_rows
    found = f"{groups} groups in {len(heldout)} rows; gate.min_heldout_rows is {least}"
    if groups >= least or len(heldout) + len(trained) >= MOST:
        yield ok("held-out rows", found)
    elif project.data.heldout:
        yield warn("held-out rows", found, "add rows to data.heldout")
    elif total * 0.3 < least:
        yield warn(
            "held-out rows",
            f"{found}; all rows are {total} groups",
            "add rows with other prompts, or name a file in data.heldout",
        )
    else:
        share = min(0.3, 1.2 * least / total)
        yield warn("held-out rows", found, f"set data.heldout_share: {share:.2f}, or add rows")


def _left_out(project: Project, heldout: Rows, trained: Rows) -> Iterator[Check]:
    if not heldout or len(heldout) + len(trained) > COMPARED:
        return
    before: Any = {"conversations": trained}
    after: Any = {"heldout": heldout}
    common = common_of([trained, heldout])  # type: ignore[list-item]
    copies, _ = find_copies(before, after, project.data, common)
    sources = {row["id"]: row["source"] for row in (*trained, *heldout)}
    for copy in copies:
        copy["source"], copy["of_source"] = sources[copy["id"]], sources[copy["of"]]
    counts = {"conversations": len(trained)}
    require_few(copies, counts, project.data, bool(project.data.heldout))
    found = f"{len(copies)} of {len(trained)} training rows repeat a held-out row"
    kinds = Counter(copy["kind"] for copy in copies)
    if copies:
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        yield warn("left out", f"{found} ({listed})", "they are left out of training")
    else:
        yield ok("left out", found)


def _references(project: Project, base: str, heldout: Rows) -> Iterator[Check]:
    """Check that each held-out answer has the best score against itself."""
    settings = project.recipe(base).evaluation
    targets = [
        Target(
            row["id"],
            row["messages"][-1]["content"],
            row["messages"][-1]["content"],
            0,
            tuple(row.get("options", ())),
            tuple(row["messages"][:-1]),
        )
        for row in heldout
        if "tool_calls" not in row["messages"][-1]  # the template decides their text
    ]
    sources = {row["id"]: row["source"] for row in heldout}
    schema = read_schema(project, settings)
    errors = unscored(
        targets, settings, project.gate, schema, lambda ids: {one: sources[one] for one in ids}
    )
    name = f"{base}: references"
    for error in errors:
        yield fail(name, f"{error.where}: {error.found}", f"{error.expected}; {error.fix}")
    if not errors:
        yield ok(name, f"each of {len(targets)} has the best score against itself")


def _lengths(project: Project, base: str, heldout: Rows, trained: Rows) -> Iterator[Check]:
    """Check texts without the template's own tokens: a row that is too long now stays so."""
    name, recipe = f"{base}: lengths", project.recipe(base)
    room = recipe.evaluation.max_new_tokens
    try:
        places = folders(base, project.base_models[base], project)
    except FtError:
        places = []  # the check of its source tells why
    with_config = [one for one in places if (one / "config.json").is_file()]
    context = context_length(with_config[0]) if with_config else None
    most = min(recipe.chat.max_length, context or recipe.chat.max_length)
    texts = {
        "rows": (most, [_text(row) for row in (*heldout, *trained)]),
        "references": (room, [row["messages"][-1]["content"] for row in heldout]),
        "prompts": (
            (context or most) - room,
            ["".join(turn["content"] for turn in row["messages"][:-1]) for row in heldout],
        ),
    }
    # No token is shorter than a byte, so only these can be too long.
    suspects = {
        what: [text for text in given if len(text.encode()) > limit]
        for what, (limit, given) in texts.items()
    }
    if not any(suspects.values()):
        yield ok(name, f"all rows fit {most} tokens, all held-out answers {room}")
        return
    if not any((one / "tokenizer_config.json").is_file() for one in places):
        yield warn(name, "not known before base_model is made", "ft run --asset base_model")
        return
    count = _counter(next(one for one in places if (one / "tokenizer_config.json").is_file()))
    lengths = {what: [count(text) for text in given] for what, given in suspects.items()}
    long = {what: [one for one in lengths[what] if one > texts[what][0]] for what in texts}
    total = len(texts["rows"][1])
    if len(long["rows"]) > recipe.chat.max_truncated * total:
        yield fail(
            name,
            f"{len(long['rows'])} of {total} rows are longer than {most} tokens "
            f"(the longest: {max(long['rows'])})",
            "shorten them, or raise chat.max_length up to the model's context",
        )
    elif long["rows"]:
        yield warn(
            name,
            f"{len(long['rows'])} of {total} rows are longer than {most} tokens",
            "they are left out",
        )
    if long["references"]:
        yield warn(
            name,
            f"{len(long['references'])} of {len(heldout)} held-out answers are longer than "
            f"evaluation.max_new_tokens ({room})",
            f"set evaluation.max_new_tokens: {max(long['references']) + 8}",
        )
    if long["prompts"]:
        yield fail(
            name,
            f"{len(long['prompts'])} held-out prompts leave no room for {room} new tokens in "
            f"{context or most}",
            "shorten them, or lower evaluation.max_new_tokens",
        )
    if not any(long.values()):
        yield ok(name, f"all rows fit {most} tokens, all held-out answers {room}")


def _text(row: ConversationRow) -> str:
    return "".join(turn["content"] for turn in row["messages"])


def _counter(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
