"""`ft doctor`: checks the machine and the project. It changes nothing and loads no weights."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ft_assets.commands.doctor import base_models, machine
from ft_assets.commands.doctor.check import FAIL, OK, Check, fail, guarded, ok, warn
from ft_assets.commands.doctor.rows import rows
from ft_assets.commands.store_view import in_bytes
from ft_assets.config import CONFIG_NAME, Project, find_config, load_project
from ft_assets.config.data import ASSET
from ft_assets.config.launcher import LauncherSettings
from ft_assets.data.content import KEYS as FILES
from ft_assets.data.data_files import resolve_files
from ft_assets.errors import ClusterUnreachable, FtError
from ft_assets.launchers import make_launcher
from ft_assets.launchers.cluster import ClusterLauncher
from ft_assets.metrics.endpoint import Endpoint
from ft_assets.release.keys import signing_key, trusted_keys
from ft_assets.steps.own_rehearsal import SHIPPED


def examine() -> list[Check]:
    """Return all checks of this machine and the project of this folder."""
    checks = [*guarded("libraries", machine.libraries), *guarded("torch", machine.compute)]
    project, config = _config()
    if project is None:
        checks += guarded("bitsandbytes", partial(machine.bitsandbytes, False))
        checks += guarded("disk", partial(machine.disk, Path.cwd()))
        return [*checks, config]
    quantized = any(project.recipe(name).lora.method == "qlora" for name in project.base_models)
    checks += guarded("bitsandbytes", partial(machine.bitsandbytes, quantized))
    checks += guarded("disk", partial(machine.disk, project.store_path))
    checks += [
        config,
        *guarded("launcher", lambda: [launcher_check(project.launcher, project.root)]),
        *guarded("signing", partial(signing_check, project)),
        *guarded("endpoints", partial(endpoints, project)),
        *_data(project),
    ]
    for name, settings in project.base_models.items():
        looks: dict[str, Callable[[], Iterable[Check]]] = {
            "source": partial(base_models.source, name, settings, project.root),
            "licence": partial(base_models.licence, name, settings, project),
            "chat template": partial(base_models.template, name, settings, project),
            "layers": partial(base_models.layers, name, settings, project),
        }
        for part, look in looks.items():
            found = list(guarded(f"{name}: {part}", look))
            checks += found
            if part == "source" and any(check.state == FAIL for check in found):
                break  # licence and template of what is not there would only say so again
    return checks


def signing_check(project: Project) -> Iterator[Check]:
    """Yield whether this machine can sign the next release, if signatures are asked for."""
    trusted, key = trusted_keys(project), signing_key(project)
    if key is not None:
        yield ok("signing", f"releases are signed with the key {key.fingerprint[:12]}")
    elif trusted:
        advice = "set release.signing.key on the machine that releases"
        yield warn("signing", "releases are verified here and cannot be signed", advice)


def endpoints(project: Project) -> Iterator[Check]:
    """Yield whether the keys of the judge and of the rivals are in the environment."""
    for name in project.base_models:
        settings = project.recipe(name).evaluation
        named: dict[str, Endpoint] = {
            f"evaluation.rivals.{rival}": its
            for rival, its in settings.rivals.items()
            if isinstance(its, Endpoint)
        }
        if settings.judge:
            named["evaluation.judge"] = settings.judge
        for place, endpoint in named.items():
            key = endpoint.api_key_env
            if key and not os.environ.get(key):
                advice = f"export {key}=… where the step runs"
                yield fail(f"{name}: {place}", f"the key {key} is not set", advice)


def _config() -> tuple[Project | None, Check]:
    try:
        path = find_config()
        project = load_project(path)
    except FtError as error:
        advice = "; ".join(text for text in (error.expected, error.fix) if text)
        return None, fail(
            CONFIG_NAME,
            f"{error.where}: {error.found}",
            f"{advice}. Data and base models were not looked at",
        )
    except Exception as error:  # e.g. bytes that are not UTF-8, a folder of this name
        return None, fail(
            CONFIG_NAME,
            f"cannot be read ({type(error).__name__}: {error})",
            "a UTF-8 text file; see the README",
        )
    count = len(project.base_models)
    return project, ok(
        CONFIG_NAME,
        f"{path}, {count} base model{'s' if count > 1 else ''}",
    )


def _data(project: Project) -> Iterator[Check]:
    """Yield a check for each key of `data` that names files."""
    found: list[Check] = []
    for key in FILES:
        if patterns := project.data.paths(key):
            found += guarded(f"data.{key}", partial(_files, project, key, patterns))
    yield from found
    readable = [check.name.removeprefix("data.") for check in found if check.state == OK]
    yield from rows(project, readable)
    if project.data.rehearsal_self and not project.data.rehearsal_prompts:
        prompts = len(SHIPPED.read_text(encoding="utf-8").splitlines())
        yield ok("data.rehearsal", f"self: each base answers {prompts} prompts of ft_assets")
    if not project.data.retention:
        yield warn(
            "data.retention",
            "names no files",
            "add general prompts: without them, forgetting is not measured",
        )


def _files(project: Project, key: str, patterns: list[str]) -> Iterator[Check]:
    name = f"data.{key}"
    remote = [
        pattern for pattern in patterns if "://" in pattern and not pattern.startswith(ASSET)
    ]  # to look at them would be to fetch them
    files = resolve_files(
        project.root, [pattern for pattern in patterns if pattern not in remote], name
    )
    unreadable = [path for path in files if not base_models.readable(path)]
    empty = [path.name for path in files if path.stat().st_size == 0]
    total = in_bytes(sum(path.stat().st_size for path in files))
    found = f"{len(files)} file{'' if len(files) == 1 else 's'}, {total}"
    if unreadable:
        yield fail(name, f"{unreadable[0]} cannot be read", "check its permissions")
    elif empty:
        yield fail(name, f"{', '.join(empty)}: empty", "put rows into it, or remove it")
    elif remote:
        yield warn(
            name,
            f"{found}; {len(remote)} remote, not looked at",
            "ft run --asset raw_dataset fetches them",
        )
    else:
        yield ok(name, found)


def launcher_check(settings: LauncherSettings, root: Path) -> Check:
    """Return the check of `launcher:`. Raises ConfigError if something that it needs is missing."""
    launcher = make_launcher(settings, root)
    if not isinstance(launcher, ClusterLauncher):
        return ok("launcher", settings.kind)
    try:
        return ok("launcher", f"{settings.kind} answers: {launcher.ping()}")
    except ClusterUnreachable as error:
        return fail(
            "launcher",
            f"{settings.kind} does not answer ({error})",
            "look at the cluster; runs wait for it and try again",
        )
