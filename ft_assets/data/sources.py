"""The files that finetune.yaml names: local ones, and remote ones as local copies.

Remote: s3://, gs://, http(s)://, hf://datasets/owner/name@revision/path, file://; all but http(s) also with globs. A copy
lies in the cache under its URL and the checksum (or version, or date) that its server names, so that an unchanged file
is not fetched again and a changed one never takes the place of one that is being read. Copies can be deleted at any
time. Credentials come from the environment, as each store's own client finds them; never from finetune.yaml.
"""

import glob
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ft_assets.artifacts import file_sha256
from ft_assets.data.file_types import DATA, suffixes
from ft_assets.errors import DataError, InfrastructureFault, SourceUnreachable, is_transient

CREDENTIALS = {  # of the protocols that are read: where the credentials come from
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for another store than Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "http": "(none: give a URL that is signed or public)",
    "https": "(none: give a URL that is signed or public)",
    "file": "(the file's own permissions)",
}
# What servers name a version of a file by, the strictest first; a date only with the size.
VERSIONS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "blob_id")
DATES = ("Last-Modified", "LastModified", "mtime", "updated")


def resolve_files(
    root: Path, patterns: list[str], key: str, cache: Path | None = None
) -> list[Path]:
    """Return the files that patterns (files, folders, globs, URLs) name, sorted. Raises DataError for one that matches nothing,
    SourceUnreachable for a server that does not answer.

    Remote files are fetched into `cache`, by default .ft/downloads. A folder means the data files in it; texts (.txt) need
    a glob.
    """
    files: set[Path] = set()
    for pattern in patterns:
        where = f"finetune.yaml: {key}: {shown(pattern)}"
        if "://" in pattern:
            files.update(_fetched(pattern, where, cache or root / ".ft" / "downloads"))
            continue
        found: list[Path] = []
        for match in map(Path, glob.glob(str(root / pattern), recursive=True)):
            if match.is_file():
                found.append(match)
            elif match.is_dir():
                found += [
                    path
                    for path in match.rglob("*")
                    if path.is_file() and suffixes(path)[0] in DATA
                ]
        if not found:
            raise DataError(
                where=where,
                found=f"no data file matches below {root}",
                expected="an existing file, folder or glob",
                fix="correct the path; it is relative to finetune.yaml",
            )
        files.update(found)
    return sorted(files)


def shown(url: str) -> str:
    """Return a URL without what may be a secret in it: user, password, query."""
    if "://" not in url:
        return url
    protocol, _, rest = url.partition("://")
    if protocol not in ("http", "https"):
        return f"{protocol}://{rest.rpartition('@')[2] if '@' in rest.partition('/')[0] else rest}"
    host, slash, path = rest.partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def _fetched(url: str, where: str, cache: Path) -> list[Path]:
    """Return the local copies of the files that a URL names."""
    protocol = _checked(url, where)
    try:
        files = _file_system(protocol)
        copies = [
            _copy(files, name, info, protocol, where, cache)
            for name, info in _matches(files, url, protocol)
        ]
    except (DataError, InfrastructureFault):
        raise
    # Each store's client has errors of its own, without a common root; what they mean is told by _problem.
    except Exception as error:
        raise _problem(error, protocol, where) from error
    if not copies:
        raise DataError(
            where=where,
            found="no data file matches",
            expected="an existing file, folder or glob",
            fix="correct the URL",
        )
    return copies


def _checked(url: str, where: str) -> str:
    protocol, _, rest = url.partition("://")
    if protocol not in CREDENTIALS:
        raise DataError(
            where=where,
            found=f"{protocol}:// is not read",
            expected=f"one of {', '.join(f'{name}://' for name in CREDENTIALS)}",
            fix="correct the URL",
        )
    if "@" in rest.partition("/")[0]:
        raise DataError(
            where=where,
            found="holds a user or a password",
            expected="credentials in the environment",
            fix=f"set {CREDENTIALS[protocol]}",
        )
    if protocol == "hf":
        parts = rest.split("/")
        if (
            len(parts) < 4
            or parts[0] != "datasets"
            or "@" not in parts[2]
            or parts[2].endswith("@")
        ):
            # Without a revision the same finetune.yaml would mean other data tomorrow.
            raise DataError(
                where=where,
                found="names no revision",
                expected="hf://datasets/owner/name@revision/path",
                fix="add @ and a commit or a tag after the name",
            )
    if protocol in ("http", "https") and glob.has_magic(urlsplit(url).path):
        raise DataError(
            where=where,
            found="is a glob",
            expected="the URL of one file: HTTP has no folders",
            fix="name each file",
        )
    return protocol


