"""A KFP API server on localhost, in memory, as strict as the real one is, for the real kfp client.

Every body is read with the models of kfp_server_api, and a field that they don't have is refused. Parameters are
checked against the pipeline as the server does it (kubeflow/pipelines, backend/src/apiserver/template/v2_template.go):
none that is unknown, none of another type, none that is null, none missing that has no default.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from hub_server import CUT, Fault

NOW = "2026-01-01T00:00:00Z"
TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "STRUCT": (dict,),
    "LIST": (list,),
}
Object = dict[str, Any]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words


@dataclass
class Kfp:
    """The server, and what it has; ``script`` are the states that a run goes through, one for each look at it.

    With ``token`` or ``cookie`` it lets in who has it; with ``prefix`` it is reached as by Kubernetes' proxy. After
    ``dead_after`` requests it answers none; ``watch`` is called after each that it did.
    """

    token: str = ""
    cookie: str = ""
    prefix: str = ""
    multi_user: bool = False
    experiments: dict[str, Object] = field(default_factory=dict)
    runs: dict[str, Object] = field(default_factory=dict)
    recurring: dict[str, Object] = field(default_factory=dict)
    pipelines: dict[str, Object] = field(default_factory=dict)
    versions: dict[str, Object] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    script: list[Object] = field(default_factory=lambda: [{"state": "SUCCEEDED"}])
    faults: list[Fault] = field(default_factory=list)
    fault_at: dict[int, Fault] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    dead_after: int | None = None
    watch: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        handler = type("Bound", (_Handler,), {"kfp": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.server.server_close()

    def upload(self, pipeline: str, version: str, spec: Object, **more: Any) -> str:
        """Have a pipeline of this name with one more version; returns the version's id."""
        made = {p["name"]: p for p in self.pipelines.values()}.get(pipeline)
        if made is None:
            made = {"pipeline_id": str(uuid.uuid4()), "name": pipeline, "display_name": pipeline, "created_at": NOW}
            made |= more
            self.pipelines[made["pipeline_id"]] = made
        number = len(self.versions)
        name = str(uuid.uuid4())
        self.versions[name] = {
            "pipeline_id": made["pipeline_id"], "pipeline_version_id": name, "name": version, "display_name": version,
            "created_at": f"2026-01-01T00:00:{number:02d}Z", "pipeline_spec": spec,
        }  # fmt: skip
        return name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    kfp: Kfp

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        whole = unquote(address.path)
        path = "/" + whole.removeprefix(self.kfp.prefix).lstrip("/")  # The proxy joins what it is given by one slash.
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self.kfp.asked.append(f"{self.command} {path}")
        if self.kfp.dead_after is not None and len(self.kfp.asked) > self.kfp.dead_after:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        fault = self.kfp.fault_at.pop(len(self.kfp.asked) - 1, None) or next(
            (f for f in self.kfp.faults if f.times and f.method == self.command and f.path in path), None
        )
        if fault:
            fault.times -= 1
        try:
            if self.kfp.token and self.headers.get("Authorization") != f"Bearer {self.kfp.token}":
                raise Refused(401, "Request header error: there is no user identity header.")
            if self.kfp.cookie and self.headers.get("Cookie") != self.kfp.cookie:
                raise Refused(401, "Request header error: there is no user identity header.")
            if not whole.startswith(self.kfp.prefix):
                raise Refused(404, f"the server could not find the requested resource: {path}")
            found = self._route(path, query, body) if fault is None or fault.takes_effect else None
            if self.kfp.watch:
                self.kfp.watch()
            if fault and fault.status == CUT:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault:
                raise Refused(fault.status, "fault")
            self._answer(200, found if isinstance(found, bytes) else json.dumps(found).encode())
        except Refused as refusal:
            words = {"error": refusal.words, "code": refusal.status, "message": refusal.words, "details": []}
            self._answer(refusal.status, json.dumps(words).encode())

    do_GET = do_POST = do_DELETE = _handle

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> Any:
        log = re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path)
        if log:
            if log[2] not in self.kfp.logs:
                raise Refused(500, f"pods {log[2]!r} not found")
            return self.kfp.logs[log[2]].encode()
        found = re.fullmatch(r"/apis/v2beta1/(\w+)(?:/([^/:]+))?(?:/(versions)(?:/([^/]+))?)?(?::(\w+))?", path)
        if not found:
            raise Refused(404, f"Not Found: {path}")
        kind, name, versions, _, verb = found.groups()
        if kind == "healthz":
            return {"multi_user": False}
        if versions:
            of = [v for v in self.kfp.versions.values() if v["pipeline_id"] == name]
            return self._page(of, "pipeline_versions", query)
        store = {
            "experiments": self.kfp.experiments, "runs": self.kfp.runs, "recurringruns": self.kfp.recurring,
            "pipelines": self.kfp.pipelines,
        }[kind]  # fmt: skip
        if self.command == "POST" and name is None:
            return getattr(self, f"_create_{kind}")(json.loads(body))
        if name is None:
            if self.kfp.multi_user and kind != "pipelines" and not {"experiment_id", "namespace"} & set(query):
                raise Refused(400, f"a list of {kind} needs an experiment or a namespace")
            scopes = [(key, query[key]) for key in ("experiment_id", "namespace") if key in query]
            of = [o for o in store.values() if all(o.get(key) == value for key, value in scopes)]
            return self._page(of, {"recurringruns": "recurringRuns"}.get(kind, kind), query)
        if name not in store:
            raise Refused(404, f"{kind[:-1]} {name} not found")
        if self.command == "DELETE":
            if kind == "recurringruns":  # Kubernetes deletes what the recurring run owns: its workflows.
                for run in self.kfp.runs.values():
                    if run.get("recurring_run_id") == name and run["state"] == "RUNNING":
                        run["state"] = "FAILED"
            del store[name]
            return {}
        if verb in ("enable", "disable"):
            store[name]["status"] = f"{verb.upper()}D"
            return {}
        if kind == "runs":
            run = store[name]
            run |= self.kfp.script.pop(0) if len(self.kfp.script) > 1 else self.kfp.script[0]
        return store[name]

    def _page(self, objects: list[Object], label: str, query: dict[str, str]) -> Object:
        wanted = json.loads(query.get("filter") or "{}").get("predicates", [])
        for predicate in wanted:
            key = {"name": "display_name"}.get(predicate["key"], predicate["key"])
            if predicate["operation"] not in ("EQUALS", 1) or key not in ("display_name", "recurring_run_id"):
                raise Refused(400, f"invalid predicate {predicate}")
            objects = [o for o in objects if o.get(key) == predicate["stringValue"]]
        if query.get("sort_by") == "created_at desc":
            objects = sorted(objects, key=lambda o: o["created_at"], reverse=True)
        # Small pages, so that whoever forgets the next one is found out.
        start = int(query.get("page_token") or 0)
        token = str(start + 2) if start + 2 < len(objects) else ""
        return {label: objects[start : start + 2], "next_page_token": token, "total_size": len(objects)}

    def _create_experiments(self, body: Object) -> Object:
        checked("V2beta1Experiment", body)
        if any(e["display_name"] == body["display_name"] for e in self.kfp.experiments.values()):
            raise Refused(409, f"Already exist error: Failed to create experiment {body['display_name']}")
        made = {**body, "experiment_id": str(uuid.uuid4()), "created_at": NOW}
        self.kfp.experiments[made["experiment_id"]] = made
        return made

    def _create_runs(self, body: Object) -> Object:
        checked("V2beta1Run", body)
        self._check_source(body)
        made = {**body, "run_id": str(uuid.uuid4()), "created_at": NOW, "state": "PENDING"}
        self.kfp.runs[made["run_id"]] = made
        return made

    def _create_recurringruns(self, body: Object) -> Object:
        checked("V2beta1RecurringRun", {**body, "max_concurrency": str(body.get("max_concurrency"))})  # Either is JSON.
        if self.kfp.multi_user and not body.get("namespace"):
            raise Refused(400, "a recurring run needs a namespace")
        if not 1 <= int(body.get("max_concurrency") or 0) <= 10:
            raise Refused(400, "Max concurrency of a recurring run must be at least 1 and at most 10")
        # robfig/cron v1, which knows no time zone in front.
        if not re.fullmatch(r"([^\s=]+ ){4,5}[^\s=]+", body["trigger"]["cron_schedule"]["cron"]):
            raise Refused(400, "Schedule cron is not a supported format")
        self._check_source(body)
        status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[body["mode"]]
        made = {**body, "recurring_run_id": str(uuid.uuid4()), "created_at": NOW, "status": status}
        self.kfp.recurring[made["recurring_run_id"]] = made
        return made

    def _check_source(self, body: Object) -> None:
        if body.get("experiment_id") not in self.kfp.experiments:
            raise Refused(404, f"Experiment {body.get('experiment_id')} not found")
        reference, spec = body.get("pipeline_version_reference"), body.get("pipeline_spec")
        if (reference is None) == (spec is None):
            raise Refused(400, "give a pipeline spec or a reference to a version, and not both")
        if reference:
            versions = [v for v in self.kfp.versions.values() if v["pipeline_id"] == reference["pipeline_id"]]
            wanted = reference.get("pipeline_version_id") or versions[-1]["pipeline_version_id"]
            spec = next(v["pipeline_spec"] for v in versions if v["pipeline_version_id"] == wanted)
        check_parameters(spec, (body.get("runtime_config") or {}).get("parameters") or {})


