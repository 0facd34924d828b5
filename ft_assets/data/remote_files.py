"""Fetch the remote files that finetune.yaml names, as local copies.

Protocols: s3://, gs://, http(s)://, hf://datasets/owner/name@revision/path, file://; all but
http(s) also with globs. A copy is in the cache under its URL and the checksum (or version, or date)
that its server gives, so that an unchanged file is not fetched again and a changed file never
replaces a file that is being read. Copies can be deleted at any time. Credentials come from the
environment, as the client of each store finds them; never from finetune.yaml.
"""

import glob
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ft_assets.artifacts import file_sha256
from ft_assets.data.file_types import DATA, is_hidden, require_read, suffixes
from ft_assets.errors import DataError, InfrastructureFault, SourceUnreachable, is_transient
from ft_assets.redaction import has_user, redacted

HTTP = ("http", "https")
CREDENTIALS = {  # where the credentials of each protocol come from
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    "(AWS_ENDPOINT_URL for another store than Amazon's)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "http": "(none: give a URL that is signed or public)",
    "https": "(none: give a URL that is signed or public)",
    "file": "(the file's own permissions)",
}
CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "GatedRepoError",
}
# The fields by which servers give the version of a file, the strictest first. A date needs a size.
VERSIONS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "blob_id")
DATES = ("Last-Modified", "LastModified", "mtime", "updated")
FileInfo = Mapping[str, Any]  # fsspec's description of a file; its fields differ by server


def fetched(url: str, where: str, cache: Path) -> list[Path]:
    """Return the local copies of the files that a URL names.

    Raises DataError if there is none or it cannot be read, SourceUnreachable if the server does
    not answer.
    """
    protocol = _checked_protocol(url, where)
    try:
        files = _file_system(protocol)
        copies = [
            _copy(files, name, info, protocol, where, cache)
            for name, info in _matches(files, url, protocol)
        ]
    except (DataError, InfrastructureFault):
        raise
    except Exception as error:  # the stores' clients have no common error class
        raise _as_error(error, protocol, where) from error
    if not copies:
        raise DataError(
            where=where,
            found="no data file matches",
            expected="an existing file, folder or glob",
            fix="correct the URL",
        )
    return copies


def _checked_protocol(url: str, where: str) -> str:
    protocol, _, rest = url.partition("://")
    if protocol not in CREDENTIALS:
        raise DataError(
            where=where,
            found=f"{protocol}:// is not supported",
            expected=f"one of {', '.join(f'{name}://' for name in CREDENTIALS)}",
            fix="correct the URL",
        )
    if has_user(url):
        raise DataError(
            where=where,
            found="holds a user or a password",
            expected="credentials in the environment",
            fix=f"set {CREDENTIALS[protocol]}",
        )
    if protocol == "hf" and not _has_revision(rest.split("/")):
        # Without a revision the same finetune.yaml would mean other data tomorrow.
        raise DataError(
            where=where,
            found="names no revision",
            expected="hf://datasets/owner/name@revision/path",
            fix="add @ and a commit or a tag after the name",
        )
    if protocol in HTTP and glob.has_magic(urlsplit(url).path):
        raise DataError(
            where=where,
            found="is a glob",
            expected="the URL of one file: HTTP has no folders",
            fix="name each file",
        )
    return protocol


def _has_revision(parts: list[str]) -> bool:
    if len(parts) < 4 or parts[0] != "datasets":
        return False
    return "@" in parts[2] and not parts[2].endswith("@")


def _file_system(protocol: str) -> Any:
    import fsspec

    # Listings are not cached: a sensor checks again and again whether files changed.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in HTTP:
        import aiohttp

        # No limit on the whole transfer, which a large file would reach; one on each silence.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
            "trust_env": True,
        }
    return fsspec.filesystem(protocol, **options)


def _matches(files: Any, url: str, protocol: str) -> Iterator[tuple[str, FileInfo]]:
    """Yield (name, the server's information) of each file that a URL names.

    Raises DataError for an archive or a spreadsheet in a folder.
    """
    name = url if protocol in HTTP else files._strip_protocol(url)
    is_glob = protocol not in HTTP and glob.has_magic(name)
    for match in sorted(files.glob(name)) if is_glob else [name]:
        info = files.info(match)
        if info.get("type") != "directory":
            yield match, info
            continue
        inside = files.find(match, detail=True)
        require_read(
            f"{protocol}://{inner}"
            for inner in inside
            if not is_hidden(PurePosixPath(inner.removeprefix(match)))
        )
        for inner, inner_info in sorted(inside.items()):
            if suffixes(Path(inner))[0] in DATA:
                yield inner, inner_info


def _copy(files: Any, name: str, info: FileInfo, protocol: str, where: str, cache: Path) -> Path:
    """Return the local copy of a file; fetch it unless the cache has this version."""
    version, size = _version(info), info.get("size")
    path = unquote(urlsplit(name).path) if protocol in HTTP else name
    own = PurePosixPath(path).name or "data"
    address = hashlib.sha256(f"{protocol}://{name}".encode()).hexdigest()[:16]
    target = _target(cache, address, version, own) if version else None
    if target and target.is_file() and size in (None, target.stat().st_size):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f".part-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        files.get_file(name, str(part))
        fetched_size = part.stat().st_size
        if size is not None and fetched_size != size:
            raise SourceUnreachable(
                where, f"{own}: got {fetched_size} of {size} bytes", "try again"
            )
        if version and _version(files.info(name)) != version:
            raise DataError(
                where=where,
                found=f"{own}: changed while it was fetched",
                expected="a file that does not change",
                fix="try again",
            )
        # If the server gives no version, the content is the version: such a file is fetched
        # each time.
        target = target or _target(cache, address, file_sha256(part), own)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _target(cache: Path, address: str, version: str, name: str) -> Path:
    # A folder, not a longer name: messages name the file as its server does.
    return cache / f"{address}-{hashlib.sha256(version.encode()).hexdigest()[:16]}" / name


def _version(info: FileInfo) -> str | None:
    """Return the version of a file's content, or None if its server gives none."""
    lfs = info.get("lfs")
    named = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    named = named or next((info[name] for name in VERSIONS if info.get(name)), None)
    if named:
        return str(named)
    date = next((info[name] for name in DATES if info.get(name)), None)
    return f"{date} {info.get('size')}" if date else None


def _as_error(error: Exception, protocol: str, where: str) -> DataError | SourceUnreachable:
    """Return the error for the user that an error of a store's client stands for."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        # fsspec raises the same error for a server that does not answer or has its own fault.
        error = error.__cause__
    status = _status(error)
    message = f"{type(error).__name__}: {str(error).strip() or 'no further message'}"
    message = redacted(message.splitlines()[0])[:200]
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
    if _is_denied(error, status):
        return DataError(
            where=where,
            found=f"access is refused ({message})",
            expected="credentials that may read it",
            fix=f"set {CREDENTIALS[protocol]}",
        )
    found = f"cannot be fetched ({message})"
    fix = "check the URL and the network; a local copy of the file works too"
    if is_transient(error, status):
        return SourceUnreachable(where, found, f"try again later; {fix}")
    return DataError(where=where, found=found, expected="a server that answers", fix=fix)


def _status(error: Exception) -> Any:
    response = getattr(error, "response", None)
    return (
        getattr(error, "status", None)
        or getattr(response, "status_code", None)
        or getattr(error, "code", None)
    )


def _is_denied(error: Exception, status: Any) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, PermissionError)
        or status in (401, 403, "401", "403")
        or bool(kinds & CREDENTIAL_ERRORS)
    )
