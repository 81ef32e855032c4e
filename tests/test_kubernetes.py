"""deploy/kubernetes agrees with the service: settings, ports, probes, users, labels, and the time that a stop takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from lucid_compute.agent.settings import AgentSettings
from lucid_compute.client.settings import SETTINGS as CLIENT_SETTINGS
from lucid_compute.server.settings import DEFAULT_PORT, Settings
from tests import ROOT
from tests.api import Api

FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(FOLDER.rglob("*.yaml"))
CUT_OFF_SECONDS = 5.0  # after the grace, running requests are cut off within this time
SERVICE_SETTINGS = {f"LUCID_{name.upper()}" for name in Settings.model_fields}
AGENT_SETTINGS = {f"LUCID_AGENT_{name.upper()}" for name in AgentSettings.model_fields} | {
    setting.name for setting in CLIENT_SETTINGS
}


def documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every object of the folder with its file."""
    for path in FILES:
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def find(kind: str, name: str) -> dict[str, Any]:
    """Return the object of that kind and name."""
    of_kind = (each for _, each in documents() if each["kind"] == kind)
    (found,) = (each for each in of_kind if each["metadata"]["name"] == name)
    return found


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of a workload's pods."""
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


WORKLOADS = [find("Deployment", "lucid"), find("DaemonSet", "lucid-agent")]


def test_every_file_is_part_of_a_kustomization() -> None:
    """And every file that one names is there."""
    named = set()
    for path, each in documents():
        if each["kind"] == "Kustomization":
            named |= {(path.parent / resource).resolve() for resource in each["resources"]}
    assert all(path.exists() for path in named)
    assert {path for path in FILES if path.name != "kustomization.yaml"} == {path for path in named if path.is_file()}


@pytest.mark.parametrize(("workload", "known"), [*zip(WORKLOADS, (SERVICE_SETTINGS, AGENT_SETTINGS), strict=True)])
def test_every_setting_is_one(workload: dict[str, Any], known: set[str]) -> None:
    (container,) = pod_of(workload)["containers"]
    names = {each["name"] for each in container["env"] if each["name"].startswith("LUCID_")}
    assert names
    assert names <= known


@pytest.mark.parametrize("workload", WORKLOADS)
def test_pods_have_no_more_rights_than_they_need(workload: dict[str, Any]) -> None:
    """The user is the image's, nothing of the image can be written, and no token of the cluster is mounted."""
    pod = pod_of(workload)
    (container,) = pod["containers"]
    users = set(re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {(str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["runAsGroup"]))} == users
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert {"requests", "limits"} == set(container["resources"])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_selectors_match_labels(workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    if workload["kind"] == "Deployment":
        selectors = [
            find("Service", "lucid")["spec"]["selector"],
            find("PodDisruptionBudget", "lucid")["spec"]["selector"]["matchLabels"],
            find("NetworkPolicy", "lucid")["spec"]["podSelector"]["matchLabels"],
            find("PodMonitor", "lucid")["spec"]["selector"]["matchLabels"],
            *(each["labelSelector"]["matchLabels"] for each in pod_of(workload)["topologySpreadConstraints"]),
        ]
        assert selectors == [labels] * len(selectors)
        target = find("HorizontalPodAutoscaler", "lucid")["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", workload["metadata"]["name"])


def test_ports_are_the_services() -> None:
    (container,) = pod_of(find("Deployment", "lucid"))["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": DEFAULT_PORT}]
    assert f"EXPOSE {DEFAULT_PORT}" in (ROOT / "Dockerfile").read_text()
    assert find("Service", "lucid")["spec"]["ports"][0]["targetPort"] == "http"
    assert find("NetworkPolicy", "lucid")["spec"]["ingress"][0]["ports"] == [{"port": "http"}]
    assert find("PodMonitor", "lucid")["spec"]["podMetricsEndpoints"][0]["port"] == "http"


def test_a_stop_has_the_time_that_it_needs() -> None:
    """preStop, the service's own grace, and what it takes to cut off the rest; the agent drains first."""
    pod = pod_of(find("Deployment", "lucid"))
    (container,) = pod["containers"]
    waits_seconds = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (grace,) = (float(each["value"]) for each in container["env"] if each["name"] == "LUCID_SHUTDOWN_GRACE_SECONDS")
    assert waits_seconds + grace + CUT_OFF_SECONDS < pod["terminationGracePeriodSeconds"]
    readiness = container["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < waits_seconds
    agent = pod_of(find("DaemonSet", "lucid-agent"))
    drains_seconds = float(AgentSettings.model_fields["drain_seconds"].default)
    assert drains_seconds < agent["terminationGracePeriodSeconds"]


async def test_the_probes_ask_what_is_there(api: Api) -> None:
    (container,) = pod_of(find("Deployment", "lucid"))["containers"]
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    paths |= {find("PodMonitor", "lucid")["spec"]["podMetricsEndpoints"][0]["path"]}
    assert paths == {"/healthz", "/readyz", "/metrics"}
    for path in paths:
        assert (await api.http.get(path)).status_code == 200


def test_the_database_is_the_clusters_and_loses_no_commit() -> None:
    """The URL comes from the Secret that the operator creates, and a commit waits for a standby."""
    cluster = find("Cluster", "postgres")
    (container,) = pod_of(find("Deployment", "lucid"))["containers"]
    (url,) = (each for each in container["env"] if each["name"] == "LUCID_DATABASE_URL")
    assert url["valueFrom"]["secretKeyRef"] == {"name": f"{cluster['metadata']['name']}-app", "key": "uri"}
    assert cluster["spec"]["postgresql"]["synchronous"] == {"method": "any", "number": 1}
    assert cluster["spec"]["instances"] > 1 + cluster["spec"]["postgresql"]["synchronous"]["number"]
    assert cluster["spec"]["bootstrap"]["initdb"]["encoding"] == "UTF8"
    allowed = [each for rule in find("NetworkPolicy", "lucid")["spec"]["egress"] for each in rule["to"]]
    assert {"podSelector": {"matchLabels": {"cnpg.io/cluster": cluster["metadata"]["name"]}}} in allowed
    most = find("HorizontalPodAutoscaler", "lucid")["spec"]["maxReplicas"]
    connections = Settings.model_fields["database_pool_size"].default + 10
    assert 2 * most * connections < int(cluster["spec"]["postgresql"]["parameters"]["max_connections"])
