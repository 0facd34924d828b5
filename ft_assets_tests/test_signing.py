"""Signed releases: what a key shows of a changed store, and what nothing shows without one.

The store is real and small: a merged model of a few files, its report, and releases of it.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_assets.artifacts import Artifact, ArtifactStore, file_sha256, fingerprint
from ft_assets.artifacts.manifest import FileEntry, Manifest, content_version, file_entries
from ft_assets.cli import integrity, models  # two modules: a group of commands
from ft_assets.commands.doctor import signing_check
from ft_assets.config import Project
from ft_assets.errors import ArtifactError, FtError, ReleaseError
from ft_assets.release.approval import Answer, answer, now_text
from ft_assets.release.keys import signing_key, trusted_keys
from ft_assets.release.lookup import need_champion
from ft_assets.release.provenance import require_signed_files
from ft_assets.release.register import (
    KEPT,
    PROMOTED,
    PROPOSED,
    ROLLED_BACK,
    HistoryEntry,
    ReleasedModel,
    state_of,
    withdrawn_by,
    write_release,
)
from ft_assets.release.signed_release import Release, verify_release
from ft_assets.release.signing import REPORT_SIGNATURE, Signing, proven_release
from ft_assets.release.statements import Statement, sign_files, signed
from ft_assets.release.whole_register import current_release, turn
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import failure, materialize
from ft_assets_tests.registers import GAIN

NAME = "tiny"
WEIGHTS = {1: b"the weights of the first model", 2: b"the weights of the second model"}


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_key(folder: Path, name: str) -> Path:
    """Make a key pair with the commands of docs/integrity.md; return the private key's file."""
    private = folder / f"{name}.pem"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private))
    openssl("ec", "-in", str(private), "-pubout", "-out", str(private.with_suffix(".pub")))
    private.chmod(0o600)
    return private


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("release", "other"):
        make_key(folder, name)
    return folder


def project_with(root: Path, signing: dict[str, Any] | None) -> Project:
    project = Project.model_validate(
        {
            "data": {"train": ["a.jsonl"]},
            "base_models": {NAME: {"folder": "base"}},
            "release": {"signing": signing} if signing else {},
        }
    )
    return project.model_copy(update={"root": root})


