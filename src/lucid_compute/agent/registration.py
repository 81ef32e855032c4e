"""The node's passport: found by its name or created, and kept equal to what is observed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Any

from lucid_compute.agent.fatal_errors import NodeEnded, WrongSettings
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.client import AsyncLucid, LucidClientError, errors
from lucid_compute.registry.domain.node_state import ReportedStatus
from lucid_compute.registry.domain.passports import Connectivity, PassportStatus, PassportType
from lucid_compute.registry.shapes import PassportView

_PRICE = "pricePer1kTokens"
_OF_THE_SERVER = frozenset({"maxConcurrency", "maxContext", "runtimes"})
_log = logging.getLogger(__name__)


class Registration:
    """What the registry knows of this node, as the agent last wrote or read it."""

    def __init__(self, lucid: AsyncLucid, settings: AgentSettings) -> None:
        self._lucid = lucid
        self._settings = settings
        self._shown: Mapping[str, Any] = {}
        self._sent: dict[str, Any] = {}
        self._key_is_sent = False
        self._declared: list[dict[str, Any]] | None = None

    async def find_or_make(self, metadata: Mapping[str, Any], *, may_make: bool = True) -> PassportView | None:
        """Return the node's passport, updated: the one with its name, or a new one; None when it may make none.

        The name of a revoked or deregistered passport is free. The new passport has a new id, because a person who
        starts an agent wants a node.

        Raises:
            AgentFault: no passport is possible with these settings.
            LucidClientError: the registry refuses, or does not respond.
        """
        self._shown, self._sent, self._key_is_sent, self._declared = {}, {}, False, None
        passport = await (self._find_or_make(metadata) if may_make else self._find_only())
        if passport is None:
            return None
        self._shown = passport.metadata
        await self.describe(passport.id, metadata)
        return passport

    async def describe(self, passport_id: str, metadata: Mapping[str, Any]) -> None:
        """Write the metadata that differ from the registry's. Unknown metadata stay unchanged.

        What this agent wrote about a server that was replaced, such as its slots, is removed.
        """
        changes = {name: value for name, value in metadata.items() if not _is_equal(name, value, self._shown.get(name))}
        if metadata.get("runtimes") != self._sent.get("runtimes"):
            changes |= dict.fromkeys(_OF_THE_SERVER & self._sent.keys() - metadata.keys())
        if "connectivity" not in metadata and self._shown.get("connectivity") == Connectivity.OUTBOUND:
            changes["connectivity"] = Connectivity.DIRECT.value
        if not self._key_is_sent:
            changes |= self._secret
        if changes:
            passport = await self._lucid.passports.update(passport_id, metadata=changes)
            _log.info("passport %s: wrote %s", passport_id, ", ".join(sorted(changes)))
            self._shown = passport.metadata
        self._sent, self._key_is_sent = dict(metadata), True

    async def declare(self, passport_id: str, models: list[dict[str, Any]]) -> None:
        """Declare these models, unless they are already declared."""
        if models == self._declared:
            return
        if self._declared is None and models == await self._read_declaration(passport_id):
            self._declared = models
            return
        answer = await self._lucid.compute.update_models(passport_id, models=models)
        self._declared = models
        unknown = [model.id for model in answer.models if model.model_passport_id is None]
        _log.info("declared %s", ", ".join(model["id"] for model in models) or "no model")
        if unknown:
            _log.warning(
                "no model is registered as %s yet: requests for it come once a passport has that name or alias",
                ", ".join(unknown),
            )

    async def _find_only(self) -> PassportView | None:
        chosen = self._settings.passport_id
        return await self._find() if chosen is None else await self._get(chosen)

    async def _find_or_make(self, metadata: Mapping[str, Any]) -> PassportView:
        if self._settings.passport_id is not None:
            return await self._get(self._settings.passport_id)
        if "vram" not in metadata:
            if (found := await self._find()) is not None:
                return found
            raise WrongSettings(
                "The memory of the GPUs is unknown: NVML shows none that the inference server is known to use. Say how "
                "much models may use: --vram 24GB"
            )
        try:
            return await self._make(metadata)
        except errors.PassportExists as error:
            if error.passport_id is None:
                raise
            return await self._get(error.passport_id)
        except errors.Forbidden:  # a key bound to one node may not create another
            if (found := await self._find()) is not None:
                return found
            raise

    async def _make(self, metadata: Mapping[str, Any]) -> PassportView:
        passport = await self._lucid.passports.create(
            name=self._settings.node_name, type=PassportType.COMPUTE.value, metadata={**metadata, **self._secret}
        )
        self._key_is_sent = True
        _log.info("registered %s as passport %s", passport.name, passport.id)
        return passport

    @property
    def _secret(self) -> dict[str, str]:
        """The inference server's key, for the registry. An outbound node's never leaves the machine."""
        key = self._settings.inference_key
        return {} if key is None or self._settings.outbound else {"inferenceKey": key.get_secret_value()}

    async def _get(self, passport_id: str) -> PassportView:
        passport = await self._lucid.passports.get(passport_id)
        if passport.type is not PassportType.COMPUTE:
            raise WrongSettings(
                f"Passport {passport_id} is no node but of type {passport.type.value}. Choose another one."
            )
        if passport.status is PassportStatus.REVOKED:
            raise NodeEnded(f"Passport {passport_id} is revoked, for good. Leave --passport-id out to register again.")
        _log.info("found %s, passport %s", passport.name, passport.id)
        await self._warn_of_another(passport)
        return passport

    async def _warn_of_another(self, passport: PassportView) -> None:
        """Warn if another agent reports for the passport: two machines of one name are one node."""
        with suppress(LucidClientError):  # what matters of this shows when the first heartbeat is sent
            health = await self._lucid.compute.health(passport.id)
            if health.fresh and health.reported is not None and health.reported.status is not ReportedStatus.DRAINING:
                _log.warning(
                    "an agent reported for %s %.0f s ago. If it still runs, this one takes its place, and it ends: "
                    "give each machine its own --name",
                    passport.name,
                    health.heartbeat_age_seconds or 0,
                )

    async def _find(self) -> PassportView | None:
        """Return the living node with this name. An admin's key sees the nodes of every owner.

        Raises:
            WrongSettings: several owners have one.
        """
        name = self._settings.node_name
        found = [
            passport
            async for passport in self._lucid.passports.list(type=PassportType.COMPUTE.value, search=name)
            if passport.name == name and passport.status is not PassportStatus.REVOKED and await self._lives(passport)
        ]
        if len(found) > 1:
            raise WrongSettings(f"Several nodes are named {name!r}. Say which one: --passport-id {found[0].id}")
        if found:
            _log.info("found %s, passport %s", name, found[0].id)
            await self._warn_of_another(found[0])
        return found[0] if found else None

    async def _lives(self, passport: PassportView) -> bool:
        try:
            await self._lucid.compute.health(passport.id)
        except errors.NodeDeregistered:
            return False
        return True

    async def _read_declaration(self, passport_id: str) -> list[dict[str, Any]]:
        declared = await self._lucid.compute.declared_models(passport_id)
        models = [
            model.model_dump(include={"id", "max_tokens", "quantization"}, by_alias=False) for model in declared.models
        ]
        return sorted(models, key=lambda model: str(model["id"]))


def _is_equal(name: str, mine: object, shown: object) -> bool:
    if name != _PRICE:
        return mine == shown
    try:
        return Decimal(str(mine)) == Decimal(str(shown))
    except InvalidOperation:
        return False