def checked(model: str, body: Object) -> Any:
    """``body`` as a model of kfp_server_api; refused where it has a field that the model doesn't have."""
    known = getattr(kfp_server_api, model)
    unknown = set(body) - set(known.attribute_map.values())
    if unknown:
        raise Refused(400, f"unknown fields of {model}: {', '.join(sorted(unknown))}")
    for attribute, kind in known.openapi_types.items():
        inner = body.get(known.attribute_map[attribute])
        if inner is None:
            continue
        if kind.startswith("V2beta1") and isinstance(inner, dict):
            checked(kind, inner)
        elif kind == "str" and not isinstance(inner, str) or kind == "bool" and not isinstance(inner, bool):
            raise Refused(400, f"{model}.{attribute} is {inner!r}, not a {kind}")
    return known


def check_parameters(spec: Object, parameters: Object) -> None:
    """What the API server checks of a run's parameters."""
    spec = spec.get("pipeline_spec", spec)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    extra = sorted(set(parameters) - set(known))
    if extra:
        raise Refused(400, f"Invalid input error: parameter(s) provided are not required by pipeline: {extra}")
    for name, definition in known.items():
        if name not in parameters:
            if "defaultValue" not in definition and not definition.get("isOptional"):
                raise Refused(400, f"parameter {name} is not optional, yet has neither default value nor user input")
            continue
        value, kinds = parameters[name], TYPES[definition["parameterType"]]
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise Refused(400, f"input parameter {name} requires type {definition['parameterType']}, got {value!r}")
