"""A model's server behind the guard, with OpenAI's API: `ft serve`.

    python -m ft_assets.ui.model_server <engine> <port> <name of the model> <its folder>

The guard is needed because vLLM's server allows requests of every web page, and both servers answer
to every name of this machine. Any page in a browser here could then talk to the model, or load
another one.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import uvicorn

from ft_assets.compat.transformers import parse_tagged_calls
from ft_assets.export.serving import LOOPBACK, MODULES
from ft_assets.models.loading import stop_ids
from ft_assets.ui.guard import App, Guard
from ft_assets.ui.openai_api import OneModel
from ft_assets.ui.openai_requests import Served


def main() -> None:
    """Run the engine's server. Both engines build it by `uvicorn.Config`."""
    engine, port, name, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    arguments = ["serve", str(folder), "--host", LOOPBACK, "--port", str(port)]
    if engine == "vllm":
        arguments += ["--served-model-name", name]
        api: dict[str, Any] = {"inner": name}
    else:
        # transformers takes "@" and ":" in an id for a revision and a file.
        os.chdir(folder.parent)
        os.environ["HF_HUB_OFFLINE"] = "1"  # all files are in the folder
        arguments[1] = folder.name
        served = Served.of(folder)
        api = {"inner": folder.name, "adapt": served.body}
        if "<tool_call>" in served.template and "<function=" not in served.template:
            parse_tagged_calls(folder, stop_ids(folder))
    config: Any = uvicorn.Config

    def guarded(app: App, *args: Any, **kwargs: Any) -> Any:
        app = OneModel(app, name, **api)
        return config(Guard(app, port, is_api=lambda path: True), *args, **kwargs)

    uvicorn.Config = guarded  # type: ignore[assignment, misc]
    sys.argv = [MODULES[engine], *arguments]
    runpy.run_module(MODULES[engine], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
