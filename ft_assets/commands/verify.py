"""`ft verify`: what of the store is damaged, what depends on it, and how it is healed."""

from pydantic import BaseModel

from ft_assets.artifacts import ArtifactStore
from ft_assets.artifacts.content_hashes import ContentHashes
from ft_assets.commands.store_view import columns, in_bytes
from ft_assets.release.records import label
from ft_assets.release.store_check import Finding, StoreCheck, check_store


class Line(BaseModel, frozen=True):
    """One damaged file or record."""

    asset: str
    partition: str | None
    where: str
    found: str
    expected: str
    used_by: list[str]
    fix: str


class Verified(BaseModel, frozen=True):
    """The outcome of `ft verify`. read_bytes: of the files that were read now."""

    store: str
    versions: int
    files: int
    bytes: int
    read_bytes: int
    seconds: float
    damaged: list[Line]


def verify(store: ArtifactStore, full: bool) -> StoreCheck:
    """Check a store. full: read every file, also those that did not change since they were read."""
    max_age = {"max_age": 0.0} if full else {}
    return check_store(store, ContentHashes(store.kept_hashes, write_every=5.0, **max_age))


def outcome(store: str, check: StoreCheck, seconds: float) -> Verified:
    """Return the outcome as plain data."""
    return Verified(
        store=store,
        versions=len(check.versions),
        files=check.files,
        bytes=check.bytes,
        read_bytes=check.read_bytes,
        seconds=round(seconds, 2),
        damaged=[_line(finding) for finding in check.findings],
    )


def _line(finding: Finding) -> Line:
    return Line(
        asset=finding.asset,
        partition=finding.partition,
        where=finding.damage.path,
        found=finding.damage.found,
        expected=finding.damage.expected,
        used_by=finding.used_by,
        fix=finding.fix,
    )


def table(done: Verified) -> str:
    """Return the outcome as text: one line if all is well."""
    size = f"{done.versions} versions, {done.files} files, {in_bytes(done.bytes)}"
    cost = f"in {done.seconds:.1f} s; {in_bytes(done.read_bytes)} read"
    if not done.damaged:
        rest = ", the rest did not change since it was read" if done.read_bytes < done.bytes else ""
        return f"all is well: {size} {cost}{rest}"
    rows = [
        [label(line.asset, line.partition), line.where, line.found, line.expected]
        for line in done.damaged
    ]
    lines = columns([["damaged", "file", "found", "expected"], *rows])
    advice = dict[str, list[str]]()
    for line in done.damaged:
        used = f"used by {', '.join(line.used_by)}; " if line.used_by else ""
        advice.setdefault(f"{label(line.asset, line.partition)}: {used}{line.fix}", [])
    lines += ["", "to do:", *(f"  {text}" for text in advice)]
    return "\n".join([*lines, "", f"{len(done.damaged)} damaged of {size} {cost}"])
