"""Checks of access: the service, the key, the node."""

from __future__ import annotations

from uuid import UUID

from lucid_compute.agent.doctor.check import CheckFinding, DoctorContext, failed, passed
from lucid_compute.client.errors import Forbidden, LucidClientError, NodeDeregistered, NotFound, TlsFailed, Unauthorized
from lucid_compute.registry.domain.passports import PassportStatus, PassportType
from lucid_compute.registry.shapes import PassportView

NO_NODE = str(UUID(int=0))
SHOWN_NAMES = 10
_CREATE_KEY = "lucid keys create NAME --owner OWNER --scope compute"


async def check_service(context: DoctorContext) -> CheckFinding:
    """Does the service respond, and can it serve?"""
    try:
        ready = await context.lucid.ready()
    except TlsFailed as error:
        return failed(error.message, "Have the service's operator serve a valid certificate, or correct --api.")
    except LucidClientError as error:
        fix = (
            f"Is {context.lucid.base_url} the service's address? Correct --api or LUCID_API_URL, or start the service."
        )
        return failed(error.message, fix)
    form = f" ({'compiled' if ready.compiled else 'interpreted'}, Python {ready.python})" if ready.python else ""
    return passed(f"{context.lucid.base_url} is ready{form}; nodes: {ready.nodes}, models: {ready.models}.")


async def check_key(context: DoctorContext) -> CheckFinding:
    """Is the key known, and neither expired nor revoked?"""
    try:
        await context.lucid.compute.probe(NO_NODE)
    except Unauthorized:
        return failed(
            "The service does not know the key, or it is expired or revoked, or none was given.",
            f"Set LUCID_API_KEY to a valid key; an admin creates one with: {_CREATE_KEY}",
        )
    except (Forbidden, NotFound):
        pass
    return passed("The key is valid.")


async def check_scope(context: DoctorContext) -> CheckFinding:
    """May the key do what an agent does?"""
    try:
        await context.lucid.compute.probe(NO_NODE)
    except Forbidden:
        return failed(
            "The key is valid and lacks the scope compute.",
            f"Ask an admin for a key with the scope compute: {_CREATE_KEY}",
        )
    except NotFound:
        pass
    return passed("The key has the scope compute, or admin.")


async def check_node(context: DoctorContext) -> CheckFinding:
    """Is there a node with that name or id?"""
    if context.id_or_name is None:
        return await _choose_only_node(context)
    found = await _find_by_id(context, context.id_or_name) or await _find_by_name(context, context.id_or_name)
    if found is None:
        fix = "Give the name or id of a node that `lucid nodes` lists, or register it: lucid agent run"
        return failed(f"No node {context.id_or_name!r} is this key's.", fix)
    context.node = found
    return passed(f"{found.name} ({found.id}) of {found.owner}.")


async def check_passport(context: DoctorContext) -> CheckFinding:
    """Is its passport active, and is the node still registered?"""
    name, status = context.node.name, context.node.status
    try:
        context.health = await context.lucid.compute.health(context.node.id)
        context.declaration = await context.lucid.compute.declared_models(context.node.id)
    except NodeDeregistered:
        return failed(f"{name} was deregistered or revoked, for good.", "Register it again: lucid agent run")
    if status is not PassportStatus.ACTIVE:
        context.reported_codes.add("PASSPORT_INACTIVE")
        return failed(
            f"The passport of {name} is {status.value}.",
            f"Make it active: lucid passports update {context.called} --status active",
        )
    return passed("The passport is active.")


async def _choose_only_node(context: DoctorContext) -> CheckFinding:
    page = [node async for node in context.lucid.compute.list()]
    if len(page) == 1:
        context.node = page[0]
        return passed(f"{context.node.name} ({context.node.id}) of {context.node.owner}, the only one.")
    if not page:
        return failed("This key has no node.", "Register this machine: lucid agent run")
    names = ", ".join(node.name for node in page[:SHOWN_NAMES])
    return failed(f"This key has {len(page)} nodes: {names}.", "Say which one: lucid doctor NODE")


async def _find_by_id(context: DoctorContext, id_or_name: str) -> PassportView | None:
    try:
        found: PassportView = await context.lucid.passports.get(id_or_name)
    except NotFound:
        return None
    return found if found.type is PassportType.COMPUTE else None


async def _find_by_name(context: DoctorContext, id_or_name: str) -> PassportView | None:
    """Return the node with that name; an ended one only when no living node has it."""
    listed = context.lucid.passports.list(type=PassportType.COMPUTE, search=id_or_name)
    named = [passport async for passport in listed if passport.name == id_or_name]
    active: list[PassportView] = [passport for passport in named if passport.status is not PassportStatus.REVOKED]
    return next(iter([*active, *named]), None)
