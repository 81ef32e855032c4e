"""The agent's settings. The only file of the agent that reads the environment."""

from __future__ import annotations

import os
import re
import socket
from decimal import Decimal
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lucid_compute.agent.gpu_selection import ALL_GPUS, GpuSelection, read_cuda_list, read_entries
from lucid_compute.egress.base_path import endpoint_in
from lucid_compute.registry.domain.passports import parse_vram_gb
from lucid_compute.wire import Label, PositiveCount, read_money, write_money

_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1|.*\.localhost", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
Words = Annotated[tuple[Label, ...], NoDecode]


class AgentSettings(BaseSettings):
    """The settings of `lucid agent run`, from `LUCID_AGENT_…` variables. Command line options override them.

    The registry's address and key are the client's own settings, LUCID_API_URL and LUCID_API_KEY.
    """

    model_config = SettingsConfigDict(env_prefix="LUCID_AGENT_", env_ignore_empty=True, extra="ignore", frozen=True)

    url: str = Field(default="http://localhost:8000", description="The inference server, as this machine reaches it.")
    public_url: str | None = Field(
        default=None, description="The inference server, as the registry reaches it. Unset: the same as the url."
    )
    outbound: bool = Field(
        default=False, description="Open connections to the registry, for a machine that it can't reach, as behind NAT."
    )
    name: Label | None = Field(
        default=None, description="The node's name. Unset: this machine's name and the inference server's port."
    )
    passport_id: str | None = Field(
        default=None, description="The node's passport. No passport is created then, and --name is not needed."
    )
    inference_key: SecretStr | None = Field(default=None, description="The inference server's own bearer key.")
    region: Label | None = Field(default=None, description="Where the node is, such as us-east-1.")
    price_per_1k_tokens: str | None = Field(default=None, description="US dollars, such as 0.002.")
    max_concurrency: PositiveCount | None = Field(
        default=None, description="Requests at one time. Unset: what the inference server says, if it does."
    )
    vram: str | None = Field(default=None, description="Memory for models, such as 24GB. Unset: what NVML says.")
    gpu: Label | None = Field(default=None, description="The GPU's name. Unset: what NVML says.")
    gpus: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        default=None,
        description="GPUs of the inference server by NVML's index or UUID, such as 0,1 or MIG-…. Unset: those of "
        "CUDA_VISIBLE_DEVICES, else every one.",
    )
    capabilities: Words = Field(default=("inference",), description="What the node can do, separated by commas.")
    models: Words = Field(default=(), description="Declare and report these models alone, separated by commas.")
    quantization: Words = Field(
        default=(), description="How models are quantized: fp16 for all, or model=awq-4bit for one; with commas."
    )
    drain_seconds: float = Field(
        default=60.0, ge=0, le=86400, description="Longest wait for running requests when the agent is stopped."
    )
    deregister_on_exit: bool = Field(default=False, description="Deregister the node when stopped; this is final.")

    @field_validator("capabilities", "models", "quantization", mode="before")
    @classmethod
    def _split_words(cls, value: object) -> object:
        return tuple(filter(None, (word.strip() for word in value.split(",")))) if isinstance(value, str) else value

    @field_validator("gpus", mode="before")
    @classmethod
    def _split_indices(cls, value: object) -> object:
        return read_entries(value) if isinstance(value, str) else value

    @field_validator("vram")
    @classmethod
    def _check_vram(cls, value: str | None) -> str | None:
        if value is not None:
            parse_vram_gb(value)
        return value

    @field_validator("price_per_1k_tokens")
    @classmethod
    def _check_price(cls, value: str | None) -> str | None:
        return None if value is None else write_money(read_money(value))

    @field_validator("url", "public_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and (endpoint := endpoint_in(_parts(value).path)) is not None:
            raise ValueError(f"It ends in the endpoint {endpoint}. Write the base URL, without {endpoint}.")
        return value

    @model_validator(mode="after")
    def _quantizations_name_models(self) -> AgentSettings:
        if sum("=" not in word for word in self.quantization) > 1:
            raise ValueError("Give one quantization for all models, and others as model=quantization.")
        return self

    @property
    def inference_url(self) -> str:
        """Where the registry reaches the inference server."""
        return self.public_url or self.url

    @property
    def gpu_selection(self) -> GpuSelection:
        """The GPUs of the inference server: those of CUDA's own variable, when `gpus` is not set."""
        if self.gpus is not None:
            return GpuSelection(self.gpus)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # set and empty, it hides every GPU
        return ALL_GPUS if visible is None else read_cuda_list(visible)

    @property
    def node_name(self) -> str:
        """The node's name. It differs for two inference servers on one machine."""
        parts = _parts(self.url)
        return self.name or f"{socket.gethostname()}-{parts.port or _PORTS[parts.scheme]}"

    @property
    def price(self) -> Decimal | None:
        """The price as a number."""
        return None if self.price_per_1k_tokens is None else Decimal(self.price_per_1k_tokens)

    def quantization_of(self, model_id: str) -> str | None:
        """Return the quantization that was given for this model, or for all models."""
        for word in self.quantization:
            if word.startswith(f"{model_id}="):
                return word.removeprefix(f"{model_id}=")
        return next((word for word in self.quantization if "=" not in word), None)

    def is_out_of_reach(self, api_url: str) -> bool:
        """Return whether the registry, on another machine, would look for the inference server on its own."""
        return not self.outbound and is_loopback(self.inference_url) and not is_loopback(api_url)

    def is_the_registry(self, api_url: str) -> bool:
        """Return whether the inference server's address is the registry's; both use port 8000 by default."""
        return _endpoint(self.url) == _endpoint(api_url)


def is_loopback(url: str) -> bool:
    """Return whether a URL means the machine that uses it."""
    return _LOOPBACK.fullmatch(_parts(url).hostname or "") is not None


def _endpoint(url: str) -> tuple[str | None, int]:
    parts = _parts(url)
    return "127.0.0.1" if parts.hostname == "localhost" else parts.hostname, parts.port or _PORTS[parts.scheme]


def _parts(url: str) -> SplitResult:
    """Return the parts of an http or https URL.

    Raises:
        ValueError: it is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.port == 0 or parts.username is not None:
        raise ValueError(
            "This is no URL of an inference server. Write it like http://localhost:8000, no password in it."
        )
    return parts
