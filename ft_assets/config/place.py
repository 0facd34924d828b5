"""Where the graph of a project is inside a code location: the prefix of its keys and names."""

import re

from pydantic import BaseModel

from ft_assets.errors import ConfigError

PART = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")  # "__" joins the parts of a name


class Place(BaseModel, frozen=True):
    """The prefix of a project's asset keys, and the one group of its assets, if it has one.

    Without a prefix the project has the code location for itself.
    """

    prefix: tuple[str, ...] = ()
    group: str | None = None

    def name(self, name: str) -> str:
        """Return the name of a job, op, sensor, schedule or resource, unique in the location."""
        return "__".join([*self.prefix, name])


def require_prefix(prefix: tuple[str, ...], where: str) -> None:
    """Raise ConfigError unless the prefix can be part of the names of jobs and sensors."""
    wrong = [part for part in prefix if not PART.fullmatch(part)]
    if prefix and not wrong:
        return
    raise ConfigError(
        where=f"{where}: key_prefix",
        found=f"{', '.join(map(repr, wrong))} cannot be part of a name" if wrong else "is empty",
        expected="letters, digits and single underscores between them, e.g. [support, tickets]: "
        "the prefix keeps the keys of this project apart from all others",
        fix="correct key_prefix",
    )
