"""What the service says when it is ready, to a person."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


@dataclass(frozen=True)
class Banner:
    """What there is to say; `admin_key` is there only when it was made just now, or is the operator's own."""

    host: str
    port: int
    is_loopback: bool
    admin_key: str | None
    admin_key_file: Path | None
    has_bootstrap_key: bool

    def text(self) -> str:
        """Return the lines, the last of them a call that works when it is pasted."""
        near = _url(WILDCARDS.get(self.host, self.host), self.port)
        key, header = self._key()
        lines = [
            f"lucid-compute listens on {_url(self.host, self.port)}",
            f"  dashboard  {near}/dashboard",
            f"  docs       {near}/docs",
            f"  admin key  {key}",
            f"  try        curl -H {header} {near}/passports",
        ]
        if not self.is_loopback:
            lines.append(
                f"Warning: {self.host} can be reached from other machines and this is plain HTTP, which shows keys to "
                "the network: put a TLS proxy in front."
            )
        return "\n".join(lines)

    def _key(self) -> tuple[str, str]:
        """Return what to say of the admin key, and the header for a shell."""
        if self.has_bootstrap_key:
            return "from LUCID_BOOTSTRAP_ADMIN_KEY", '"Authorization: Bearer $LUCID_BOOTSTRAP_ADMIN_KEY"'
        if self.admin_key:
            kept = f"kept in {self.admin_key_file}" if self.admin_key_file else "keep it"
            return f"{self.admin_key} (shown this once, {kept})", f"'Authorization: Bearer {self.admin_key}'"
        if self.admin_key_file:
            path = shlex.quote(str(self.admin_key_file))
            return f"kept in {self.admin_key_file}", f'"Authorization: Bearer $(cat {path})"'
        return "made when this database was first used", "'Authorization: Bearer YOUR_KEY'"


def _url(host: str, port: int) -> str:
    """Return the address as a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
