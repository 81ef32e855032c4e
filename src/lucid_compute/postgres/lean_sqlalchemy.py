"""Keeps SQLAlchemy's ORM out of processes that serve: 5.7 MB of each, and a twentieth of a start.

We use SQLAlchemy's Core, but its asyncio package imports the ORM for its sessions.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

PACKAGE = "sqlalchemy.ext.asyncio"
OURS = ("AsyncConnection", "AsyncEngine", "create_async_engine")


def leave_out_orm() -> None:
    """Prepare the asyncio package with what we use. It is imported completely as soon as something else is asked of it.

    Call it before the first import of the package; later it does nothing.
    """
    spec = find_spec(PACKAGE)
    if PACKAGE in sys.modules or spec is None or spec.loader is None:
        return
    loader, package = spec.loader, module_from_spec(spec)
    contents = vars(package)

    def import_all(name: str) -> Any:
        """Return what was not prepared, such as a session."""
        if name.startswith("__"):
            raise AttributeError(name)
        del contents["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    sys.modules[PACKAGE] = package
    engine = import_module(f"{PACKAGE}.engine")
    contents.update({name: getattr(engine, name) for name in OURS}, __getattr__=import_all)
