"""The store on S3 (moto's server): reuse by other machines, half uploads, damage."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml
from moto.server import ThreadedMotoServer

from ft_assets.artifacts import ArtifactStore, ObjectStore, fingerprint, open_store
from ft_assets.commands.gc import removals, remove
from ft_assets.commands.status import status
from ft_assets.config import load_project
from ft_assets.errors import ArtifactError, ConfigError, ReleaseError, StoreUnreachable
from ft_assets.orchestration.mark_stale import outside
from ft_assets.release import whole_register
from ft_assets.release.lookup import by_content
from ft_assets.release.register import state_of
from ft_assets.release.store_check import check_store
from ft_assets.release.whole_register import current_release, repair
from ft_assets_tests.factories import edit, ft
from ft_assets_tests.pipeline import failure, materialize
from ft_assets_tests.registers import decide, merged_model

pytestmark = pytest.mark.cluster

HOUR = 3600.0


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of an S3 server of its own; yields boto3's client."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    urlopen(
        Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()  # what a test before left in this process
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


def keys(client: Any) -> list[str]:
    return sorted(
        entry["Key"] for entry in client.list_objects_v2(Bucket="models").get("Contents", [])
    )


def publish(store: ArtifactStore, content: str, version: str) -> Any:
    with store.staging("a", "tiny") as staged:
        (staged / "sub").mkdir()
        (staged / "sub/file").write_text(content)
        return store.publish(
            staged,
            asset="a",
            partition="tiny",
            version=version,
            code_version="1",
            settings={},
            inputs={},
            environment={},
            metrics={"n": 1},
            started=0.0,
        )


@pytest.fixture
def machine(bucket: Any, tmp_path: Path) -> Callable[[str], ObjectStore]:
    return lambda name: ObjectStore("s3://models/team", tmp_path / name)


def test_what_one_machine_made_another_reads(machine: Callable[[str], ObjectStore]) -> None:
    made = publish(machine("one"), "weights", "v1")
    other = machine("two")
    read = other.need("a", "tiny")
    assert (read.data_version, read.metrics) == (made.data_version, {"n": 1})
    assert not other.root.exists()  # numbers alone fetch nothing
    assert (read.path / "sub/file").read_text() == "weights"
    publish(other, "better", "v2")
    assert machine("one").need("a", "tiny").fingerprint == "v2"
    assert machine("one").find("a", "tiny", "v1") is not None


def test_a_version_is_found_by_its_content_on_a_machine_that_never_read_it(
    machine: Callable[[str], ObjectStore],
) -> None:
    """So is a former champion's adapter, with the list of the rows it was trained on."""
    one = machine("one")
    made = [publish(one, content, version) for content, version in (("old", "v1"), ("new", "v2"))]
    found = by_content(machine("two"), "a", "tiny", made[0].data_version)
    assert found is not None
    assert (found.path / "sub/file").read_text() == "old"
    assert by_content(machine("two"), "a", "tiny", "no such content") is None
    assert by_content(machine("two"), "b", "tiny", made[0].data_version) is None


def test_half_an_upload_is_invisible_and_is_sent_when_it_is_asked_for_again(
    machine: Callable[[str], ObjectStore], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("one")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(one._files, "pipe_file", broken)  # the files arrive, the manifest does not
        with pytest.raises(StoreUnreachable, match="the network is gone"):
            publish(one, "weights", "v1")
    assert [key.rpartition("/")[2] for key in keys(bucket)] == ["file"]
    assert machine("two").find("a", "tiny", "v1") is None
    assert machine("two").current("a", "tiny") is None
    again = machine("one").find("a", "tiny", "v1")
    assert again is not None
    assert (again.path / "sub/file").read_text() == "weights"
    found = machine("two").find("a", "tiny", "v1")
    assert found is not None
    assert (found.path / "sub/file").read_text() == "weights"


def test_two_runs_that_make_the_same_version_at_once_both_end_with_it(
    machine: Callable[[str], ObjectStore],
) -> None:
    def make(number: int) -> str:
        store = machine("one")  # one cache: two runs of one machine
        artifact = publish(store, "weights", f"v{number // 2}")
        return (artifact.path / "sub/file").read_text() + (
            store.need("a", "tiny").path / "sub/file"
        ).read_text()

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(make, range(20))) == {"weightsweights"}
    left = {path.name for path in (machine("one").root / "a/tiny").iterdir()}
    assert left == {f"v{number}" for number in range(10)}


