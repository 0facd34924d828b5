"""The tables of other people's assets, as the asset `upstream_tables` keeps them in the store."""

import os
import secrets
from pathlib import Path
from urllib.parse import quote

from ft_assets.config.data import ASSET
from ft_assets.errors import DataError


def folder_of(asset: str) -> str:
    """Return the name of the folder with the files of an asset."""
    return quote(asset, safe="")


def upstream_files(root: Path, path: str, where: str) -> list[Path]:
    """Return the files of asset://<key>. Raises DataError if its table was not read yet."""
    folder = _link(root) / folder_of(path.removeprefix(ASSET))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if not files:
        raise DataError(
            where=where,
            found="its table has not been read yet",
            expected="a version of upstream_tables, which reads it where the asset can be loaded",
            fix="materialize upstream_tables in the code location that has the asset "
            "(docs/dagster.md)",
        )
    return files


def point_to(root: Path, version: Path) -> None:
    """Have the paths of assets lead to a version of `upstream_tables`."""
    link = _link(root)
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    new.symlink_to(version.resolve(), target_is_directory=True)
    os.replace(new, link)


def _link(root: Path) -> Path:
    return root / ".ft" / "upstream"
