"""What it costs to verify a store: cold, cached, and with `--full`.

    python -m bench.verify --store path/to/store  # a store that exists
    python -m bench.verify --gigabytes 16  # a folder of random bytes, deleted afterwards

Cold: no hash is kept. Cached: the files did not change since. Full: every file again. Each line has
the seconds, and the bytes that were read. `--drop` empties the page cache of Linux before each
measurement, which needs root; without it, the files may be in memory.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft_assets.artifacts import ArtifactStore, fingerprint
from ft_assets.artifacts.content_hashes import SETTLED_SECONDS, ContentHashes
from ft_assets.release.store_check import check_store

SHARD = 4_000_000_000  # bytes of a file of weights
BLOCK = 16_000_000


def write_random(path: Path, size: int) -> None:
    """Write `size` random bytes: a sparse file would cost nothing to read."""
    with path.open("wb") as file:
        for start in range(0, size, BLOCK):
            file.write(os.urandom(min(BLOCK, size - start)))


@contextmanager
def synthetic(size: int, below: Path | None) -> Iterator[ArtifactStore]:
    """Yield a store with one merged model of `size` bytes in shards."""
    root = Path(tempfile.mkdtemp(dir=below))
    try:
        store = ArtifactStore(root / "store")
        with store.staging("merged_model", "synthetic") as staged:
            for number, start in enumerate(range(0, size, SHARD)):
                path = staged / f"model-{number:05}.safetensors"
                write_random(path, min(SHARD, size - start))
            begun = time.monotonic()
            store.publish(
                staged,
                asset="merged_model",
                partition="synthetic",
                version=fingerprint("merged_model", "1", {}, {}, {}),
                code_version="1",
                settings={},
                inputs={},
                environment={},
                metrics={},
                started=time.time(),
            )
            print(
                f"publish   {time.monotonic() - begun:8.2f} s  {size / 1e9:.2f} GB hashed, fsynced"
            )
        time.sleep(SETTLED_SECONDS + 0.1)  # a hash of a file that changed just now is not kept
        yield store
    finally:
        shutil.rmtree(root)


def measure(store: ArtifactStore, drop: bool) -> None:
    """Print the cost of each way to verify the store. The store's own cache stays as it is."""
    kept = Path(tempfile.mkdtemp()) / "hashes.json"
    for name, max_age in (("cold", None), ("cached", None), ("full", 0.0)):
        if drop:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        given = {} if max_age is None else {"max_age": max_age}
        hashes = ContentHashes(kept, write_every=5.0, **given)
        begun = time.monotonic()
        done = check_store(store, hashes)
        seconds = time.monotonic() - begun
        rate = f", {done.read_bytes / seconds / 1e9:.2f} GB/s" if done.read_bytes else ""
        print(
            f"{name:8}  {seconds:8.2f} s  {len(done.versions)} versions, {done.files} files, "
            f"{done.bytes / 1e9:.2f} GB, {done.read_bytes / 1e9:.2f} GB read{rate}, "
            f"{len(done.findings)} damaged"
        )
    shutil.rmtree(kept.parent)


def main() -> None:
    """Measure a store, or a synthetic one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--below", type=Path, help="where the synthetic store is written")
    parser.add_argument("--drop", action="store_true")
    given = parser.parse_args()
    if given.store:
        measure(ArtifactStore(given.store), given.drop)
        return
    with synthetic(int(given.gigabytes * 1e9), given.below) as store:
        measure(store, given.drop)


if __name__ == "__main__":
    main()
