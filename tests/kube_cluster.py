"""The cluster that KUBECONFIG names, with a namespace of its own for the tests and a user with the shipped Role."""

from __future__ import annotations

import os
import ssl
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

ROLE_FILE = Path(__file__).parent.parent / "manifests" / "base" / "train-job-role.yaml"
USER = "launcher"
ROLE = "rlhf-ppo-train-job"


class KubeCluster:
    """A namespace, and what a test needs to act there as administrator and as a step."""

    def __init__(self, directory: Path) -> None:
        from kubernetes import client, config

        self.directory = directory
        self.admin = config.new_client_from_config(os.environ["KUBECONFIG"])
        self.core, self.rbac = client.CoreV1Api(self.admin), client.RbacAuthorizationV1Api(self.admin)
        self.objects = client.CustomObjectsApi(self.admin)
        self.namespace = f"rlhf-ppo-test-{uuid.uuid4().hex[:6]}"
        self.core.create_namespace({"metadata": {"name": self.namespace}})
        self.core.create_namespaced_service_account(self.namespace, {"metadata": {"name": USER}})
        self.rules = [d for d in yaml.safe_load_all(ROLE_FILE.read_text()) if d["kind"] == "Role"][0]["rules"]
        self.rbac.create_namespaced_role(self.namespace, {"metadata": {"name": ROLE}, "rules": self.rules})
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ROLE}
        subject = {"kind": "ServiceAccount", "name": USER, "namespace": self.namespace}
        binding = {"metadata": {"name": ROLE}, "roleRef": reference, "subjects": [subject]}
        self.rbac.create_namespaced_role_binding(self.namespace, binding)
        self.kubeconfig = self._kubeconfig()

    def close(self) -> None:
        """Delete the namespace."""
        self.core.delete_namespace(self.namespace)

    def _kubeconfig(self) -> Path:
        """The administrator's, with a service account's token in the place of their credentials."""
        given = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        contexts = {each["name"]: each["context"] for each in given["contexts"]}
        at = contexts[given["current-context"]]["cluster"]
        request = {"spec": {"expirationSeconds": 7200}}
        token = self.core.create_namespaced_service_account_token(USER, self.namespace, request).status.token
        given["users"] = [{"name": USER, "user": {"token": token}}]
        context = {"cluster": at, "user": USER, "namespace": self.namespace}
        given["contexts"], given["current-context"] = [{"name": USER, "context": context}], USER
        path = self.directory / "launcher.conf"
        path.write_text(yaml.safe_dump(given))
        return path

    def allow(self, rules: list[dict[str, Any]]) -> None:
        """Give the step these rights and no others; returns when the server knows."""
        self.rbac.replace_namespaced_role(ROLE, self.namespace, {"metadata": {"name": ROLE}, "rules": rules})
        given = {(r, verb) for rule in rules for r in rule["resources"] for verb in rule["verbs"]}
        everything = {(r, verb) for rule in self.rules for r in rule["resources"] for verb in rule["verbs"]}
        deadline = time.monotonic() + 20
        while any(self.may(*right) != (right in given) for right in everything):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def may(self, resource: str, verb: str) -> bool:
        """Whether the step has a right, as the server says."""
        from kubernetes import client

        name, _, part = resource.partition("/")
        group = "trainer.kubeflow.org" if name == "trainjobs" else ""
        asked = {"namespace": self.namespace, "group": group, "resource": name, "subresource": part, "verb": verb}
        review = {"spec": {"user": f"system:serviceaccount:{self.namespace}:{USER}", "resourceAttributes": asked}}
        return bool(client.AuthorizationV1Api(self.admin).create_subject_access_review(review).status.allowed)

    def make_step_pod(self, **container: Any) -> dict[str, str]:
        """The pod of a step, which nothing runs; what KFP tells the step of it."""
        name = f"step-{uuid.uuid4().hex[:6]}"
        spec = {"nodeName": "train-job-test", "containers": [{"name": "main", "image": "x", **container}]}
        pod = self.core.create_namespaced_pod(self.namespace, {"metadata": {"name": name}, "spec": spec})
        return {"KFP_POD_NAME": name, "KFP_POD_UID": pod.metadata.uid}

    def make_pod(self, name: str, labels: dict[str, str]) -> Any:
        """A pod of a job, which nothing runs."""
        spec = {"nodeName": "train-job-test", "containers": [{"name": "node", "image": "x"}]}
        return self.core.create_namespaced_pod(
            self.namespace, {"metadata": {"name": name, "labels": labels}, "spec": spec}
        )

    def remove_finalizers(self, name: str) -> None:
        """End a deletion in the foreground, as the garbage collector does."""
        from kubernetes.client.exceptions import ApiException

        change, place = {"metadata": {"finalizers": None}}, ("trainer.kubeflow.org", "v1alpha1", self.namespace)
        with suppress(ApiException):
            self.objects.patch_namespaced_custom_object(*place, "trainjobs", name, change)

    def delete_pod(self, name: str) -> None:
        """Delete a pod at once."""
        self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)


def find_cluster(directory: Path) -> KubeCluster:
    """The cluster, or a skipped test that says why."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    from kubernetes import client, config

    admin = config.new_client_from_config(os.environ["KUBECONFIG"])
    groups = {group.name for group in client.ApisApi(admin).get_api_versions().groups}
    if "trainer.kubeflow.org" not in groups:
        pytest.skip("the cluster that KUBECONFIG names has no TrainJobs: install Kubeflow Trainer v2")
    return KubeCluster(directory)


class Kubelet:
    """What the API server asks for the logs of pods on the machine ``name``: files of that name in ``logs``."""

    def __init__(self, cluster: KubeCluster, name: str, logs: Path) -> None:
        self.cluster, self.name = cluster, name
        certificate, key = cluster.directory / "kubelet.crt", cluster.directory / "kubelet.key"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kubelet"]
        files = ["-days", "1", "-out", str(certificate), "-keyout", str(key)]
        subprocess.run([*command, *files], check=True, capture_output=True)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                address = urlsplit(self.path)
                file = logs / address.path.split("/")[-2]
                lines = file.read_bytes().splitlines(keepends=True)
                wanted = parse_qs(address.query).get("tailLines")
                body = b"".join(lines[-int(wanted[0]) :] if wanted else lines)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *given: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self) -> Kubelet:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        with suppress(Exception):
            self.cluster.core.delete_node(self.name)
        self.cluster.core.create_node({"metadata": {"name": self.name}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.server.server_port}},
        }
        self.cluster.core.patch_node_status(self.name, {"status": status})
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.cluster.core.delete_node(self.name)