class Shop:
    """A project and its store. The product's functions merge, release and verify models in it."""

    def __init__(self, root: Path, signing: dict[str, Any] | None) -> None:
        self.root, self.signing = root, signing
        self.set(signing)

    def set(self, signing: dict[str, Any] | None) -> None:
        """Change the settings; the store is opened again, as by another process."""
        self.project = project_with(self.root, signing)
        self.store = ArtifactStore(self.project.store_path)

    def _publish(self, asset: str, number: int, **fields: Any) -> Artifact:
        staged, finish = fields.pop("staged"), fields.pop("finish", None)
        known, settings = file_entries(staged), {"number": number}
        metrics = {**fields.pop("metrics", {}), **(finish(staged, known) if finish else {})}
        return self.store.publish(
            staged,
            asset=asset,
            partition=NAME,
            version=fingerprint(asset, "1", settings, fields["inputs"], {}),
            code_version="1",
            settings=settings,
            environment={},
            metrics=metrics,
            started=time.time(),
            known=known,
            **fields,
        )

    def merge(self, number: int) -> Artifact:
        """Publish a report and a merged model, signed if the project has a key."""
        with self.store.staging("eval_report", NAME) as staged:
            (staged / "report.json").write_text(json.dumps({"gain": 0.2, "model": number}))
            key = signing_key(self.project)
            report = self._publish(
                "eval_report",
                number,
                staged=staged,
                inputs={},
                finish=partial(sign_files, "eval_report[tiny]", key, REPORT_SIGNATURE),
            )
        with self.store.staging("merged_model", NAME) as staged:
            (staged / "model.safetensors").write_bytes(WEIGHTS[number])
            (staged / "README.md").write_text(f"# model {number}\n")
            (staged / "verdict.json").write_text(json.dumps({"status": "PASS"}))
            return self._publish(
                "merged_model",
                number,
                staged=staged,
                inputs={"eval_report": report.data_version},
                metrics={"candidate": "sft", "verdict": "PASS", "loss": float("nan"), **GAIN},
                finish=self._attest,
            )

    def _attest(self, output: Path, files: dict[str, FileEntry]) -> dict[str, str]:
        if key := signing_key(self.project):
            subjects = [
                {"name": name, "digest": {"sha256": one.sha256}} for name, one in files.items()
            ]
            statement = Statement.model_validate(
                {
                    "subject": subjects,
                    "predicateType": "https://slsa.dev/provenance/v1",
                    "predicate": {},
                }
            )
            (output / "info").mkdir()
            (output / "info/provenance.sigstore.json").write_text(signed(statement, key))
        return {}

    def propose(self, merged: Artifact) -> Artifact:
        """Propose a model, sign and publish the proposal, as the asset does."""
        signing, before = (
            Signing.of(self.project, None, "release"),
            current_release(self.store, NAME),
        )
        signing.require_chain(self.store, NAME, "release")
        state = state_of(before)
        with self.store.staging("release", NAME) as staged:
            entry = HistoryEntry(
                sequence=state.sequence + 1,
                decision=PROPOSED,
                reasons=["because"],
                champion=state.champion,
                challenger=ReleasedModel.of(merged),
                at=now_text(),
                run_id="a-run",
                proposes=PROMOTED,
            )
            write_release(staged, state, entry)
            return self._publish(
                "release",
                state.sequence + 1,
                staged=staged,
                inputs={},
                finish=partial(signing.sign, self.store, NAME, before),
                turn=turn(self.store, NAME, before, state.sequence + 1),
            )

    def release(self, merged: Artifact, status: Any = PROMOTED, vouched: str | None = None) -> Any:
        """Decide for a model, sign and publish the decision, as the asset does."""
        signing = Signing.of(self.project, vouched, "release")
        signing.require_chain(self.store, NAME, "release")
        before = self.store.current("release", NAME)
        state, model = state_of(before), ReleasedModel.of(merged)
        signing.require_model(merged, state, "release")
        number = state.sequence + 1
        with self.store.staging("release", NAME) as staged:
            entry = HistoryEntry(
                sequence=number,
                decision=status,
                reasons=["because"],
                champion=model,
                challenger=state.champion or model,
                at="2026-01-01 00:00:00",
                run_id="a-run",
            )
            write_release(staged, state, entry, withdrawn_by([*state.history, entry]))
            return self._publish(
                "release",
                number,
                staged=staged,
                inputs={},
                parts={"champion": model.identity},
                finish=partial(signing.sign, self.store, NAME, before),
            )

    def verify(self) -> Any:
        """Do what `ft serve` does: verify the model's files, and the signature if it has a key."""
        return proven_release(self.project, self.store, NAME, "ft serve").signature


@pytest.fixture
def shop(tmp_path: Path, keys: Path) -> Shop:
    """Return a project that signs, with two models and a release of each."""
    root = tmp_path / "project"
    root.mkdir()
    shop = Shop(root, {"key": str(keys / "release.pem")})
    shop.release(shop.merge(1))
    shop.release(shop.merge(2))
    return shop


def folder(shop: Shop, asset: str) -> Path:
    if asset == "merged_model":
        return need_champion(shop.store, NAME, "")[1].folder
    return shop.store.need(asset, NAME).folder


def rewrite_manifest(path: Path, inputs: dict[str, str] | None = None) -> Artifact:
    """Make a manifest fit the files of its folder, as an insider would: every hash, and the seal.

    With other inputs it gets another fingerprint, and the folder another name.
    """
    old = Manifest.read(path)
    files = {name: one for name, one in file_entries(path).items() if name != "manifest.json"}
    inputs = {**old.inputs, **(inputs or {})}
    version = fingerprint(old.asset, old.code_version, old.settings, inputs, old.environment)
    changes = {
        "files": files,
        "inputs": inputs,
        "fingerprint": version,
        "data_version": content_version(files, old.parts),
    }
    (path / "manifest.json").write_text(old.model_copy(update=changes).sealed().to_text())
    return Artifact.read(path.rename(path.with_name(version)))


