"""The KFP API server: how it is reached, asked again while it can't answer, and quoted where it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_ppo.errors import InputError

TOKEN_VARIABLE, COOKIE_VARIABLE = "KF_PIPELINES_TOKEN", "KF_PIPELINES_COOKIE"
"""Environment variables with a bearer token, and with the session's cookie of a login page."""
SERVICE_ACCOUNT_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"
"""Environment variable that names the file with a pod's token for KFP; it is read anew, because it expires."""
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
PROXY = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
"""Where Kubernetes' API server hands requests on to KFP's."""
TRANSIENT = {408, 429, 500, 502, 503, 504}
TRIES = 6
ANSWER = (10, 60)
"""Seconds to connect, and to wait for an answer."""
PAGE = 100
Result = TypeVar("Result")
Found = TypeVar("Found")


class KubeflowError(RuntimeError):
    """The KFP API server refuses what is asked, with an HTTP ``status``, or doesn't answer (0)."""

    def __init__(self, words: str, status: int = 0) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Server:
    """The API server, by KFP's client; ``namespace`` is empty for a single-user Kubeflow, ``pages`` where unknown."""

    client: Any
    namespace: str
    pages: str

    def ask(self, doing: str, call: Callable[..., Result], **named: Any) -> Result:
        """The answer to a call that may be repeated. Raises KubeflowError where there is none, or a refusal."""
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for number in range(TRIES):
            try:
                return call(_request_timeout=ANSWER, **named)
            except (ApiException, HTTPError) as error:
                if not temporary(error):
                    raise KubeflowError(f"{doing}: {_reason(error)}{_helps(error)}", _status(error)) from None
                if number == TRIES - 1:
                    raise KubeflowError(f"{doing}: the KFP API server does not answer: {_reason(error)}") from None
            time.sleep(_pause(number))
        raise AssertionError("unreachable")

    def all(self, doing: str, call: Callable[..., Any], field: str, **named: Any) -> Iterator[Any]:
        """What a list call gives, page by page."""
        token = ""
        while True:
            page = self.ask(doing, call, page_token=token, page_size=PAGE, **named)
            yield from getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return

    def make(self, doing: str, look: Callable[[], Found | None], call: Callable[..., Found], **named: Any) -> Found:
        """What ``look`` finds, or else what ``call`` makes; looked for again before each repetition, so that a lost
        answer makes no second one.
        """
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for number in range(TRIES):
            found = look()
            if found is not None:
                return found
            try:
                return call(_request_timeout=ANSWER, **named)
            except (ApiException, HTTPError) as error:
                # 409: somebody else has made it since.
                if not temporary(error) and getattr(error, "status", None) != 409:
                    raise KubeflowError(f"{doing}: {_reason(error)}{_helps(error)}", _status(error)) from None
                if number == TRIES - 1:
                    raise KubeflowError(f"{doing}: the KFP API server does not answer: {_reason(error)}") from None
            time.sleep(_pause(number))
        raise AssertionError("unreachable")

    def remove(self, doing: str, call: Callable[..., Any], **named: Any) -> None:
        """Ask for a deletion; what is gone already is deleted."""
        try:
            self.ask(doing, call, **named)
        except KubeflowError as error:
            if error.status != 404:
                raise

    def text(self, path: str) -> str:
        """What the server answers to a path that its client doesn't know; empty where it gives nothing."""
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        api_client = _api_client(self.client)
        asked = {"auth_settings": ["Bearer"], "_preload_content": False, "_return_http_data_only": True}
        try:
            answer = api_client.call_api(path, "GET", _request_timeout=ANSWER, **asked)
            return str(answer.data.decode("utf-8", errors="replace"))
        except (ApiException, HTTPError):
            return ""

    def find_experiment(self, name: str) -> Any:
        """The experiment of this name, or None."""
        call = self.client.experiments.experiment_service_list_experiments
        scope = {"namespace": self.namespace} if self.namespace else {}
        found = self.all(f"look for the experiment {name}", call, "experiments", filter=called(name), **scope)
        return next(found, None)

    def experiment(self, name: str) -> str:
        """The id of the experiment, made where there is none."""
        from kfp_server_api import V2beta1Experiment

        made = self.make(
            f"make the experiment {name}",
            lambda: self.find_experiment(name),
            self.client.experiments.experiment_service_create_experiment,
            experiment=V2beta1Experiment(display_name=name, namespace=self.namespace or None),
        )
        return str(made.experiment_id)


