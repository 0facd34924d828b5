"""What the shell offers for options of `ft`. It loads no Dagster."""

import ast
import contextlib
import typing
from collections.abc import Iterable
from pathlib import Path

import typer

ASSETS = Path(__file__).parents[1] / "assets"


def base_models(incomplete: str) -> list[str]:
    """Return the keys of base_models in finetune.yaml that begin so."""
    import yaml

    from ft_assets.config import find_config

    with contextlib.suppress(Exception):  # a shell that completes cannot show an error
        found = yaml.safe_load(find_config().read_text())["base_models"]
        return [str(name) for name in found if str(name).startswith(incomplete)]
    return []


def assets(incomplete: str) -> list[str]:
    """Return the assets whose name begins as the last of these names, by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in sorted(_declared()) if name.startswith(last)]


def _declared() -> Iterable[str]:
    """Yield the functions of ft_assets/assets that are declared by `@asset(...)`."""
    for file in ASSETS.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                calls = (one.func for one in node.decorator_list if isinstance(one, ast.Call))
                if any(isinstance(call, ast.Name) and call.id == "asset" for call in calls):
                    yield node.name


def offer(app: typer.Typer) -> None:
    """Give each option of each command what it completes. `ft init --base` names a new base."""
    by_name = {"--base": base_models, "--asset": assets, "--until": assets}
    for command in app.registered_commands:
        callback = command.callback
        if callback is None or callback.__name__ == "init":
            continue
        for hint in typing.get_type_hints(callback, include_extras=True).values():
            for option in getattr(hint, "__metadata__", ()):
                # In an Annotated type, Typer takes the option's first name for its default.
                names = (
                    getattr(option, "default", None),
                    *(getattr(option, "param_decls", ()) or ()),
                )
                for name in by_name.keys() & {str(name) for name in names}:
                    option.autocompletion = by_name[name]
