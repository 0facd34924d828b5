"""Addresses of our own pages, for the metadata of events.

They have no host, so a browser takes that of Dagster's page: through `ssh -L` and behind a proxy.
"""

from urllib.parse import quote, urlencode

HOME = "/ft/"


def versions_path(base_model: str) -> str:
    """Return the address of the list of a base model's versions."""
    return f"/ft/versions#{quote(base_model)}"


def report_path(base_model: str, version: str) -> str:
    """Return the address of the page of a report."""
    return f"/ft/versions/{quote(base_model)}/{version}/report"


def rows_path(**query: str) -> str:
    """Return the address of the rows of a search, e.g. `table="preferences"`."""
    return f"/ft/rows?{urlencode(query)}"
