"""Build the command that serves a released model for a trial.

The endpoint is OpenAI-compatible and bound to this machine. The engine is vLLM if it is installed,
else transformers' own server. Not here: a production deployment.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Literal

from ft_assets.errors import ReleaseError

LOOPBACK = "127.0.0.1"
Engine = Literal["vllm", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "transformers")
MODULES: dict[str, str] = {
    "vllm": "vllm.entrypoints.cli.main",
    "transformers": "transformers.cli.transformers",
}
NEEDED = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}


def choose_engine(wanted: str | None) -> Engine:
    """Return the wanted engine; without a wish, vLLM if it is installed, else transformers.

    Raises ReleaseError if the engine is unknown or not installed.
    """
    names: list[Engine] = [name for name in ENGINES if wanted is None or name == wanted]
    if not names:
        raise ReleaseError(
            where=f"--engine {wanted}",
            found="is not known",
            expected=" or ".join(ENGINES),
            fix="remove the option: an installed engine is used",
        )
    for name in names:
        if all(importlib.util.find_spec(module) for module in NEEDED[name]):
            return name
    needed = NEEDED["vllm" if wanted == "vllm" else "transformers"]
    missing = [module for module in needed if not importlib.util.find_spec(module)]
    install = "pip install vllm" if wanted == "vllm" else 'pip install "ft_assets[serve]"'
    raise ReleaseError(
        where="ft serve",
        found=f"{', '.join(missing)} is not installed",
        expected="an installed server: vLLM, or transformers with its extras",
        fix=install,
    )


def serve_command(engine: Engine, name: str, model: Path, port: int) -> list[str]:
    """Return the command line, bound to this machine: the endpoint has no authentication.

    `name` is the model's id for clients.
    """
    module = "ft_assets.ui.model_server"
    return [sys.executable, "-m", module, engine, str(port), name, str(model.resolve())]
