"""Commands and files over the system's ssh and rsync, with what can go wrong told apart.

Keys of hosts are always verified. Nothing that may be secret is in a command line: all arguments of
the agent are JSON on its stdin.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from ft_assets.config.launcher import SshSettings
from ft_assets.errors import ClusterUnreachable, ConfigError
from ft_assets.launchers import ssh_agent

ANSWER_SECONDS = 60.0
NO_CONNECTION = 255  # of ssh
NO_COMMAND = 127  # of a shell
# A message of ssh that is the user's to correct -> (what is expected, what to do).
REFUSED = (
    (
        re.compile(r"Host key verification failed|IDENTIFICATION HAS CHANGED|host key is known"),
        "a host whose key is in known_hosts",
        "compare the key with the one that the provider shows, then add it: ssh-keyscan {host}",
    ),
    (
        re.compile(r"Permission denied"),
        "a host that accepts your key",
        "set launcher.user and launcher.identity_file, or add the key there",
    ),
    (
        re.compile(r"Identity file .* not accessible|invalid format|Bad owner or permissions"),
        "a private key that only you can read",
        "correct launcher.identity_file",
    ),
)
Answer = dict[str, JsonValue]


class Link:
    """One host. Each call is a connection of its own, so a cut one costs nothing but a retry."""

    def __init__(self, settings: SshSettings, root: Path = Path()) -> None:
        """Raises ConfigError without ssh and rsync on this machine."""
        for tool in ("ssh", "rsync"):
            if shutil.which(tool) is None:
                raise ConfigError(
                    where="launcher: ssh",
                    found=f"{tool} is not on the PATH of this machine",
                    expected="OpenSSH's client and rsync",
                    fix=f"install {tool}",
                )
        self.settings, self._root = settings, root
        self.sent = self.received = 0  # bytes of files, as rsync counts them
        user = f"{settings.user}@" if settings.user else ""
        self.place = f"{user}{settings.host}"
        self.python = settings.python or "python3"

    @property
    def command(self) -> list[str]:
        """The ssh command without its host."""
        given = self.settings
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=15"]
        options += ["ServerAliveInterval=15", "ServerAliveCountMax=4", "ForwardAgent=no"]
        if given.known_hosts:
            options.append(f"UserKnownHostsFile={self._path(given.known_hosts)}")
        if given.identity_file:
            options.append("IdentitiesOnly=yes")
        command = ["ssh", *(part for option in options for part in ("-o", option))]
        command += ["-p", str(given.port)] if given.port else []
        return command + (["-i", self._path(given.identity_file)] if given.identity_file else [])

    def _path(self, text: str) -> str:
        return str(self._root / Path(text).expanduser())

    def install(self) -> None:
        """Send the agent. Raises ConfigError, ClusterUnreachable."""
        folder = self.settings.folder
        program = Path(ssh_agent.__file__).read_text()
        written = f"{folder}/.agent-$$"
        self._shell(
            f"umask 077 && mkdir -p {folder} && cat > {written} && mv {written} {folder}/agent.py",
            program,
        )

    def call(
        self, verb: str, given: Mapping[str, JsonValue], seconds: float = ANSWER_SECONDS
    ) -> Answer:
        """Call a verb of the agent. Raises ConfigError, ClusterUnreachable."""
        command = f"exec {self.python} -I -S {self.settings.folder}/agent.py {verb}"
        answer: Answer = json.loads(self._shell(command, json.dumps(given), seconds))
        if error := answer.get("error"):
            raise ConfigError(
                where=f"launcher.host: {self.settings.host}",
                found=str(error),
                expected=f"a host that can do this: {verb}",
                fix="correct it there (its disk may be full), or use another host",
            )
        return answer

    def _shell(self, command: str, given: str, seconds: float = ANSWER_SECONDS) -> str:
        done = self._run([*self.command, self.place, command], given, seconds)
        if done.returncode:
            raise self._error(done)
        return done.stdout

    def push(self, folder: Path, there: str) -> None:
        """Send the files of a local folder, links as what they name, resuming earlier tries."""
        self._rsync("-rL", "--ignore-existing", "--times", f"{folder}/", self._there(there))

    def resume_push(self, folder: Path, there: str) -> None:
        """Send files whose name is their content: a partial one is continued."""
        self._rsync("-rL", "--partial", "--append", f"{folder}/", self._there(there))

    def pull(self, there: str, folder: Path, *options: str) -> None:
        """Fetch the files of a folder of the host. Links are not followed."""
        folder.mkdir(parents=True, exist_ok=True)
        self._rsync("-rt", "--partial", *options, self._there(there) + "/", f"{folder}/")

    def _there(self, path: str) -> str:
        return f"{self.place}:{self.settings.folder}/{path}"

    def _rsync(self, *arguments: str) -> None:
        shell = shlex.join(self.command)
        command = ["rsync", "--stats", "--timeout=60", "-e", shell, *arguments]
        done = self._run(command, "", None)
        counted = dict(re.findall(r"Total bytes (sent|received): ([\d,]+)", done.stdout))
        self.sent += int(counted.get("sent", "0").replace(",", ""))
        self.received += int(counted.get("received", "0").replace(",", ""))
        if done.returncode and done.returncode != 24:  # 24: a file vanished meanwhile
            raise self._error(done)

    @staticmethod
    def _run(
        command: list[str], given: str, seconds: float | None
    ) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                command,
                input=given,
                capture_output=True,
                text=True,
                errors="surrogateescape",
                timeout=seconds,
                check=False,
                start_new_session=True,  # Ctrl-C is for the launcher, which then stops the step
            )
        except subprocess.TimeoutExpired:
            raise ClusterUnreachable(f"no answer within {seconds:.0f} s") from None

    def _error(self, done: "subprocess.CompletedProcess[str]") -> ConfigError | ClusterUnreachable:
        message = done.stderr.strip() or f"exit code {done.returncode}"
        where = f"launcher.host: {self.settings.host}"
        for pattern, expected, fix in REFUSED:
            if pattern.search(message):
                fix = fix.format(host=self.settings.host)
                return ConfigError(where=where, found=_last(message), expected=expected, fix=fix)
        if "No space left" in message or "File too large" in message:
            return full_disk(where)
        if "rsync: command not found" in message or "rsync: not found" in message:
            return no_rsync(where)
        if done.returncode in (NO_COMMAND, 126):
            return ConfigError(
                where=where,
                found=_last(message),
                expected=f"{self.python}, Python 3.11 or later",
                fix="install it there, or set launcher.python",
            )
        return ClusterUnreachable(_last(message))


def no_rsync(where: str) -> ConfigError:
    """Return the error of a host without rsync."""
    return ConfigError(
        where=where,
        found="rsync is not installed there",
        expected="rsync on the host",
        fix="install it there: apt-get install rsync",
    )


def full_disk(where: str) -> ConfigError:
    """Return the error of a host without room."""
    return ConfigError(
        where=where,
        found="its disk is full",
        expected="room for the base model, the checkpoints, and the result",
        fix="free some space there, or set launcher.folder to another disk of the host",
    )


def _last(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip(" @*")]
    return lines[-1] if lines else message