def forge(shop: Shop, asset: str, name: str, text: bytes | None) -> None:
    """Change, add or remove (None) a file, and recompute every hash in the store that names it."""
    released, merged = folder(shop, "release"), folder(shop, "merged_model")
    report = folder(shop, "eval_report")
    path = (merged if asset == "merged_model" else report) / name
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_bytes(text)
    inputs = {"eval_report": rewrite_manifest(report).data_version}
    new = ReleasedModel.of(rewrite_manifest(merged, inputs)).to_dict()
    old = json.loads((released / "release.json").read_text())["champion"]
    copies = [released / "release.json", released / "history.jsonl", released.parent / "DECISIONS"]
    for document in (path for path in copies if path.exists()):
        content = document.read_text()
        for key in ("identity", "data_version", "merged_model"):
            content = content.replace(old[key], new[key])
        document.write_text(content)
    rewrite_manifest(released)


def first(shop: Shop, asset: str) -> Path:
    """Return the folder of the first version of an asset."""
    found, _ = shop.store.versions(asset, NAME)
    return min(found, key=lambda one: one.manifest.settings["number"]).folder


FORGED = {
    "a weight": ("merged_model", "model.safetensors", b"other weights, other weights!!!"),
    "the verdict": ("merged_model", "verdict.json", b'{"status": "PASS", "by": "me"}'),
    "the card": ("merged_model", "README.md", b"# the best model\n"),
    "the report": ("eval_report", "report.json", b'{"gain": 0.9, "model": 2}'),
    "an added file": ("merged_model", "model-00002.safetensors", b"more"),
    "a removed file": ("merged_model", "verdict.json", None),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_hashes_show_with_a_key_and_not_without(shop: Shop, what: str) -> None:
    asset, name, text = FORGED[what]
    assert shop.verify().decision.sequence == 2
    forge(shop, asset, name, text)
    with pytest.raises((ReleaseError, ArtifactError)) as caught:
        shop.verify()
    assert "sign" in str(caught.value)
    shop.set(None)
    assert shop.verify() is None  # every hash fits: nothing shows it


def test_forged_manifest_alone_shows_with_a_key(shop: Shop) -> None:
    path = folder(shop, "merged_model") / "manifest.json"
    path.write_text(path.read_text().replace('"candidate": "sft"', '"candidate": "dpo"'))
    rewrite_manifest(path.parent)
    with pytest.raises(ReleaseError, match=r"metrics in .*manifest.json was changed"):
        shop.verify()
    shop.set(None)
    assert shop.verify() is None


def test_bytes_are_read_even_if_the_cache_of_hashes_is_forged(shop: Shop) -> None:
    """The cache lies in the store: an entry with the old hash hides a changed weight."""
    path = folder(shop, "merged_model") / "model.safetensors"
    known, size = file_sha256(path), path.stat().st_size
    path.write_bytes(b"x" * size)
    stat = path.stat()
    state = [size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cache = shop.store.root / ".work" / "hashes.json"
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({str(path.resolve()): [state, known, time.time()]}))
    shop.set(shop.signing)  # a new process, which reads the cache
    with pytest.raises(ArtifactError, match="was changed after it was published"):
        shop.verify()
    shop.set(None)
    assert shop.verify() is None


@pytest.mark.parametrize("weights", [True, False])
def test_damaged_model_is_refused_without_a_key_too(shop: Shop, weights: bool) -> None:
    (folder(shop, "merged_model") / "model.safetensors").write_bytes(b"x" * len(WEIGHTS[2]))
    shop.set(None)
    with pytest.raises(ArtifactError, match=r"model.safetensors: was changed after it was"):
        proven_release(shop.project, shop.store, NAME, "ft serve", weights=weights)


def test_file_beside_the_signed_ones_is_refused(shop: Shop) -> None:
    (folder(shop, "merged_model") / "modeling_tiny.py").write_text("print('hello')")
    with pytest.raises(ArtifactError, match=r"modeling_tiny.py: was added"):
        shop.verify()


def test_renamed_file_is_refused(shop: Shop) -> None:
    path = folder(shop, "merged_model")
    (path / "model.safetensors").rename(path / "weights.safetensors")
    rewrite_manifest(path)
    with pytest.raises(ReleaseError, match="has other files than the release recorded"):
        shop.verify()


def test_history_is_signed(shop: Shop) -> None:
    path = folder(shop, "release")
    text = (path / "history.jsonl").read_text()
    (path / "history.jsonl").write_text(text.replace("because", "by hand"))
    rewrite_manifest(path)
    with pytest.raises(ReleaseError, match=r"history.jsonl of the release was changed"):
        shop.verify()


def test_unsigned_release_is_refused(shop: Shop) -> None:
    for name in ("release.sig", "model.sig"):
        (folder(shop, "release") / name).unlink()
    rewrite_manifest(folder(shop, "release"))
    with pytest.raises(ReleaseError, match="the release is not signed, and a trusted key"):
        shop.verify()
    with pytest.raises(ReleaseError, match="the release is not signed"):
        shop.release(shop.merge(1))


def test_signature_of_another_key_is_refused(shop: Shop, keys: Path) -> None:
    other = [str(keys / "other.pub")]
    shop.set({"trusted": other})
    with pytest.raises(ReleaseError, match="the signature does not hold: by another key"):
        shop.verify()
    shop.set({"trusted": [str(keys / "release.pub"), *other]})  # while a key is replaced
    assert shop.verify().key.path.endswith("release.pub")


def test_signature_of_another_release_is_refused(shop: Shop) -> None:
    released = folder(shop, "release")
    earlier = first(shop, "release")
    for name in ("release.sig", "model.sig"):
        shutil.copy(earlier / name, released / name)
    rewrite_manifest(released)
    with pytest.raises(ReleaseError, match=r"history\.jsonl of the release was changed"):
        shop.verify()


def test_model_signature_of_another_model_is_refused(shop: Shop) -> None:
    """Both signatures are of the key; only their combination is wrong."""
    earlier = first(shop, "release")
    shutil.copy(earlier / "model.sig", folder(shop, "release") / "model.sig")
    rewrite_manifest(folder(shop, "release"))
    with pytest.raises(ReleaseError, match=r"model.sig of the release was changed"):
        shop.verify()


def test_older_release_put_back_is_refused_while_the_newer_is_there(shop: Shop) -> None:
    earlier, later = first(shop, "release"), folder(shop, "release")
    (later.parent / "CURRENT").write_text(earlier.name + "\n")
    with pytest.raises(ReleaseError, match="decision 2 was made"):
        shop.verify()
    model = Artifact.read(first(shop, "merged_model"))  # even if the register does not tell
    old = Release(shop.store, NAME, Artifact.read(earlier), model)
    with pytest.raises(ReleaseError, match="an older release was put back"):
        verify_release(old, trusted_keys(shop.project))
    shutil.rmtree(later)  # the whole store of yesterday: only its number tells
    assert shop.verify().decision.sequence == 1


def test_release_follows_only_what_was_signed(shop: Shop) -> None:
    forge(shop, *FORGED["a weight"])
    with pytest.raises(ReleaseError, match="was changed after it was signed"):
        shop.release(shop.store.need("merged_model", NAME), KEPT)


def test_model_changed_between_merge_and_release_is_not_signed(shop: Shop) -> None:
    path = first(shop, "merged_model")
    (path / "model.safetensors").write_bytes(b"changed before its release")
    rewrite_manifest(path)
    with pytest.raises(ReleaseError, match=r"model.safetensors of merged_model .* was changed"):
        shop.release(Artifact.read(path))
    (path / "info/provenance.sigstore.json").unlink()
    rewrite_manifest(path)
    with pytest.raises(ReleaseError, match="was not signed when it was merged"):
        shop.release(Artifact.read(path))


def test_model_is_merged_only_from_the_report_that_was_signed(shop: Shop) -> None:
    report, signing = folder(shop, "eval_report"), Signing.of(shop.project, None, "merged_model")
    verdict: Any = "the verdict that it was read from"
    assert signing.proven(verdict, Artifact.read(report), "merged_model") is verdict
    (report / "report.json").write_text('{"gain": 0.9, "model": 2}')
    changed = rewrite_manifest(report)
    with pytest.raises(ReleaseError, match=r"report.json of eval_report .* was changed after it"):
        signing.proven(verdict, changed, "merged_model")
    (changed.folder / REPORT_SIGNATURE).unlink()
    with pytest.raises(ReleaseError, match="was not signed when it was scored"):
        signing.proven(verdict, rewrite_manifest(report), "merged_model")
    shop.set(None)
    assert Signing.of(shop.project, None, "").proven(verdict, changed, "merged_model") is verdict


def test_rollback_of_a_signed_release_is_signed(shop: Shop) -> None:
    shop.release(Artifact.read(first(shop, "merged_model")), ROLLED_BACK)
    found = shop.verify().decision
    champion = first(shop, "merged_model").name
    assert (found.sequence, found.decision, found.champion) == (3, ROLLED_BACK, champion)
    assert found.predecessor.sequence == 2


def test_signing_cannot_be_left_out_later(shop: Shop, monkeypatch: Any, keys: Path) -> None:
    shop.set(None)
    again = Artifact.read(first(shop, "merged_model"))
    with pytest.raises(ReleaseError, match="the current release is signed, and"):
        shop.release(again)
    monkeypatch.setenv("FT_TRUSTED_KEYS", str(keys / "release.pub"))  # outside of finetune.yaml
    assert shop.verify() is not None
    with pytest.raises(ReleaseError, match="no key to sign with"):
        shop.release(again)
    monkeypatch.setenv("FT_TRUSTED_KEYS", str(keys / "other.pub"))  # replaces finetune.yaml's list
    shop.set({"trusted": [str(keys / "release.pub")]})
    with pytest.raises(ReleaseError, match="by another key"):
        shop.verify()


def test_project_with_releases_begins_to_sign_by_a_persons_word(tmp_path: Path, keys: Path) -> None:
    shop = Shop(tmp_path, None)
    merged = shop.merge(1)
    shop.release(merged)
    shop.set({"key": str(keys / "release.pem")})
    with pytest.raises(ReleaseError, match=f"vouch_for: {merged.fingerprint}") as caught:
        Signing.of(shop.project, None, "release").require_model(merged, state_of(None), "release")
    assert "was not signed when it was merged" in str(caught.value)
    with pytest.raises(ReleaseError, match="the release is not signed"):
        shop.release(merged)
    shop.release(merged, KEPT, vouched=merged.fingerprint)
    assert shop.verify().decision.decision == KEPT


def refused(change: Callable[[Path], dict[str, Any]], root: Path) -> str:
    with pytest.raises(FtError) as caught:
        project = project_with(root, change(root))
        assert signing_key(project) is None, "a key that must not be used"
        trusted_keys(project)
    return str(caught.value)


def key_file(root: Path, text: str = "", mode: int = 0o600) -> Path:
    path = root.parent / "key.pem"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_unusable_keys_are_refused_in_plain_words(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, good = tmp_path / "project", keys / "release.pem"
    root.mkdir()
    text = good.read_text()
    locked = tmp_path / "locked.pem"
    openssl(*f"pkcs8 -topk8 -in {good} -out {locked} -passout pass:hunter2".split())
    locked.chmod(0o600)
    rsa = tmp_path / "ed.pem"
    openssl(*f"genpkey -algorithm ed25519 -out {rsa}".split())
    rsa.chmod(0o600)
    inside = root / ".ft" / "store" / "key.pem"
    inside.parent.mkdir(parents=True)
    shutil.copy(good, inside)
    (root / "link.pem").symlink_to(inside)
    (tmp_path / "to_inside.pem").symlink_to(inside)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"key": str(tmp_path / "none.pem")}, "cannot be read (No such file"),
        ({"key": str(tmp_path)}, "cannot be read (Is a directory"),
        ({"key": str(key_file(root, text, 0o644))}, "can be read by others (mode 0644)"),
        ({"key": str(inside)}, "lies in the store"),
        ({"key": "link.pem"}, "lies in the store"),
        ({"key": str(tmp_path / "to_inside.pem")}, "lies in the store"),
        ({"key": "$FT_NO_SUCH_VARIABLE"}, "an environment variable in it is not set"),
        ({"key": str(locked)}, "set password_env"),
        ({"key": str(locked), "password_env": "NOT_SET"}, "NOT_SET is not set"),
        ({"key": str(rsa)}, "is Ed25519PrivateKey"),
        ({"key": str(keys / "release.pub")}, "can be read by others"),
        ({"key": str(good), "trusted": [str(keys / "other.pub")]}, "which is not a trusted key"),
        ({"trusted": [str(good)]}, "is not a public key in PEM"),
        ({"trusted": [str(root / "none.pub")]}, "cannot be read (No such file"),
        ({"trusted": []}, "give key, trusted, or both"),
    ]
    for settings, expected in cases:
        if settings == {"trusted": []}:
            with pytest.raises(ValueError, match=expected):
                project_with(root, settings)
            continue
        message = refused(lambda root, settings=settings: settings, root)
        assert expected in message, message
        assert "PRIVATE KEY" not in message and "hunter2" not in message
    monkeypatch.setenv("KEY_PASSWORD", "wrong")
    wrong = {"key": str(locked), "password_env": "KEY_PASSWORD"}
    message = refused(lambda root: wrong, root)
    assert "cannot be read as a key" in message and "wrong" not in message.split("(")[0]
    monkeypatch.setenv("KEY_PASSWORD", "hunter2")
    key = signing_key(project_with(root, wrong))
    assert key is not None
    assert key.fingerprint == hashlib.sha256((keys / "release.pub").read_bytes()).hexdigest()
    verifies = project_with(root, {"trusted": [str(keys / "release.pub")]})
    for project, states in ((project_with(root, wrong), ["ok"]), (verifies, ["warn"])):
        assert [check.state for check in signing_check(project)] == states
    assert not list(signing_check(project_with(root, None)))