def connect(host: str = "", namespace: str = "", kube_context: str = "", ca_cert: str = "") -> Server:
    """The server at ``host``, else at KF_PIPELINES_ENDPOINT, else in this cluster, else by the kubeconfig's proxy.

    Credentials come from the environment: TOKEN_VARIABLE, COOKIE_VARIABLE, or the token of a pod's service account.
    Raises InputError where nothing says which server, KubeflowError where the kubeconfig leads to none.
    """
    from kfp.client import Client
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    host = host or os.environ.get("KF_PIPELINES_ENDPOINT", "")
    if host and not host.startswith(("http://", "https://")):
        raise InputError(f"--host={host!r} is no address: begin with http:// or https://")
    if not host and not _in_cluster() and not _kubeconfig():
        raise InputError(
            "no KFP API server is named: give --host, set KF_PIPELINES_ENDPOINT, or have a kubeconfig for the cluster"
        )
    if not host and _in_cluster():
        host = IN_CLUSTER
    token, cookie = (os.environ.get(name, "").strip() for name in (TOKEN_VARIABLE, COOKIE_VARIABLE))
    credentials = None
    if not token and os.environ.get(SERVICE_ACCOUNT_VARIABLE):
        credentials = ServiceAccountTokenVolumeCredentials()
    try:
        with _quiet():
            client = Client(
                host=host or "http://kubeconfig.invalid",
                # Any other namespace than KFP's own keeps the client from asking the server now, and from writing what
                # it answers into the home directory. It stands in no address.
                namespace=namespace or "-",
                existing_token=token or None,
                cookies=cookie or None,
                credentials=credentials,
                ssl_ca_cert=ca_cert or None,
                ui_host=host or None,
            )
            if not host:
                _through_kubernetes(_api_client(client), kube_context)
    except Exception as error:  # of the client, or of kubernetes' client
        raise KubeflowError(f"reach KFP through the kubeconfig: {_reason(error)}") from None
    return Server(client, namespace, f"{host.rstrip('/')}/#" if host else "")


def _through_kubernetes(api_client: Any, context: str) -> None:
    """Let the client ask through Kubernetes' API server, as the kubeconfig says.

    KFP's own way there loses the path whenever it looks at a token (kubeflow/pipelines#8313).
    """
    from kfp_server_api.rest import RESTClientObject
    from kubernetes.config import load_kube_config

    configuration = api_client.configuration
    load_kube_config(client_configuration=configuration, context=context or None)
    address, refresh = configuration.host + PROXY, configuration.refresh_api_key_hook

    def refresh_the_token_alone(given: Any) -> None:
        if refresh:
            refresh(given)  # It sets the address and itself, too.
        given.host, given.refresh_api_key_hook = address, refresh_the_token_alone

    refresh_the_token_alone(configuration)
    api_client.rest_client = RESTClientObject(configuration)  # With the kubeconfig's certificates.


def _api_client(client: Any) -> Any:
    """What all of KFP's generated clients ask with."""
    return client.runs.run_service_get_run.__self__.api_client


def called(name: str, key: str = "display_name") -> str:
    """A filter of list calls: what has exactly this name, or this text in another field."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": name}]})


def temporary(error: Any) -> bool:
    """Whether the same request may succeed later: no connection, or the server is at fault or too busy."""
    from kfp_server_api.exceptions import ApiException

    return not isinstance(error, ApiException) or not error.status or error.status in TRANSIENT


def _status(error: Any) -> int:
    return int(getattr(error, "status", None) or 0)


def _reason(error: Any) -> str:
    """What the server said, in its own words."""
    status = getattr(error, "status", None)
    try:
        said = json.loads(error.body or "")
        message = said.get("message") or said.get("error_message") or said["error"]
    except (AttributeError, TypeError, ValueError, KeyError):
        message = getattr(error, "reason", None) or error
    return f"{str(message).strip().splitlines()[0]} ({status})" if status else str(message)


def _helps(error: Any) -> str:
    if error.status == 401:
        return f": log in anew, and give the token by {TOKEN_VARIABLE} or the session's cookie by {COOKIE_VARIABLE}"
    if error.status == 403:
        return ": the user, or the step's service account, needs the rights of manifests/base in this namespace"
    return ""


def _pause(number: int) -> float:
    return float(os.environ.get("RLHF_PPO_RETRY_PAUSE", "1")) * 2**number


def _in_cluster() -> bool:
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _kubeconfig() -> bool:
    return bool(os.environ.get("KUBECONFIG")) or os.path.exists(os.path.expanduser("~/.kube/config"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """KFP's client prints, logs and warns."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
