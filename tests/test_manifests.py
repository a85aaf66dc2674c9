"""What manifests/ renders to: valid, no right too many or too few, pods that may do little, numbers that fit."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_pipelines.reading import read_parameters
from rlhf_pipelines.rights import RIGHTS, RUNNER, SCHEDULE, roles_in, spelled_out
from rlhf_pipelines.schedules import read_schedules

ROOT = Path(__file__).parent.parent
MANIFESTS = ROOT / "manifests"
KUSTOMIZATIONS = sorted(str(path.parent.relative_to(MANIFESTS)) for path in MANIFESTS.rglob("kustomization.yaml"))
POOLS = ["gpu", "gaudi"]
NEEDED = ["model_name=org/model", "query_dataset=org/data", "reward_model=my_reward:score"]
CUSTOM = {"pipelines.kubeflow.org"}
"""Groups that Kubernetes itself doesn't know."""
Objects = dict[tuple[str, str], dict[str, Any]]

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on the PATH")


class Loader(yaml.SafeLoader):
    """Reads 1e-05 as a number, as Kubernetes and kustomize do; PyYAML wants a point in it."""


Loader.yaml_implicit_resolvers = {
    first: list(found) for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def build(directory: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a directory."""
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader))


@functools.cache
def rendered(name: str) -> Objects:
    """The objects of a kustomization of manifests/ by kind and name."""
    found = build(MANIFESTS / name)
    objects = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert found and len(objects) == len(found)
    return objects


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [each for (found, _), each in rendered(name).items() if found == kind]


def on_top_of(name: str, directory: Path, text: str) -> Path:
    """A kustomization of the user's in ``directory``, on top of one of manifests/."""
    base = os.path.relpath(MANIFESTS / name, directory.resolve())
    (directory / "kustomization.yaml").write_text(f"resources: [{base}]\n{text}")
    return directory


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]
    return found


# 1. Form


def test_there_is_what_the_readme_promises() -> None:
    promised = {"base", "overlays/gpu", "overlays/gaudi", "mlflow/base", "mlflow/postgresql", "mlflow/s3"}
    assert promised <= set(KUSTOMIZATIONS)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_kustomization_builds_to_what_kubernetes_1_33_knows(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for each in rendered(name).values():
        if each["apiVersion"].partition("/")[0] not in CUSTOM:
            validate.validate(each, "1.33", strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_everything_has_a_namespace_and_says_what_it_is_part_of(name: str) -> None:
    for each in rendered(name).values():
        metadata = each["metadata"]
        assert metadata["namespace"] == "kubeflow", metadata["name"]
        pods = [pod_of(each)["metadata"]] if each["kind"] in ("Job", "Deployment") else []
        for labels in [found["labels"] for found in (metadata, *pods)]:
            assert labels["app.kubernetes.io/part-of"] == "rlhf-ppo", metadata["name"]
            assert labels["app.kubernetes.io/name"] in ("rlhf-ppo", "mlflow"), metadata["name"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", metadata["name"])


def test_nothing_is_fetched_from_elsewhere() -> None:
    for name in KUSTOMIZATIONS:
        given = yaml.safe_load((MANIFESTS / name / "kustomization.yaml").read_text())
        assert all((MANIFESTS / name / path).exists() for path in given["resources"])
        assert not {"helmCharts", "helmChartInflationGenerator", "generators", "transformers"} & set(given)


def test_yamllint_has_nothing_to_say() -> None:
    pytest.importorskip("yamllint")
    command = [sys.executable, "-m", "yamllint", "--strict", "-c", ".yamllint", "manifests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_secret_lies_in_git() -> None:
    """Secrets are named, never held; the placeholder of the sealed one is no ciphertext either."""
    for path in [path for path in MANIFESTS.rglob("*") if path.is_file()]:
        text = path.read_text()
        assert not re.search(r"^kind: Secret$|secretGenerator|stringData", text, re.M), path
        assert not re.search(
            r"\b(hf|ghp|glpat|xox[bp]|sk)[_-][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}|BEGIN [A-Z ]*KEY", text
        )
        assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), path
    sealed = yaml.safe_load((MANIFESTS / "examples" / "sealed-secret.yaml").read_text())
    assert sealed["spec"]["encryptedData"] == {"HF_TOKEN": "written-by-kubeseal"}


def test_the_examples_make_the_secret_that_the_pipeline_reads_and_sync_an_overlay_that_there_is() -> None:
    from rlhf_pipelines.ppo import HF_SECRET

    read = {path.stem: yaml.safe_load(path.read_text()) for path in (MANIFESTS / "examples").glob("*.yaml")}
    external, sealed, application = (read[name] for name in ("external-secret", "sealed-secret", "argocd-application"))
    assert external["spec"]["target"]["name"] == sealed["spec"]["template"]["metadata"]["name"] == HF_SECRET
    assert (
        [each["secretKey"] for each in external["spec"]["data"]]
        == list(sealed["spec"]["encryptedData"])
        == ["HF_TOKEN"]
    )
    assert str(Path(application["spec"]["source"]["path"]).relative_to("manifests")) in KUSTOMIZATIONS
    for each in read.values():
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rlhf-ppo"


# 2. The pipeline, for Argo CD


def as_generated() -> dict[str, Any]:
    text = (MANIFESTS / "base" / "pipeline.yaml").read_text()
    return {each["kind"]: each for each in yaml.load_all(text, Loader)}


def test_the_pipeline_stays_as_it_was_generated_and_its_versions_are_kept() -> None:
    written = as_generated()
    for kind, wave in (("Pipeline", 0), ("PipelineVersion", 1)):
        (found,) = of_kind("base", kind)
        assert found["spec"] == written[kind]["spec"]
        assert found["metadata"]["name"] == written[kind]["metadata"]["name"]
        annotations = found["metadata"]["annotations"]
        assert annotations["argocd.argoproj.io/sync-wave"] == str(wave)
        assert annotations["argocd.argoproj.io/sync-options"] == "ServerSideApply=true,Prune=false"


def test_schedules_are_applied_when_the_versions_are_there() -> None:
    (job,) = of_kind("base", "Job")
    annotations = job["metadata"]["annotations"]
    assert annotations["argocd.argoproj.io/hook"] == "PostSync"
    assert annotations["argocd.argoproj.io/hook-delete-policy"] == "BeforeHookCreation"
    assert int(annotations["argocd.argoproj.io/sync-wave"]) > 1


@pytest.mark.parametrize("name", ["base", "overlays/gpu", "overlays/gaudi", "mlflow/s3"])
def test_namespace_and_registry_are_changed_in_one_place(name: str, tmp_path: Path) -> None:
    text = """namespace: team-a
images:
  - {name: rlhf-ppo/cpu, newName: registry.example/rlhf-ppo/cpu, newTag: "9"}
"""
    found = build(on_top_of(name, tmp_path, text))
    assert {each["metadata"]["namespace"] for each in found} == {"team-a"}
    subjects = [subject for each in found for subject in each.get("subjects", [])]
    assert all(subject["namespace"] == "team-a" for subject in subjects)
    images = [pod_of(each)["spec"]["containers"][0]["image"] for each in found if each["kind"] in ("Job", "Deployment")]
    assert images == ["registry.example/rlhf-ppo/cpu:9"]


def test_the_kustomizations_in_the_readme_build(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (MANIFESTS / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        directory = tmp_path / str(number)
        directory.mkdir()
        here = os.path.relpath(MANIFESTS, directory.resolve())
        (directory / "kustomization.yaml").write_text(re.sub(r"\bmanifests/", f"{here}/", block))
        assert build(directory)


# 3. Schedules and parameters


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("overlays/*/parameters*.yaml")), ids=str)
def test_a_preset_holds_parameters_that_there_are_with_values_that_they_take(path: Path) -> None:
    read_parameters(None, str(path), NEEDED)


@pytest.mark.parametrize("pool", POOLS)
def test_a_schedule_is_one_that_kfp_takes_with_parameters_that_the_pipeline_takes(pool: str, tmp_path: Path) -> None:
    (config,) = of_kind(f"overlays/{pool}", "ConfigMap")
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    owner, schedules = read_schedules(str(tmp_path / "schedules.yaml"))
    assert owner == f"rlhf-ppo-{pool}" and schedules
    for schedule in schedules:
        assert re.fullmatch(r"([0-9*/,?-]+ ){5}[0-9A-Z*/,?-]+", schedule.cron)
        assert schedule.enabled is False and 1 <= schedule.concurrency <= 10
        assert schedule.pipeline == of_kind("base", "Pipeline")[0]["metadata"]["name"]
        versions = [each["metadata"]["name"] for each in of_kind("base", "PipelineVersion")]
        assert schedule.version in ["latest", *versions]
        assert ("ServiceAccount", schedule.service_account) in rendered(f"overlays/{pool}")
        assert schedule.parameters["node_image"] == f"rlhf-ppo/{pool}:0.1.0" and schedule.parameters["model_name"]


@pytest.mark.parametrize("name", ["base", "overlays/gpu", "overlays/gaudi"])
def test_the_job_reads_the_generated_schedules_and_talks_to_kfp_with_a_token_for_it_alone(name: str) -> None:
    kfp = pytest.importorskip("kfp.client.client")
    credentials = pytest.importorskip("kfp.client")
    (job,), (config,) = of_kind(name, "Job"), of_kind(name, "ConfigMap")
    pod = pod_of(job)["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert container["command"] == ["rlhf-ppo", "schedule", "apply", "/etc/rlhf-ppo/schedules.yaml", "--yes"]
    assert mounts["/etc/rlhf-ppo"]["configMap"]["name"] == config["metadata"]["name"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment[kfp.KF_PIPELINES_ENDPOINT_ENV] == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    place = Path(environment[credentials.KF_PIPELINES_SA_TOKEN_ENV])
    assert str(place) == credentials.KF_PIPELINES_SA_TOKEN_PATH
    (source,) = mounts[str(place.parent)]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert source["serviceAccountToken"]["path"] == place.name
    assert pod["automountServiceAccountToken"] is False
    account = rendered(name)["ServiceAccount", pod["serviceAccountName"]]
    assert account["automountServiceAccountToken"] is False
    assert (
        job["spec"]["backoffLimit"] and job["spec"]["activeDeadlineSeconds"] and job["spec"]["ttlSecondsAfterFinished"]
    )


def asked_by(pool: str) -> dict[str, Any]:
    """What all training pods of parameters-nodes.yaml ask for together, in the names of a quota."""
    from kubernetes.utils import parse_quantity

    node = yaml.safe_load((MANIFESTS / "overlays" / pool / "parameters-nodes.yaml").read_text())
    pod = {
        "requests.cpu": node["node_cpu"],
        "requests.memory": node["node_memory"],
        f"requests.{node['node_accelerator']}": node["node_accelerator_count"],
        **node.get("node_resources", {}),
    }
    return {name: node["node_count"] * parse_quantity(each) for name, each in pod.items()}


@pytest.mark.parametrize("pool", POOLS)
def test_a_quota_holds_one_run_on_all_its_nodes_and_no_second_one(pool: str) -> None:
    from kubernetes.utils import parse_quantity

    (quota,) = of_kind(f"overlays/{pool}/quota", "ResourceQuota")
    hard = {name: parse_quantity(each) for name, each in quota["spec"]["hard"].items()}
    asked = asked_by(pool)
    assert set(asked) | {"pods"} == set(hard)
    for name, needed in asked.items():
        assert needed <= hard[name] < 2 * needed, name
        # Cards and hugepages are the training pods' alone; of the rest the steps and KFP's own pods have some, too.
        assert (hard[name] == needed) is (name not in ("requests.cpu", "requests.memory")), name
    (limits,) = of_kind(f"overlays/{pool}/quota", "LimitRange")
    assert [set(each) for each in limits["spec"]["limits"]] == [{"type", "defaultRequest"}]
    assert set(limits["spec"]["limits"][0]["defaultRequest"]) == {"cpu", "memory"}


# 4. Pods and network


@pytest.mark.parametrize(
    ("name", "kind"),
    [("base", "Job"), *((f"mlflow/{each}", "Deployment") for each in ("base", "postgresql", "s3"))],
)
def test_a_pod_keeps_to_the_restricted_pod_security_standard(name: str, kind: str) -> None:
    (workload,) = of_kind(name, kind)
    pod = pod_of(workload)["spec"]
    assert_restricted(pod)
    (container,) = pod["containers"]
    assert "emptyDir" in next(each for each in pod["volumes"] if each["name"] == "tmp")
    assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


def assert_restricted(pod: dict[str, Any]) -> None:
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    allowed = {"configMap", "projected", "emptyDir", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all({"cpu", "memory"} == set(container["resources"][kind]) for kind in ("requests", "limits"))
    assert not any("hostPort" in port for port in container.get("ports", []))


def selects(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = policy["spec"]["podSelector"]
    assert set(wanted) == {"matchLabels"}
    return bool(wanted["matchLabels"].items() <= labels.items())


def test_a_network_policy_selects_its_pods_and_no_others() -> None:
    of_run = {"pipelines.kubeflow.org/v2_component": "true", "pipeline/runid": "1"}  # KFP's, on every pod of a run.
    pods = {
        "rlhf-ppo-runs": of_run,
        "rlhf-ppo-schedule": pod_of(of_kind("base", "Job")[0])["metadata"]["labels"],
        "mlflow": pod_of(of_kind("mlflow/base", "Deployment")[0])["metadata"]["labels"],
    }
    policies = [*of_kind("base", "NetworkPolicy"), *of_kind("mlflow/base", "NetworkPolicy")]
    assert {each["metadata"]["name"] for each in policies} == set(pods)
    for policy, (name, labels) in itertools.product(policies, pods.items()):
        assert selects(policy, labels) is (policy["metadata"]["name"] == name)
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def reachable(policy: dict[str, Any]) -> set[tuple[str, int]]:
    """Where to, in one word, and the port."""
    found = set()
    for rule in policy["spec"]["egress"]:
        to = yaml.safe_dump(rule.get("to", "anywhere"))
        where = next((word for word in ("ml-pipeline", "mlflow", "kubeflow") if f": {word}\n" in to), "anywhere")
        found |= {(where, port["port"]) for port in rule["ports"]}
    return found


def test_a_run_and_the_schedule_job_reach_what_they_need() -> None:
    of_kfp = {("kubeflow", port) for port in (8888, 8887, 8080, 9000, 8333)}
    everywhere = {("anywhere", port) for port in (53, 443, 6443)}
    policies = {each["metadata"]["name"]: each for each in of_kind("base", "NetworkPolicy")}
    assert reachable(policies["rlhf-ppo-runs"]) == of_kfp | everywhere | {("mlflow", 5000)}
    assert reachable(policies["rlhf-ppo-schedule"]) == {("anywhere", 53), ("ml-pipeline", 8888)}
    for name, ports in {"base": {53}, "postgresql": {53, 5432}, "s3": {53, 5432, 443, 9000, 8333}}.items():
        (policy,) = of_kind(f"mlflow/{name}", "NetworkPolicy")
        assert reachable(policy) == {("anywhere", port) for port in ports}


# 5. Rights


ACCOUNTS = {role: found.accounts for role, found in roles_in(ROOT).items()}


def needed_by(account: str) -> set[tuple[str, str, str, str]]:
    """All that some code needs in the name of a service account; docs/rights.md says which."""
    return {right.granted() for right in RIGHTS if account in ACCOUNTS.get(right.role, [])}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_each_service_account_has_the_rights_that_some_code_needs_and_no_others(name: str) -> None:
    granted: dict[str, set[tuple[str, str, str, str]]] = {}
    for binding in of_kind(name, "RoleBinding"):
        rules = rendered(name)["Role", binding["roleRef"]["name"]]["rules"]
        for subject in binding["subjects"]:
            granted.setdefault(subject["name"], set()).update(spelled_out(rules))
    accounts = {RUNNER, SCHEDULE} if name in ("base", "overlays/gpu", "overlays/gaudi") else set()
    assert granted == {account: needed_by(account) for account in accounts}
    assert not [each for each in rendered(name).values() if each["kind"].startswith("Cluster")]


# 6. A real API server


class Applied:
    """A namespace of its own on the server that KUBECONFIG names."""

    def __init__(self, directory: Path) -> None:
        from kubernetes import client, config

        self.api = config.new_client_from_config(os.environ["KUBECONFIG"])
        self.core, self.directory = client.CoreV1Api(self.api), directory
        self.namespace = f"rlhf-ppo-test-{uuid.uuid4().hex[:6]}"
        self.core.create_namespace({"metadata": {"name": self.namespace}})

    def kubectl(self, *arguments: str) -> str:
        command = ["kubectl", "-n", self.namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, name: str, *flags: str) -> str:
        place = on_top_of(name, self.directory, f"namespace: {self.namespace}\n")
        return self.kubectl("apply", "--server-side", *flags, "-k", str(place))

    def there(self, name: str) -> dict[tuple[str, str], dict[str, Any]]:
        """The objects that are there, of the kinds of a kustomization."""
        kinds = {(each["kind"], *each["apiVersion"].rpartition("/")) for each in rendered(name).values()}
        asked = ",".join(f"{kind}.{version}.{group}" if group else kind for kind, group, _, version in kinds)
        found = json.loads(self.kubectl("get", asked, "-o", "json"))["items"]
        return {(each["kind"], each["metadata"]["name"]): each for each in found}


def content(found: dict[str, Any]) -> dict[str, Any]:
    """All of an object, its generation included, but for the server's own notes on when it was written."""
    metadata = {key: each for key, each in found["metadata"].items() if key not in ("resourceVersion", "managedFields")}
    return found | {"metadata": metadata}


@pytest.fixture
def applied(tmp_path: Path) -> Iterator[Applied]:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    from kubernetes import client, config

    groups = client.ApisApi(config.new_client_from_config(os.environ["KUBECONFIG"])).get_api_versions().groups
    if "pipelines.kubeflow.org" not in {group.name for group in groups}:
        pytest.skip("the cluster that KUBECONFIG names has no Pipelines: install KFP in its Kubernetes-native mode")
    found = Applied(tmp_path)
    yield found
    found.core.delete_namespace(found.namespace)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_real_server_takes_it_all_and_a_second_time_changes_nothing(name: str, applied: Applied) -> None:
    applied.apply(name, "--dry-run=server")
    ours = set(rendered(name))
    assert not ours & set(applied.there(name))
    applied.apply(name)
    first = applied.there(name)
    assert ours <= set(first)
    applied.apply(name)
    second = applied.there(name)
    assert {key: content(each) for key, each in second.items()} == {key: content(each) for key, each in first.items()}
    for kind, each in as_generated().items() if name == "base" else ():
        assert second[kind, each["metadata"]["name"]]["spec"] == each["spec"]


def rules_of(applied: Applied, account: str) -> set[tuple[str, str, str, str]]:
    """All that the server lets a service account do in the namespace, beyond what it lets anybody do."""
    from kubernetes import client, config

    def of(user: str) -> set[tuple[str, str, str, str]]:
        api = config.new_client_from_config(os.environ["KUBECONFIG"])
        api.set_default_header("Impersonate-User", user)
        review = {"spec": {"namespace": applied.namespace}}
        status = client.AuthorizationV1Api(api).create_self_subject_rules_review(review).status
        assert not status.incomplete
        return set(spelled_out([client.ApiClient().sanitize_for_serialization(rule) for rule in status.resource_rules]))

    # The server tells what is granted to a user by name; what all authenticated ones have comes with a group.
    return of(f"system:serviceaccount:{applied.namespace}:{account}") - of("system:serviceaccount:nowhere:nobody")


def test_a_real_server_grants_what_is_needed_and_nothing_else(applied: Applied) -> None:
    from kubernetes import client

    applied.apply("base")
    authorization = client.AuthorizationV1Api(applied.api)
    for account in (RUNNER, SCHEDULE, "default"):
        wanted = needed_by(account)
        deadline = time.monotonic() + 20
        while rules_of(applied, account) != wanted:
            assert time.monotonic() < deadline, rules_of(applied, account) ^ wanted
            time.sleep(0.2)
        for other, (group, resource, verb, name) in itertools.product(
            (RUNNER, SCHEDULE), {right.granted() for right in RIGHTS}
        ):
            if other != account:
                continue
            resource, _, part = resource.partition("/")
            asked = {"namespace": applied.namespace, "group": group, "resource": resource, "verb": verb}
            for asked_name, expected in ((name, True), (f"{name}-not", not name)):
                attributes = {**asked, "subresource": part, "name": asked_name if name else ""}
                user = f"system:serviceaccount:{applied.namespace}:{account}"
                review = {"spec": {"user": user, "resourceAttributes": attributes}}
                allowed = authorization.create_subject_access_review(review).status.allowed
                full = f"{resource}/{part}" if part else resource
                assert bool(allowed) is (expected and (group, full, verb, name) in wanted), attributes


# 7. A real MLflow server


class TrackingServer:
    """What MLflow's container runs, with ``volume`` in the place of its volume."""

    def __init__(self, volume: Path) -> None:
        (workload,) = of_kind("mlflow/base", "Deployment")
        (container,) = pod_of(workload)["spec"]["containers"]
        (data,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "data"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        command = [self.port if word == "5000" else word for word in container["command"]]
        assert command[0] == "mlflow" and self.port in command
        environment = {"NAMESPACE": "kubeflow", "PATH": os.environ["PATH"]}
        for each in container["env"]:  # In their order, as Kubernetes fills one into the next.
            if "value" in each:
                value = each["value"].replace(data, str(volume)).replace("$(NAMESPACE)", environment["NAMESPACE"])
                environment[each["name"]] = value
        assert "$(" not in str(environment)
        self.home, self.cwd = volume.parent / "tmp", volume.parent / "read-only"
        for directory in (volume, self.home, self.cwd):
            directory.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**environment, "HOME": str(self.home), "TMPDIR": str(self.home)},
            cwd=self.cwd,
            stdout=(volume.parent / "log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def status(self, path: str, host: str, method: str = "GET", body: bytes | None = None) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, method=method)
        request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_mlflow_answers_to_the_names_of_its_service_and_keeps_everything_on_its_volume(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    server, volume = TrackingServer(tmp_path / "volume"), tmp_path / "volume"
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    service = of_kind("mlflow/base", "Service")[0]
    assert service["spec"]["ports"][0]["port"] == 5000 and service["metadata"]["name"] == "mlflow"
    try:
        for _ in range(600):
            assert server.process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                server.status("/health", "10.0.0.7:5000")
                break
            except OSError:
                time.sleep(0.2)
        assert server.status("/health", "10.0.0.7:5000") == 200  # The kubelet asks the pod's address.
        for host in ("mlflow", "mlflow.kubeflow", "mlflow.kubeflow.svc", "mlflow.kubeflow.svc.cluster.local"):
            assert server.status(search, f"{host}:5000") == 200, host
        assert server.status(search, "localhost:5000") == 200
        for host in ("evil.example", "evil.example:5000", "mlflow.kubeflow.evil.example:5000", "10.0.0.7:5000"):
            assert server.status(search, host) == 403, host
        file = "/api/2.0/mlflow-artifacts/artifacts/a/b.txt"
        assert server.status(file, "mlflow.kubeflow.svc.cluster.local:5000", "PUT", b"kept") == 200
        assert (volume / "artifacts" / "a" / "b.txt").read_bytes() == b"kept"
        assert (volume / "mlflow.db").stat().st_size > 0
        assert not list(server.cwd.iterdir())
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["base", "postgresql", "s3"])
def test_mlflow_is_reached_and_does_not_read_its_service_as_its_settings(name: str) -> None:
    (deployment,), (service,) = of_kind(f"mlflow/{name}", "Deployment"), of_kind(f"mlflow/{name}", "Service")
    pod = pod_of(deployment)
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["enableServiceLinks"] is False  # Else MLFLOW_PORT is tcp://10.0.0.1:5000.
    (container,) = pod["spec"]["containers"]
    names = [each["name"] for each in container["env"]]
    assert len(set(names)) == len(names)
    assert names.index("NAMESPACE") < names.index("MLFLOW_SERVER_ALLOWED_HOSTS")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    secrets = {
        each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "secretKeyRef" in str(each)
    }
    assert ("PGPASSWORD" in secrets) is (name != "base") and ("AWS_SECRET_ACCESS_KEY" in secrets) is (name == "s3")
    assert bool(of_kind(f"mlflow/{name}", "PersistentVolumeClaim")) is (name != "s3")