def test_key_that_cannot_sign_stops_a_run_before_training(project: Path, keys: Path) -> None:
    edit(project, release={"signing": {"trusted": [str(keys / "release.pub")]}})
    assert "and no key to sign with" in failure(materialize(project, "recipe"))
    edit(project, release={"signing": {"key": str(project / "release.pem")}})
    assert "lies in the project" in failure(materialize(project, "recipe"))


def test_project_without_signing_needs_none_of_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("securesystemslib", "cryptography")
    loaded = [name for name in sys.modules if name.partition(".")[0] in extra]
    for name in {*loaded, *extra}:
        monkeypatch.setitem(sys.modules, name, None)
    project = project_with(tmp_path, None)
    assert signing_key(project) is None
    assert trusted_keys(project) == ()
    assert Signing.of(project, None, "release[tiny]").key is None


def test_outsider_verifies_with_openssf_model_signing(shop: Shop, keys: Path) -> None:
    merged, signature = folder(shop, "merged_model"), folder(shop, "release") / "model.sig"
    command = [str(Path(sys.executable).with_name("model_signing")), "verify", "key", str(merged)]
    command += ["--signature", str(signature), "--public_key", str(keys / "release.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (merged / "model.safetensors").write_bytes(b"changed")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_signed_statement_of_another_kind_or_place_is_refused(shop: Shop) -> None:
    """Each of these statements is signed by the trusted key, and is not about this release."""
    path = folder(shop, "release") / "release.sig"
    good = path.read_text()
    merged = folder(shop, "merged_model")
    for other in (merged / "info/provenance.sigstore.json", path.with_name("model.sig")):
        path.write_text(other.read_text())
        rewrite_manifest(path.parent)
        with pytest.raises(ReleaseError, match="has a signed statement of another kind"):
            shop.verify()
    path.write_text(good)
    rewrite_manifest(path.parent)
    assert shop.verify()
    release = Release(shop.store, "other", *need_champion(shop.store, NAME, ""))
    with pytest.raises(ReleaseError, match="is the signed release of tiny"):
        verify_release(release, trusted_keys(shop.project))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "\x00", '{"dsseEnvelope": {}}'])