def test_of_two_machines_that_decide_at_once_one_is_refused_and_nothing_is_forgotten(
    machine: Callable[[str], ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machine("one"), machine("two")
    first = decide(one, merged_model(one, "first"))
    decide(one, merged_model(one, "second"))
    late = merged_model(two, "late")
    with pytest.raises(ReleaseError, match="another run made a decision while decision 2"):
        decide(two, late, before=first)
    # Both have looked at CURRENT before either of them wrote: the number's object decides.
    with monkeypatch.context() as patch, pytest.raises(ReleaseError, match="has its number"):
        patch.setattr(whole_register, "current_release", lambda *_: first)
        decide(two, late, before=first)
    two.remove_beside("release", "tiny", "CURRENT")
    with pytest.raises(ReleaseError, match="CURRENT is missing, but decision 2 was made"):
        current_release(machine("three"), "tiny")
    assert "decision 2" in repair(two, "tiny")
    champion = state_of(current_release(machine("four"), "tiny")).champion
    assert champion is not None
    assert champion.candidate == "second"


def test_bucket_is_verified_and_a_damaged_copy_is_fetched_again(
    machine: Callable[[str], ObjectStore], bucket: Any
) -> None:
    one, two = machine("one"), machine("two")
    made = publish(one, "weights", fingerprint("a", "1", {}, {}, {}))
    assert (check_store(two, two.hashes).findings, two.hashes.read_bytes) == ([], 7)
    assert (check_store(two, two.hashes).findings, two.hashes.read_bytes) == ([], 7)  # cached
    local = two.verified(two.need("a", "tiny")).folder / "sub/file"
    local.write_text("garbage")
    assert two.verified(two.need("a", "tiny")).folder == local.parents[1]
    assert local.read_text() == "weights"
    key = next(key for key in keys(bucket) if key.endswith("sub/file"))
    bucket.put_object(Bucket="models", Key=key, Body=b"garbage")
    bucket.delete_object(Bucket="models", Key="team/a/tiny/CURRENT")
    found = {one.damage.path: one for one in check_store(two, two.hashes).findings}
    assert found.keys() == {f"s3://models/{key}", "s3://models/team/a/tiny/CURRENT"}
    assert "was changed" in found[f"s3://models/{key}"].damage.found
    two.discard("a", "tiny", made.fingerprint)
    assert [key for key in keys(bucket) if "/a/tiny/" in key] == []


def test_damaged_and_missing_objects_are_refused_by_name(
    machine: Callable[[str], ObjectStore], bucket: Any
) -> None:
    publish(machine("one"), "weights", "v1")
    key = next(key for key in keys(bucket) if key.endswith("sub/file"))
    bucket.put_object(Bucket="models", Key=key, Body=b"garbage")
    two = machine("two")
    with pytest.raises(
        ArtifactError,
        match=r"s3://models/team/a/tiny/v1/.*sub/file: was changed after it was published",
    ):
        _ = two.need("a", "tiny").path
    assert not list((two.root / "a/tiny").iterdir())
    bucket.delete_object(Bucket="models", Key=key)
    with pytest.raises(ArtifactError, match=r"sub/file: is missing"):
        _ = two.need("a", "tiny").path


def test_gc_removes_old_versions_from_the_bucket_and_keeps_the_current(
    machine: Callable[[str], ObjectStore], bucket: Any
) -> None:
    store = machine("one")
    for index in range(4):
        publish(store, str(index), f"v{index}")
    late = store.need("a", "tiny").manifest.finished + 5 * HOUR
    going, unreadable = removals(store, 1, now=late)
    assert ([removal.path.name for removal in going], unreadable) == (["v0", "v1", "v2"], [])
    assert all(remove(store, removal) for removal in going)
    assert {key.split("/")[3] for key in keys(bucket)} == {"v3", "CURRENT"}
    assert sorted(path.name for path in (store.root / "a/tiny").iterdir()) == ["v3"]


def test_user_is_told_what_the_store_wants(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ObjectStore("s3://elsewhere/team", tmp_path / "one")
    with pytest.raises(ArtifactError, match="the bucket does not exist"):
        missing.require_space(1, "a test")  # what is asked before the work begins
    with pytest.raises(ArtifactError, match="the bucket does not exist"):
        publish(missing, "weights", "v1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnreachable, match="does not answer"):
        ObjectStore("s3://models/team", tmp_path / "two").find("a", "tiny", "v1")


def test_store_that_is_none_is_refused(project: Path) -> None:
    for store, said in (
        ("ftp://host/x", "is not a store"),
        ("s3://key:secret@bucket/x", "credentials come from the environment"),
    ):
        settings = yaml.safe_load((project / "finetune.yaml").read_text())
        (project / "finetune.yaml").write_text(yaml.safe_dump({**settings, "store": store}))
        with pytest.raises(ConfigError, match=said):
            load_project(project / "finetune.yaml")


def test_graph_on_a_bucket_is_reused_whole_by_a_second_machine(
    project: Path, tmp_path: Path, bucket: Any
) -> None:
    settings = yaml.safe_load((project / "finetune.yaml").read_text())
    (project / "finetune.yaml").write_text(
        yaml.safe_dump({**settings, "store": "s3://models/team"})
    )
    second = tmp_path / "second"
    shutil.copytree(project, second)
    done = materialize(project)
    assert done.success, failure(done)
    made = {key for key in keys(bucket) if key.endswith("manifest.json")}
    assert len(made) == 14
    again = materialize(second)  # a cache of its own, empty
    assert again.success, failure(again)
    reused = [
        event.materialization.metadata["reused"].value
        for event in again.all_events
        if event.is_step_materialization
    ]
    assert reused == [True] * 14
    assert {key for key in keys(bucket) if key.endswith("manifest.json")} == made
    found = status(
        load_project(second / "finetune.yaml"), [("raw_dataset", False), ("merged_model", True)]
    )
    assert (found.store, found.versions) == ("s3://models/team", 14)
    said = ft(second, "report")
    assert said.returncode == 0, said.stderr
    assert "held-out" in said.stdout
    assert json.loads(ft(second, "plan", "--json").stdout)
    assert (
        open_store(load_project(second / "finetune.yaml"))
        .need("merged_model", "tiny")
        .path.is_relative_to(second / ".ft/cache")
    )


def test_version_that_another_machine_made_decides_what_is_marked(
    bucket: Any, machine: Callable[[str], ObjectStore], project: Path
) -> None:
    edit(project, store="s3://models/team")
    here = load_project(project / "finetune.yaml")
    before = outside(here, {})
    assert outside(here, {}) == before
    publish(machine("other"), "weights", "v1")
    made = outside(here, {})
    assert made != before
    bucket.put_object(Bucket="models", Key="team/a/tiny/CURRENT", Body=b"\xff\xfe")
    assert outside(here, {}) not in (before, made)
