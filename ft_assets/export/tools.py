"""Identify the external tools that write and read serving formats on this machine.

Their versions are part of an export's fingerprint: other versions make a new export, and a format
that was refused because a tool was missing is written when the tool is installed. No torch.
"""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Collection
from pathlib import Path

from ft_assets.artifacts.manifest import file_sha256

# By format; a GGUF format by its first word.
PACKAGES = {"gguf": ("gguf", "llama-cpp-python"), "nf4": ("bitsandbytes",)}
MODULES = {"llama-cpp-python": "llama_cpp"}


def converter(llama_cpp: Path) -> Path:
    """Return the path of the converter in a folder of llama.cpp; the file may be missing."""
    return llama_cpp / "convert_hf_to_gguf.py"


def quantizer(llama_cpp: Path | None) -> Path | None:
    """Find llama-quantize in a folder of llama.cpp, else on PATH; None if it is in neither."""
    if llama_cpp is not None:
        for place in ("llama-quantize", "build/bin/llama-quantize"):
            if (llama_cpp / place).is_file():
                return llama_cpp / place
    found = shutil.which("llama-quantize")
    return Path(found) if found else None


def identities(formats: Collection[str], llama_cpp: Path | None) -> dict[str, str | None]:
    """Return the version or hash of each tool that these formats use; None if it is missing.

    The values are independent of the paths of this machine.
    """
    found: dict[str, str | None] = {
        package: _version(package)
        for name in formats
        for package in PACKAGES.get(name.partition("-")[0], ())
    }
    if llama_cpp is not None and any(name.startswith("gguf-") for name in formats):
        found["converter"] = _sha256(converter(llama_cpp))
    if "gguf-q4_k_m" in formats:
        found["llama-quantize"] = _sha256(quantizer(llama_cpp))
    return found


def _version(package: str) -> str | None:
    if importlib.util.find_spec(MODULES.get(package, package)) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path without being installed
        return "unknown"


def _sha256(file: Path | None) -> str | None:
    return file_sha256(file)[:20] if file and file.is_file() else None