def test_damaged_signature_is_one_error(shop: Shop, text: str) -> None:
    (folder(shop, "release") / "release.sig").write_text(text)
    rewrite_manifest(folder(shop, "release"))
    with pytest.raises(ReleaseError, match="is damaged: not a signature"):
        shop.verify()


def test_require_signed_files_names_the_file(shop: Shop) -> None:
    merged = Artifact.read(folder(shop, "merged_model"))
    assert require_signed_files(merged, trusted_keys(shop.project), "here") is not None
    files = {**merged.manifest.files, "extra.bin": FileEntry(bytes=1, sha256="00" * 32)}
    other = dataclasses.replace(
        merged, manifest=merged.manifest.model_copy(update={"files": files})
    )
    with pytest.raises(ReleaseError, match=r"extra.bin of merged_model .* was added"):
        require_signed_files(other, trusted_keys(shop.project), "here")


def test_ft_verify_release(shop: Shop, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data": {"train": ["a.jsonl"]}, "base_models": {NAME: {"folder": "base"}}}
    (shop.root / "finetune.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(shop.root)

    def verify(*options: str) -> tuple[int, str]:
        assert integrity.app is models.app
        done = CliRunner().invoke(integrity.app, ["verify", "--release", *options])
        error = done.exception if isinstance(done.exception, FtError) else ""
        return done.exit_code, f"{done.output}{error}"

    code, text = verify()
    assert code and "no trusted key is configured" in text
    own = ("--key", str(keys / "release.pub"))
    code, text = verify(*own)
    fingerprint = hashlib.sha256((keys / "release.pub").read_bytes()).hexdigest()
    assert (code, "verified: decision 2 (PROMOTED" in text, fingerprint in text) == (0, True, True)
    assert verify("--key", str(keys / "other.pub"))[0] == 1
    code, text = verify(*own, "--at-least", "3", "--json")
    assert (
        code == 1 and "is decision 2: an older store was put back" in json.loads(text)[0]["error"]
    )
    monkeypatch.setenv("FT_TRUSTED_KEYS", str(keys / "release.pub"))
    assert verify()[0] == 0


def test_proposal_and_its_answer_are_signed_and_a_changed_proposal_is_not_approved(
    tmp_path: Path, keys: Path
) -> None:
    shop = Shop(tmp_path, {"key": str(keys / "release.pem")})
    one = shop.merge(1)
    shop.propose(one)
    with pytest.raises(ReleaseError, match="awaits approval"):
        shop.verify()
    given = {"decision": "approve", "name": "Ada", "reason": "it is right", "by": "test"}
    said = Answer.model_validate({**given, "version": one.fingerprint})
    answer(shop.project, shop.store, NAME, said, "")
    assert shop.verify().decision.decision == PROMOTED
    two = shop.merge(2)
    proposal = shop.propose(two)
    assert shop.verify().decision.champion == one.fingerprint
    for name in ("release.json", "history.jsonl"):
        file = proposal.path / name
        file.write_text(file.read_text().replace('"because"', '"it is far better"'))
    refuse = said.model_copy(update={"version": two.fingerprint})
    with pytest.raises((ReleaseError, ArtifactError)):
        answer(shop.project, shop.store, NAME, refuse, "")
    manifest = Manifest.read(proposal.folder)  # whoever changes the store can seal it again
    names = ("release.json", "history.jsonl")
    files = manifest.files | {name: file_entries(proposal.path)[name] for name in names}
    changes = {"files": files, "data_version": content_version(files, manifest.parts)}
    manifest = manifest.model_copy(update=changes)
    (proposal.folder / "manifest.json").write_text(manifest.sealed().to_text())
    (shop.store.root / "release" / NAME / "DECISIONS").write_text(
        (proposal.path / "history.jsonl").read_text()
    )
    with pytest.raises(ReleaseError, match=r"was changed|signed"):
        answer(shop.project, shop.store, NAME, refuse, "")
    assert need_champion(shop.store, NAME, "")[1].fingerprint == one.fingerprint
