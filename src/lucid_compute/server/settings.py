"""All settings of the service, read from the environment."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lucid_compute.accounting.payouts.revenue import ALL_BPS, DEFAULT_TERMS, PayoutsClose, Terms
from lucid_compute.compilation import FORM
from lucid_compute.egress.policy import AllowedNetwork, parse_allowed_networks
from lucid_compute.registry.fleet.key_ring import MAX_TOKEN_LENGTH

SHORTEST_BOOTSTRAP_KEY = 24
SHORTEST_AUDIT_DAYS = 30  # the trigger of `audit_log` refuses to delete younger rows, whoever asks
DEFAULT_PORT = 8000
MIB = 1024 * 1024
_TRACING_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
_SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://")
_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/,?#@]+|null")
_OWN_PATHS = re.compile(
    r"/(?:audit|compute|dashboard|docs|healthz|help|keys|match|me|metrics|models|openapi\.json|passports|payouts|readyz|"
    r"service|usage|v1|webhooks)(?:/.*)?"
)


class Settings(BaseSettings):
    """The settings of one `lucid serve`, from `LUCID_…` variables; flags of the command line go before them."""

    model_config = SettingsConfigDict(env_prefix="LUCID_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    workers: int = Field(default=1, ge=1, le=64, description="Processes that serve; each is a replica.")
    data_dir: Path = Field(default=Path("data"), description="Folder of the embedded Postgres and of admin.key.")
    database_url: SecretStr | None = Field(
        default=None,
        description="Postgres to use, as postgresql://user:password@host/database (a session connection, not a "
        "transaction pool); several servers as host1:5432,host2:5432. Unset: the embedded Postgres in the data folder.",
    )
    bootstrap_admin_key: SecretStr | None = Field(
        default=None,
        description="An admin key of your own, 24 characters or more. Changing it revokes the former one. Unset: a "
        "first start on an empty database makes one, prints it once and keeps it in admin.key.",
    )
    embedded_postgres_user: str = Field(
        default="nobody", description="System user that runs the embedded Postgres when the service runs as root."
    )
    database_pool_size: int = Field(
        default=5,
        ge=1,
        le=100,
        description="Database connections of each worker for ordinary requests; up to 10 more are for heartbeats, "
        "their samples, jobs, the feed and the like.",
    )
    database_timeout_seconds: float = Field(
        default=2.0, gt=0, le=60, description="Longest wait for the database before a request answers 503."
    )
    feed_follows_notifications: bool = Field(
        default=True,
        description="Follow Postgres's NOTIFY beside the poll; off, changes of other replicas show within a second.",
    )
    help_dir: Path | None = Field(
        default=None, description="The built documentation (`make docs`: build/site), served at /help. Unset: none."
    )
    root_path: str = Field(
        default="",
        description="A sub-path below which a proxy offers the service, such as /lucid; the proxy may pass it on or "
        "take it off.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may use the service from a browser, separated by commas: "
        "https://chat.example,http://localhost:3000; * lets in all of them. Unset: none.",
    )
    keep_alive_seconds: int = Field(
        default=75,
        ge=1,
        le=3600,
        description="How long an idle connection of a client stays open. Set it above the idle timeout of a balancer "
        "in front, or its requests now and then fail with 502.",
    )
    request_bodies_max_mib: int = Field(
        default=256,
        ge=1,
        le=1_048_576,
        description="Bytes of request bodies that each worker holds at a time, in MiB; what is over is answered 503. "
        "A body is copied once or twice while its request runs.",
    )
    shutdown_grace_seconds: float = Field(
        default=30.0, ge=0, description="Longest wait for running requests when the service is told to stop."
    )
    heartbeat_max_per_second: float = Field(
        default=1.0, ge=0, description="Heartbeats a second that a node may send after a burst of 6; 0 switches it off."
    )
    key_writes_per_second: float = Field(
        default=20.0,
        ge=0,
        description="Changes a second (registrations, declarations, keys and the like; no heartbeats) that a key may "
        "ask each worker for after a burst; 0 switches it off.",
    )
    owner_writes_per_second: float = Field(
        default=50.0, ge=0, description="The same for all keys of an owner together; 0 switches it off."
    )
    writes_burst: int = Field(
        default=20_000,
        ge=1,
        description="Changes that a key or an owner may ask for at once: a registration of a node is two.",
    )
    passports_per_owner: int = Field(
        default=100_000,
        ge=0,
        description="Passports of an owner that are neither revoked nor deregistered; one more is refused. 0 is no "
        "limit.",
    )
    auth_failures_per_minute: int = Field(
        default=20,
        ge=0,
        description="Failed authentications a minute from one address before it is answered 429; loopback is exempt "
        "and 0 switches it off.",
    )
    inference_max_concurrency: int = Field(
        default=2000,
        ge=1,
        description="Requests below /v1 that each worker serves at a time; more are answered 503 at once.",
    )
    inference_queue: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Requests below /v1 of each worker that may wait while all nodes of their model are at their "
        "capacity; more, and all with 0, are answered 503 at once.",
    )
    inference_queue_seconds: float = Field(
        default=10.0, gt=0, le=600, description="How long such a request waits at most."
    )
    inference_max_body_mib: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Longest body of a request below /v1, in MiB; a longer one is answered 413.",
    )
    job_retention_days: int = Field(
        default=90,
        ge=0,
        le=36_500,
        description="How long a job stays in the ledger, and until its payouts are closed; its sums stay. 0 keeps all "
        "for ever.",
    )
    event_retention_days: int = Field(
        default=90,
        ge=0,
        le=36_500,
        description="How long events of nodes are kept, and the former bootIds whose heartbeats are refused. 0 keeps "
        "all for ever.",
    )
    audit_retention_days: int = Field(
        default=400,
        ge=0,
        le=36_500,
        description="How long rows of the audit trail are kept, 30 days or more. 0 keeps all for ever.",
    )
    first_byte_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Longest wait for the first byte of a stream from a node."
    )
    between_bytes_timeout_seconds: float = Field(
        default=60.0, gt=0, description="Longest silence of a node in the middle of a stream."
    )
    answer_timeout_seconds: float = Field(
        default=600.0, gt=0, description="Longest wait for a whole answer that is not a stream."
    )
    total_timeout_seconds: float = Field(default=1800.0, gt=0, description="Longest stream from a node.")
    answer_max_mib: int = Field(
        default=32, ge=1, le=1024, description="Largest whole answer of a node, in MiB; it is held in memory."
    )
    stream_max_mib: int = Field(default=256, ge=1, le=65_536, description="Largest stream of a node, in MiB.")
    event_max_mib: int = Field(
        default=8, ge=1, le=1024, description="Largest event of a stream, in MiB; it is held in memory."
    )
    slow_reader_seconds: float = Field(
        default=60.0, gt=0, description="How long a client may leave its response unread before it is disconnected."
    )
    require_https_nodes: bool = Field(default=False, description="Refuse provider URLs that are not https.")
    egress_allow: Annotated[tuple[AllowedNetwork, ...], NoDecode] = Field(
        default=(),
        description="Private networks that nodes may live in, with a range of ports if wanted, separated by commas: "
        "192.168.1.0/24:8000-8999,10.8.0.0/16.",
    )
    trusted_proxies: str = Field(
        default="127.0.0.1",
        description="Addresses or networks of proxies whose X-Forwarded-For is believed, separated by commas; * "
        "believes any.",
    )
    records_minutes_kept_hours: int = Field(
        default=48, ge=2, le=24 * 365, description="How long records of each minute are kept, in hours."
    )
    records_hours_kept_days: int = Field(
        default=90, ge=31, le=3650, description="How long records of each hour and states of nodes are kept, in days."
    )
    records_days_kept_days: int = Field(
        default=1100, ge=31, le=36500, description="How long records of each day are kept, in days."
    )
    uptime_target: float = Field(
        default=0.995,
        gt=0,
        lt=1,
        description="The share of time that a node should be healthy: what error budgets are counted against.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="An OpenTelemetry collector to send traces to, over OTLP and HTTP, such as http://127.0.0.1:4318; "
        "wants lucid-compute[tracing]. Unset: no traces.",
    )
    trace_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="The share of requests that are traced, where their sender does not decide.",
    )
    revenue_provider_bps: int = Field(
        default=DEFAULT_TERMS.provider_bps,
        ge=0,
        le=ALL_BPS,
        description="The provider's part of a price, in basis points. It holds for jobs that start after this start of "
        "the service; the three parts are 10000 together.",
    )
    revenue_model_owner_bps: int = Field(
        default=DEFAULT_TERMS.model_owner_bps, ge=0, le=ALL_BPS, description="The part of the model's owner."
    )
    revenue_protocol_bps: int = Field(
        default=DEFAULT_TERMS.protocol_bps,
        ge=0,
        le=ALL_BPS,
        validate_default=True,
        description="The protocol's part: the operator's.",
    )
    payouts_close: PayoutsClose = Field(
        default=PayoutsClose.MONTHLY,
        description="Whether payouts are closed for good month by month (monthly), or only by hand (never).",
    )
    payouts_close_after_days: int = Field(
        default=3, ge=0, le=28, description="How many days after its end a month is closed, for what comes late."
    )
    metrics_public: bool = Field(default=False, description="Answer /metrics without a key.")
    compiled: bool | None = Field(
        default=None,
        description="true: refuse to start unless the busiest modules are compiled (make compile). false: run the "
        "sources. Unset: what is compiled, if it was made from the present sources.",
    )
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Least level logged.")

    @field_validator("port", mode="before")
    @classmethod
    def _is_no_service_link(cls, value: object) -> object:
        """Ignore the address of a Kubernetes service called lucid: every pod of its namespace gets it as LUCID_PORT."""
        return DEFAULT_PORT if isinstance(value, str) and _SERVICE_LINK.match(value) else value

    @field_validator("help_dir")
    @classmethod
    def _has_pages(cls, value: Path | None) -> Path | None:
        """Refuse a folder that has no site."""
        if value is not None and not (value / "index.html").is_file():
            raise ValueError(f"{value} has no index.html. Build the documentation: make docs")
        return value

    @field_validator("root_path")
    @classmethod
    def _is_below_root(cls, value: str) -> str:
        """Refuse what is no path, or can't be told from the service's own paths once a proxy has taken it off."""
        path = value.rstrip("/")
        if path and not _ROOT_PATH.fullmatch(path):
            raise ValueError("Set a path of letters, digits and . _ ~ -, such as /lucid, or leave it unset.")
        if _OWN_PATHS.fullmatch(path):
            raise ValueError("This path is one of the service's own. Choose another one, such as /lucid.")
        return path

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        """Read a comma-separated list of origins."""
        if not isinstance(value, str):
            return value
        origins = tuple(filter(None, (origin.strip().rstrip("/").lower() for origin in value.split(","))))
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin[:100]} is no origin. Set scheme, host and port: https://chat.example.")
        return origins

    @field_validator("inference_max_body_mib")
    @classmethod
    def _fits_into_memory(cls, value: int, info: ValidationInfo) -> int:
        """Refuse a limit that no body could reach."""
        room = info.data.get("request_bodies_max_mib", value)
        if value > room:
            raise ValueError(f"Set it to at most LUCID_REQUEST_BODIES_MAX_MIB ({room}), or raise that one.")
        return value

    @field_validator("bootstrap_admin_key")
    @classmethod
    def _is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        """Refuse a key that could be guessed."""
        if value is not None and not SHORTEST_BOOTSTRAP_KEY <= len(value.get_secret_value()) <= MAX_TOKEN_LENGTH:
            raise ValueError(f"Set a key of {SHORTEST_BOOTSTRAP_KEY} to {MAX_TOKEN_LENGTH} characters, or none.")
        return value

    @field_validator("audit_retention_days")
    @classmethod
    def _is_long_enough_for_audits(cls, value: int) -> int:
        """Refuse what the database would refuse to delete."""
        if 0 < value < SHORTEST_AUDIT_DAYS:
            raise ValueError(f"Set {SHORTEST_AUDIT_DAYS} days or more, or 0 to keep the audit trail for ever.")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _can_be_traced(cls, value: str | None) -> str | None:
        """Refuse traces without the packages that make them."""
        if value is not None and not all(map(_is_installed, _TRACING_PACKAGES)):
            raise ValueError(
                "Install lucid-compute[tracing] to send traces (make install-tracing in a checkout), or leave it unset."
            )
        return value

    @field_validator("compiled")
    @classmethod
    def _is_compiled(cls, value: bool | None) -> bool | None:
        """Refuse to run the sources where compiled modules are demanded."""
        if value and not FORM.is_compiled:
            raise ValueError(f"This is {FORM}. Run make compile in the checkout, or leave it unset.")
        return value

    @field_validator("egress_allow", mode="before")
    @classmethod
    def _split_networks(cls, value: object) -> object:
        """Read a comma-separated list of networks."""
        return parse_allowed_networks(value) if isinstance(value, str) else value

    @field_validator("revenue_protocol_bps")
    @classmethod
    def _parts_are_whole(cls, value: int, info: ValidationInfo) -> int:
        """Refuse parts of a price that do not add up to it; the fault is reported at the last one."""
        provider_bps, model_owner_bps = (
            info.data.get(f"revenue_{name}_bps", 0) for name in ("provider", "model_owner")
        )
        if not Terms(provider_bps, model_owner_bps, value).are_whole:
            raise ValueError(f"Set the three LUCID_REVENUE_…_BPS so that they are {ALL_BPS} together.")
        return value

    @property
    def terms(self) -> Terms:
        """How prices are split."""
        return Terms(self.revenue_provider_bps, self.revenue_model_owner_bps, self.revenue_protocol_bps)

    @property
    def is_bound_to_loopback(self) -> bool:
        """Return whether only this machine can reach the service."""
        return self.host in LOOPBACK_HOSTS or self.host.startswith("127.")


class SettingsNotUsable(Exception):
    """Settings are refused; the text has one line for each of them."""


def read_settings(**flags: Any) -> Settings:
    """Return the settings of the environment; `flags` go before them.

    Raises:
        SettingsNotUsable: settings are refused; the text has a sentence for each, without its value.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsNotUsable("\n".join(_fault_sentence(fault) for fault in error.errors())) from None


def _fault_sentence(fault: ErrorDetails) -> str:
    variable = f"LUCID_{fault['loc'][0]}".upper()
    sentence = str(fault["msg"]).removeprefix("Value error, ").removeprefix(f"{variable}: ").rstrip(".")
    return f"{variable}: {sentence}. See: lucid settings"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even its parent package is installed
        return False
