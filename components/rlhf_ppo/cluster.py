"""The Kubernetes cluster that a step runs in: asked again while it can't answer, quoted where it refuses."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ppo.errors import InputError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATIENCE = 600.0
"""Seconds for which a cluster that doesn't answer is asked again."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
ANSWER = (10, 60)
"""Seconds to connect, and to wait for an answer."""
ROLE = "manifests/base/train-job-role.yaml"
FORWARDED = re.compile(r"(MLFLOW|RLHF_PPO|WANDB|HF|PT_HPU|HABANA|HCCL|NCCL|GLOO|FI)_\w+")
"""Variables of a step that its training pods get as well."""
LOCAL = {"RLHF_PPO_EVENTS", "RLHF_PPO_SPOOL", "HF_HOME", "HABANA_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES"}
"""Of these the ones that name places in the step's own pod, or cards: which a pod sees its device plugin says."""
CREDENTIAL = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIAL")
CREDENTIAL_INSIDE = re.compile(r"://[^/@\s]+@")


class ClusterError(RuntimeError):
    """The cluster refuses what a step asks for, or doesn't answer."""


class Environment(NamedTuple):
    """Variables for other pods: Kubernetes' ``env``, and what was left out, by name."""

    entries: list[dict[str, Any]]
    left_out: list[str]


class Cluster:
    """The cluster that the pod runs in, or the one that KUBECONFIG names, and the namespace."""

    def __init__(self, api_client: Any, namespace: str) -> None:
        self.api_client, self.namespace, self.patience = api_client, namespace, PATIENCE

    @classmethod
    def find(cls) -> Cluster:
        """The cluster at hand. Raises InputError where there is none."""
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise InputError('node_count needs the package kubernetes: pip install "rlhf-ppo[cluster]"') from error
        configuration = client.Configuration()
        if os.environ.get("KUBERNETES_SERVICE_HOST") and (SERVICE_ACCOUNT / "token").exists():
            config.load_incluster_config(client_configuration=configuration)
            namespace = (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        elif os.environ.get("KUBECONFIG"):
            files = os.environ["KUBECONFIG"]
            _, context = config.list_kube_config_contexts(files)
            namespace = context["context"].get("namespace", "default")
            config.load_kube_config(files, client_configuration=configuration)
        else:
            raise InputError(
                "node_count needs a cluster, and there is none here: start the pipeline on one (rlhf-ppo submit), name "
                "one in KUBECONFIG, or set node_count=0"
            )
        configuration.retries = False  # ``ask`` does that.
        return cls(client.ApiClient(configuration), namespace)

    def ask(
        self,
        doing: str,
        call: Callable[..., Any],
        *given: Any,
        unless: Iterable[int] = (),
        patience: float | None = None,
        **named: Any,
    ) -> Any:
        """The answer to ``call``, or None where its status is one of ``unless``.

        Raises ClusterError where it is refused, and where there was no answer for ``patience`` seconds, else its own.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        deadline = time.monotonic() + (self.patience if patience is None else patience)
        pause = FIRST_PAUSE
        while True:
            try:
                return call(*given, _request_timeout=ANSWER, **named)
            except (ApiException, HTTPError) as error:
                if isinstance(error, ApiException) and error.status in unless:
                    return None
                if not temporary(error):
                    raise self.refused(doing, error) from error
                if time.monotonic() + pause > deadline:
                    raise ClusterError(f"{doing}: the cluster does not answer: {reason(error)}") from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def refused(self, doing: str, error: Any) -> ClusterError:
        """What to raise where the cluster refuses ``doing``: its words, and what helps."""
        said, helps = reason(error), ""
        if error.status == 401:
            helps = ": the token of the step's service account, or of KUBECONFIG, is not valid"
        elif error.status == 403 and "denied the request" not in said:
            helps = f": bind the Role in {ROLE} to the service account of this step, in the namespace {self.namespace}"
        elif error.status == 404 and "TrainJob" in doing:
            helps = ": install Kubeflow Trainer v2, which has the resource TrainJob"
        elif "untime" in said:
            helps = ": node_runtime names the runtime; kubectl get clustertrainingruntimes lists those that there are"
        return ClusterError(f"{doing}: {said}{helps}")

    def own_pod(self) -> Any:
        """The pod of this step, or None where it may not be read or is not known."""
        from kubernetes.client import CoreV1Api

        name = os.environ.get("KFP_POD_NAME")
        if not name:
            return None
        read = CoreV1Api(self.api_client).read_namespaced_pod
        return self.ask("read this step's pod", read, name, self.namespace, unless=(403, 404))

    def environment(self, pod: Any) -> Environment:
        """What pods that work for this step's ``pod`` must find: its secrets and config maps by reference, never by
        value, and the plain settings of trackers, hubs and devices.
        """
        containers = pod.spec.containers if pod else []
        main = next((found for found in containers if found.name == "main"), *containers[:1] or [None])
        referred = {}
        for entry in self.api_client.sanitize_for_serialization(main.env or []) if main else []:
            source = entry.get("valueFrom", {})
            if "secretKeyRef" in source or "configMapKeyRef" in source:
                referred[entry["name"]] = entry
        plain, left_out = [], []
        for name, value in sorted(os.environ.items()):
            if name in referred or name in LOCAL or not FORWARDED.fullmatch(name):
                continue
            if CREDENTIAL.search(name) or CREDENTIAL_INSIDE.search(value):
                left_out.append(name)
            else:
                plain.append({"name": name, "value": value})
        return Environment([*plain, *referred.values()], left_out)


def owner() -> list[dict[str, Any]]:
    """This step's pod as what owns others: they are deleted with it. Empty where KFP doesn't say who it is."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    if not name or not uid:
        return []
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid, "blockOwnerDeletion": False}]


def temporary(error: Any) -> bool:
    """Whether the same request may succeed later: no connection, or the server is at fault or too busy."""
    from kubernetes.client.exceptions import ApiException

    return not isinstance(error, ApiException) or not error.status or error.status == 429 or error.status >= 500


def reason(error: Any) -> str:
    """What the server said, in its own words."""
    try:
        message = json.loads(getattr(error, "body", None) or "")["message"]
    except (TypeError, ValueError, KeyError):
        message = getattr(error, "reason", None) or error
    status = getattr(error, "status", None)
    return f"{message} ({status})" if status else str(message)