def _file_system(protocol: str) -> Any:
    import fsspec

    # Listings are not cached: a sensor asks again and again whether files changed.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp

        # No limit to the whole, which a large file would reach; one to each silence.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
            "trust_env": True,
        }
    return fsspec.filesystem(protocol, **options)


def _matches(files: Any, url: str, protocol: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, what the server says of it) of each file that a URL names."""
    name = url if protocol in ("http", "https") else files._strip_protocol(url)
    is_glob = protocol not in ("http", "https") and glob.has_magic(name)
    for match in sorted(files.glob(name)) if is_glob else [name]:
        info = files.info(match)
        if info.get("type") != "directory":
            yield match, info
            continue
        for inner, inner_info in sorted(files.find(match, detail=True).items()):
            if suffixes(Path(inner))[0] in DATA:
                yield inner, inner_info


def _copy(
    files: Any, name: str, info: dict[str, Any], protocol: str, where: str, cache: Path
) -> Path:
    """Return the local copy of a file; it is fetched unless the cache has this version."""
    version, size = _version(info), info.get("size")
    own = (
        PurePosixPath(unquote(urlsplit(name).path) if protocol in ("http", "https") else name).name
        or "data"
    )
    address = hashlib.sha256(f"{protocol}://{name}".encode()).hexdigest()[:16]
    target = _target(cache, address, version, own) if version else None
    if target and target.is_file() and size in (None, target.stat().st_size):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f".part-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        files.get_file(name, str(part))
        fetched = part.stat().st_size
        if size is not None and fetched != size:
            raise SourceUnreachable(where, f"{own}: {fetched} of {size} bytes came", "try again")
        if version and _version(files.info(name)) != version:
            raise DataError(
                where=where,
                found=f"{own}: changed while it was fetched",
                expected="a file that is still",
                fix="try again",
            )
        # A server that names no version: the content does, and the file is fetched each time.
        target = target or _target(cache, address, file_sha256(part), own)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _target(cache: Path, address: str, version: str, name: str) -> Path:
    # A folder, not a longer name: messages name the file as its server does.
    return cache / f"{address}-{hashlib.sha256(version.encode()).hexdigest()[:16]}" / name


def _version(info: dict[str, Any]) -> str | None:
    """Return what tells this content of a file from another, or None if its server says nothing of the kind."""
    lfs = info.get("lfs")
    named = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    named = named or next((info[name] for name in VERSIONS if info.get(name)), None)
    if named:
        return str(named)
    date = next((info[name] for name in DATES if info.get(name)), None)
    return f"{date} {info.get('size')}" if date else None


def _problem(error: Exception, protocol: str, where: str) -> DataError | SourceUnreachable:
    """Return what an error of a store's client means for the user."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = (
            error.__cause__
        )  # fsspec says the same of a server that does not answer, or answers with its own fault
    status = (
        getattr(error, "status", None)
        or getattr(getattr(error, "response", None), "status_code", None)
        or getattr(error, "code", None)
    )
    said = f"{type(error).__name__}: {str(error).strip() or 'no more is said'}".splitlines()[0][
        :200
    ]
    if protocol in ("http", "https"):
        said = said.split("?")[0]  # a signed query is a secret
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ImportError):
        return DataError(
            where=where,
            found=f"needs a package that is missing ({error})",
            expected="the extra `remote`",
            fix="pip install 'ft_assets[remote]'",
        )
    if isinstance(error, FileNotFoundError) or status in (404, "404"):
        return DataError(
            where=where,
            found="there is no such file",
            expected="an existing file, folder or glob",
            fix="correct the URL",
        )
    refused = isinstance(error, PermissionError) or status in (401, 403, "401", "403")
    if refused or kinds & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
        "GatedRepoError",
    }:
        return DataError(
            where=where,
            found=f"access is refused ({said})",
            expected="credentials that may read it",
            fix=f"set {CREDENTIALS[protocol]}",
        )
    fix = "check the URL and the network; a local copy of the file works too"
    if is_transient(error, status):
        return SourceUnreachable(where, f"cannot be fetched ({said})", f"try again later; {fix}")
    return DataError(
        where=where, found=f"cannot be fetched ({said})", expected="a server that answers", fix=fix
    )
