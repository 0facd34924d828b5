"""Which tools that are not ours would write and read serving forms here, and which versions of them: an export made with
others is another one, and a form that was refused for want of one is made when it is there. No torch."""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Collection
from pathlib import Path

from ft_assets.artifacts.manifest import file_sha256

PACKAGES = {
    "gguf": ("gguf", "llama-cpp-python"),
    "nf4": ("bitsandbytes",),
}  # by form, of a GGUF form by its first word
MODULES = {"llama-cpp-python": "llama_cpp"}


def converter(llama_cpp: Path) -> Path:
    """Return where llama.cpp's converter lies in its folder, whether or not it does."""
    return llama_cpp / "convert_hf_to_gguf.py"


def quantizer(llama_cpp: Path | None) -> Path | None:
    """Return llama-quantize: that of the folder, else the one on PATH, None if there is none."""
    places = (
        [llama_cpp / place for place in ("llama-quantize", "build/bin/llama-quantize")]
        if llama_cpp
        else []
    )
    found = next((place for place in places if place.is_file()), None) or shutil.which(
        "llama-quantize"
    )
    return Path(found) if found else None


def identities(forms: Collection[str], llama_cpp: Path | None) -> dict[str, str | None]:
    """Return {tool: version or hash, None where it is not there} of what these forms use; no paths of this machine."""
    found: dict[str, str | None] = {
        name: _version(name) for form in forms for name in PACKAGES.get(form.partition("-")[0], ())
    }
    if llama_cpp is not None and any(form.startswith("gguf-") for form in forms):
        found["converter"] = _sha256(converter(llama_cpp))
    if "gguf-q4_k_m" in forms:
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
