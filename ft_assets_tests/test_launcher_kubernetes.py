"""Steps as Jobs of a stand-in for a Kubernetes cluster, through the official client.

Real: the client, the schema that manifests are checked against, the process that a pod would run.
Not: scheduler and kubelet. What a node does when its run fails or dies is the same under Slurm, and
tried there with a real cluster.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from ft_assets.commands.doctor import launcher_check
from ft_assets.config.launcher import KubernetesSettings
from ft_assets.errors import ConfigError, StepLost
from ft_assets.launchers import LocalLauncher
from ft_assets.launchers.base import failed
from ft_assets.launchers.kubernetes import KubernetesLauncher
from ft_assets.launchers.kubernetes_manifest import manifest
from ft_assets.launchers.kubernetes_states import job_without_pod_state, pod_state
from ft_assets.launchers.local import free_port
from ft_assets_tests.kubernetes_api import (
    VERSION,
    WAITING_FOR_NODE,
    Cluster,
    kubeconfig,
    kubernetes_api,
)
from ft_assets_tests.launching import (
    interrupted,
    process_groups,
    require_same_training,
    trained,
    training,
    training_job,
    wait_until,
)

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    with kubernetes_api(tmp_path / "cluster") as api:
        yield api


def settings(folder: Path, **options: Any) -> KubernetesSettings:
    given = {
        "kind": "kubernetes",
        "image": "registry/ft:1",
        "gpus": 0,
        "python": sys.executable,
        "poll_seconds": 0.2,
        "silence_seconds": 5,
    }
    return KubernetesSettings(
        **{**given, "volumes": [{"claim": "store", "path": str(folder)}], **options}
    )


def launcher(folder: Path, **options: Any) -> KubernetesLauncher:
    return KubernetesLauncher(settings(folder, **options))


def waiting(reason: str, message: str = "why") -> dict[str, Any]:
    return {
        "phase": "Pending",
        "containerStatuses": [
            {"name": "step", "state": {"waiting": {"reason": reason, "message": message}}}
        ],
    }


def test_pod_of_two_ranks_trains_what_one_process_trains(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    alone, together = training_job(finished, tmp_path / "1"), training_job(finished, tmp_path / "2")
    trained(LocalLauncher(), alone)
    lines, curve, _ = trained(launcher(tmp_path, gpus=2), together)
    require_same_training(alone, together)
    assert [line["step"] for line in lines if line["message"] == "train"] == [
        entry["step"] for entry in curve
    ]
    assert any(line["message"] == "running: on node-1" for line in lines)
    assert not cluster.jobs


def test_interrupt_leaves_a_checkpoint_and_no_process(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    job = training_job(finished, tmp_path / "job", num_train_epochs=500)
    with interrupted(lambda: wait_until(lambda: training(job))):
        launcher(tmp_path).run(job, lambda _: None)
    assert not cluster.jobs
    assert not process_groups(job.work)
    assert list(job.checkpoints.glob("checkpoint-*"))


def test_node_without_the_store_is_told(finished: Path, tmp_path: Path, cluster: Cluster) -> None:
    job = training_job(finished, tmp_path / "job")
    with pytest.raises(
        ConfigError, match=r"store: [\s\S]*is missing on the node[\s\S]*job.json does not exist"
    ):
        # The stand-in's node has this machine's files: the job file is taken away before the pod
        # reads it.
        launcher(tmp_path).run(job, lambda line: (job.work / "job.json").unlink(missing_ok=True))


def test_evicted_pod_is_a_fault(finished: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.status = {
        "phase": "Failed",
        "reason": "Evicted",
        "message": "The node was low on resource: memory.",
    }
    with pytest.raises(StepLost, match=r"ended by the cluster.*Evicted"):
        launcher(tmp_path).run(training_job(finished, tmp_path / "job"), lambda _: None)
    assert not cluster.jobs


def test_image_that_cannot_be_pulled_names_its_key(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    cluster.status = waiting("ImagePullBackOff", "Back-off pulling image")
    with pytest.raises(
        ConfigError, match=r"launcher\.image: registry/ft:1[\s\S]*Back-off pulling image"
    ):
        launcher(tmp_path).run(training_job(finished, tmp_path / "job"), lambda _: None)
    assert not cluster.jobs


def test_pod_that_waits_says_why_and_is_deleted_with_its_run(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    cluster.status, said = WAITING_FOR_NODE, list[str]()

    def follow(line: Any) -> None:
        said.append(line["message"])
        if "Insufficient nvidia.com/gpu" in said[-1]:
            cluster.status = waiting("ContainerCreating", "")
            cluster.events = [
                {
                    "reason": "FailedMount",
                    "message": "timed out",
                    "lastTimestamp": "2030-01-01T00:00:00Z",
                }
            ]
        if "FailedMount" in said[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher(tmp_path).run(training_job(finished, tmp_path / "job"), follow)
    assert said[1].startswith("queued: Unschedulable: 0/3 nodes are available")
    assert not cluster.jobs


def test_job_that_somebody_else_deletes_is_a_fault(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    cluster.status = WAITING_FOR_NODE
    with pytest.raises(StepLost, match="deleted from the cluster"):
        launcher(tmp_path).run(
            training_job(finished, tmp_path / "job"), lambda line: cluster.jobs.clear()
        )


def test_earlier_job_makes_way_when_it_has_ended(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    job = training_job(finished, tmp_path / "job")
    name = manifest(job, job.work / "job.json", settings(tmp_path), tmp_path)["metadata"]["name"]
    cluster.jobs[name] = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    cluster.status = {"phase": "Failed", "reason": "Evicted"}
    with pytest.raises(StepLost, match="Evicted"):
        launcher(tmp_path).run(job, lambda _: None)
    assert len(cluster.seen) == 1


@pytest.mark.parametrize(
    ("refusal", "error", "said"),
    [
        (
            (403, "jobs.batch is forbidden"),
            ConfigError,
            r"launcher: kubernetes: 403: jobs.batch is forbidden"
            r"[\s\S]*permission to create, get and delete jobs[\s\S]*a role",
        ),
        ((404, "namespace not found"), ConfigError, r"launcher\.namespace: default"),
        ((422, "cpu: must be a quantity"), ConfigError, "must be a quantity"),
        ((503, "etcd has no leader"), StepLost, "could not be submitted[\\s\\S]*no leader"),
    ],
)
def test_what_the_api_refuses(
    finished: Path,
    tmp_path: Path,
    cluster: Cluster,
    refusal: tuple[int, str],
    error: type[Exception],
    said: str,
) -> None:
    cluster.refusal = refusal
    with pytest.raises(error, match=said):
        launcher(tmp_path).run(training_job(finished, tmp_path / "job"), lambda _: None)


def test_api_that_does_not_answer_is_a_fault(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig(tmp_path / "kubeconfig", free_port())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(StepLost, match="could not be submitted"):
        launcher(tmp_path).run(training_job(finished, tmp_path / "job"), lambda _: None)


def test_manifest_holds_all_that_is_set_over_the_template_and_no_secret(
    finished: Path, tmp_path: Path
) -> None:
    template = {
        "metadata": {"labels": {"team": "nlp"}},
        "spec": {
            "backoffLimit": 5,
            "template": {
                "spec": {
                    "imagePullSecrets": [{"name": "pull"}],
                    "tolerations": [{"key": "spot", "operator": "Exists"}],
                    "containers": [
                        {"name": "step", "image": "other", "env": [{"name": "A", "value": "1"}]}
                    ],
                }
            },
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(template))
    given = settings(
        tmp_path,
        gpus=4,
        cpu="8",
        memory="64Gi",
        node_selector={"gpu": "a100"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        service_account="trainer",
        env={"B": "2"},
        env_from_secrets=["hub"],
        template="job.yaml",
        namespace="ml",
    )
    job = training_job(finished, tmp_path / "job")
    made = manifest(job, job.work / "job.json", given, tmp_path)
    kubernetes_validate.validate(made, VERSION, strict=True)
    pod = made["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert made["metadata"]["labels"]["team"] == "nlp"
    assert made["metadata"]["namespace"] == "ml"
    assert made["spec"]["backoffLimit"] == 0
    assert container["image"] == "registry/ft:1"
    assert container["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert container["resources"] == {
        "limits": {"nvidia.com/gpu": "4", "memory": "64Gi"},
        "requests": {"cpu": "8", "memory": "64Gi"},
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        str(tmp_path),
        "/dev/shm",
    }
    assert container["command"][-1] == "4"
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert [item["key"] for item in pod["tolerations"]] == ["spot", "gpu"]
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("trainer", {"gpu": "a100"})
    judge = manifest(
        job.model_copy(update={"step": "evaluate", "distributed": False}),
        job.work / "job.json",
        given,
        tmp_path,
    )
    assert (
        judge["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        == "1"
    )
    entry = {"name": "HF_TOKEN", "value": "word-of-ada"}
    template["spec"]["template"]["spec"]["containers"][0]["env"] = [entry]  # type: ignore[index]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(template))
    with pytest.raises(
        ConfigError, match="env HF_TOKEN: holds what looks like a secret"
    ) as refused:
        manifest(job, job.work / "job.json", given, tmp_path)
    assert "word-of-ada" not in str(refused.value)


def test_secret_in_the_environment_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="env_from_secrets") as error:
        settings(tmp_path, env={"HF_TOKEN": "hf_abc"})
    assert "hf_abc" not in error.value.errors()[0]["msg"]


def test_store_that_no_volume_holds_is_told(
    finished: Path, tmp_path: Path, cluster: Cluster
) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.volumes: none is mounted at"):
        launcher(tmp_path, volumes=[]).run(training_job(finished, tmp_path / "job"), lambda _: None)


@pytest.mark.parametrize(
    "status",
    [
        {
            "phase": "Failed",
            "conditions": [
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
            ],
        },
        {
            "phase": "Failed",
            "containerStatuses": [
                {"name": "step", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
            ],
        },
        {"phase": "Failed", "reason": "NodeLost"},
    ],
)
def test_end_that_the_cluster_brought_about_is_a_fault(
    tmp_path: Path, status: dict[str, Any]
) -> None:
    end = pod_state({"status": status}, settings(tmp_path))
    assert isinstance(failed("sft", end.exit_code, "", end.detail), StepLost)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            waiting("CreateContainerConfigError", 'secret "hub" not found'),
            r"launcher\.env_from_secrets: .*hub",
        ),
        (
            {
                "phase": "Failed",
                "containerStatuses": [
                    {
                        "name": "step",
                        "state": {"terminated": {"exitCode": 128, "reason": "StartError"}},
                    }
                ],
            },
            r"launcher\.image",
        ),
        (
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "message": 'persistentvolumeclaim "store" not found',
                    }
                ],
            },
            r"launcher\.volumes",
        ),
    ],
)
def test_pod_that_can_never_run_names_its_key(
    tmp_path: Path, status: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        pod_state({"status": status}, settings(tmp_path))


def test_deadline_of_the_template_is_the_users(tmp_path: Path) -> None:
    failed_job = {
        "status": {
            "conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]
        }
    }
    with pytest.raises(ConfigError, match="activeDeadlineSeconds"):
        job_without_pod_state(failed_job, settings(tmp_path))


def test_doctor_asks_whether_the_cluster_answers(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launcher_check(settings(tmp_path), tmp_path).state == "ok"
    kubeconfig(tmp_path / "kubeconfig", free_port())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    check = launcher_check(settings(tmp_path), tmp_path)
    assert (check.state, "Connection refused" in check.found) == ("fail", True)
