"""The context of the checks, what a check is, and its result."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from lucid_compute.agent.settings import AgentSettings, is_loopback
from lucid_compute.registry.domain.passports import Connectivity, normalise_runtime

if TYPE_CHECKING:
    from lucid_compute.agent.runtimes.detection import Detection
    from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
    from lucid_compute.agent.runtimes.reading import ServerReading
    from lucid_compute.client import AsyncLucid
    from lucid_compute.gateway.shapes import ProbeAnswer
    from lucid_compute.registry.shapes import Declaration, NodeHealth, PassportView, ReasonView


class DoctorContext:
    """What the checks know of one node. The check that sets an attribute without a value is named beside it."""

    node: PassportView  # node
    health: NodeHealth  # passport
    declaration: Declaration  # passport
    probe: ProbeAnswer  # probe
    server: InferenceServer  # server
    listed: ServerResponse  # server
    detection: Detection  # runtime
    reading: ServerReading  # runtime
    models: dict[str, str]  # catalogue: ids of model passports, by the node's model ids

    def __init__(self, lucid: AsyncLucid, id_or_name: str | None, url: str | None, inference_key: str | None) -> None:
        """Examine the node `wanted`, by name or id. The server is at `url` from here; None: as registered."""
        self.lucid = lucid
        self.id_or_name = id_or_name
        self.inference_key = inference_key
        self.reported_codes: set[str] = set()  # reason codes for which a check failed
        self.reasons: dict[tuple[str, str], ReasonView] | None = (
            None  # by code and model; None before the first request
        )
        self._url = url

    @property
    def called(self) -> str:
        """The node as commands call it: its name if a shell takes that as one word, else its id."""
        return self.node.name if re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.node.name, re.ASCII) else self.node.id

    @property
    def registered_url(self) -> str:
        """Where the registry looks for the node's inference server."""
        return str(self.node.metadata.get("inferenceUrl", ""))

    @property
    def is_outbound(self) -> bool:
        """Return whether the node's agent connects to the registry, instead of the registry to the node."""
        return self.node.metadata.get("connectivity") == Connectivity.OUTBOUND

    @property
    def registered(self) -> SplitResult:
        """The parts of the registered URL."""
        return urlsplit(self.registered_url)

    @property
    def url(self) -> str:
        """Where the doctor looks for the inference server, from this machine."""
        return self._url or self.registered_url or str(AgentSettings.model_fields["url"].default)

    @property
    def is_at_registered_url(self) -> bool:
        """Return whether that is where the registry looks."""
        return self._url is None

    @property
    def is_local_registry(self) -> bool:
        """Return whether the registry runs on this machine."""
        return is_loopback(self.lucid.base_url)

    @property
    def runtimes(self) -> list[str]:
        """The runtimes that the passport names and that the heartbeats report."""
        named = self.node.metadata.get("runtimes") or []
        names = [str(entry["name"] if isinstance(entry, dict) else entry) for entry in named]
        reported = self.health.reported.runtime if self.health.reported else None
        return sorted({normalise_runtime(name) for name in [*names, *([reported.name] if reported else [])]})

    @property
    def model_ids(self) -> list[str]:
        """The models that the node declares or reports."""
        return sorted({*(model.id for model in self.declaration.models), *self.health.available_models})

    def metadata_number(self, name: str) -> float | None:
        """Return a number of the passport's metadata; None when there is none."""
        value: Any = self.node.metadata.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


class CheckVerdict(StrEnum):
    """The verdict of a check. A warning should be fixed, but does not keep requests away."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


class CheckFinding(NamedTuple):
    """What was found, in a sentence. A warning and a failure have exactly one fix."""

    verdict: CheckVerdict
    found: str
    fix: str | None = None
    needs: str | None = None  # the check that did not pass, so that this one was not run


class Check(NamedTuple):
    """One question. It is asked only when no check that it `needs` failed or was skipped."""

    id: str
    title: str
    needs: tuple[str, ...]
    run: Callable[[DoctorContext], Awaitable[CheckFinding | list[CheckFinding]]]


class Result(NamedTuple):
    """A finding of a check. A check with several findings has several results."""

    id: str
    title: str
    finding: CheckFinding


def passed(found: str) -> CheckFinding:
    """Return the finding that all is well."""
    return CheckFinding(CheckVerdict.PASS, found)


def warned(found: str, fix: str) -> CheckFinding:
    """Return the finding that something should be fixed."""
    return CheckFinding(CheckVerdict.WARN, found, fix)


def failed(found: str, fix: str) -> CheckFinding:
    """Return the finding that this keeps requests away."""
    return CheckFinding(CheckVerdict.FAIL, found, fix)


def skipped(why: str, needs: str | None = None) -> CheckFinding:
    """Return the finding that there was nothing to ask, or that `needs` comes first."""
    return CheckFinding(CheckVerdict.SKIPPED, why, needs=needs)
