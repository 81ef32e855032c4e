"""Which provider URLs may be registered and which addresses may be connected to: pure rules, no DNS and no I/O.

A URL is checked when it is registered or changed (`EgressPolicy.check_url`). A name may resolve to any address, so each
address is checked again at every connect (`EgressPolicy.check_address`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from lucid_compute.egress.base_path import base_path_of, endpoint_in

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_CHARACTERS = 2048
DEFAULT_PORTS = {"http": 80, "https": 443}
# Control planes and databases that often need no credentials: Docker and etcd, MySQL, PostgreSQL, Redis,
# the Kubernetes API, Elasticsearch, the kubelet, memcached, MongoDB.
DENIED_PORTS = frozenset({*range(2375, 2381), 3306, 5432, 6379, 6443, 9200, 10250, 11211, 27017})

LOOPBACK_ADDRESSES: tuple[Address, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
LOOPBACK_NAMES = frozenset({"localhost", "localhost6", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})
METADATA_NAMES = frozenset(
    {"metadata", "metadata.goog", "metadata.google.internal", "metadata.tencentyun.com"}
    | {"instance-data", "instance-data.ec2.internal"}
)


def _networks(kind: str, texts: str) -> tuple[tuple[Network, str], ...]:
    """Pair each network with its name in refusals."""
    return tuple((ip_network(text), kind) for text in texts.split())


_LOOPBACK = _networks("loopback", "127.0.0.0/8 ::1/128")
_METADATA = "the metadata services of cloud machines"
# No allow list opens these. Azure's wire server is in public space, Alibaba's and Oracle's metadata in shared space,
# AWS's (EC2, EKS), Google's and Scaleway's IPv6 ones in ULA.
_NEVER = (
    *_networks("the link-local range", "169.254.0.0/16 fe80::/10"),
    *_networks("the multicast range", "224.0.0.0/4 ff00::/8"),
    *_networks("the range that means this host or every host", "0.0.0.0/8 255.255.255.255/32 ::/128"),
    *_networks(_METADATA, "168.63.129.16/32 100.100.100.200/32 192.0.0.192/32"),
    *_networks(_METADATA, "fd00:ec2::254/128 fd00:ec2::23/128 fd20:ce::254/128 fd00:42::42/128"),
)
# The IANA special-purpose registries (RFC 6890), minus the above. Of IPv6 only 2000::/3 is public, so all outside it is
# closed: IPv4-compatible, SIIT, NAT64 and whatever is assigned one day.
_CLOSED = (
    *_networks("a private range", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"),
    *_networks("the range carriers share", "100.64.0.0/10"),
    *_networks("a range for protocols", "192.0.0.0/24 2001::/23"),
    *_networks("a range for documentation", "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20"),
    *_networks("the range of 6to4", "192.88.99.0/24 2002::/16"),
    *_networks("the range for benchmarks", "198.18.0.0/15"),
    *_networks("a reserved range", "240.0.0.0/4"),
    *_networks("no public range (2000::/3)", "::/3 4000::/2 8000::/1"),
)
_MAPPED = IPv6Network("::ffff:0:0/96")
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
# IPv4-compatible, SIIT (RFC 2765) and NAT64 (RFC 6052, 8215): the last 32 bits are an IPv4 address.
_IPV4_LAST = (IPv6Network("::/96"), IPv6Network("::ffff:0:0:0/96"), IPv6Network("64:ff9b::/96"), _LOCAL_NAT64)

_FORBIDDEN_CHARACTERS = (
    (r"[\x00-\x20\x7f]", "a space, a line break or a control character; remove it"),
    (r"[^\x00-\x7f]", "a character outside ASCII; write the host in its xn-- form and percent-encode the path"),
    (r"\\", "a backslash; separate the path with /"),
    (r"[?#]", "a query or a fragment; send it without ? and #"),
)
_EXAMPLE = "http://host.example:8080/v1"
_SEGMENTS = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)*")
# Percent-encoded control characters, %, dots and slashes, in over-long UTF-8 too: readers disagree when to decode them.
_ENCODED_TRICKS = re.compile(r"%(?:[01].|7f|25|2e|2f|5c|c[01])", re.IGNORECASE)
_NAME = re.compile(r"(?=.{1,253}$)(?:(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?=.)|$))+")
_PORT = r"([1-9][0-9]{0,4})"
_ENTRY = re.compile(rf"(?:\[(.+)]|([0-9.]+(?:/[0-9]+)?)|([^\[\]]+/[0-9]+))(?::{_PORT}(?:-{_PORT})?)?")


TUNNEL = "tunnel"  # the scheme of what is no URL, but a node that is reached down its agent's connection


@dataclass(frozen=True, slots=True)
class ProviderUrl:
    """A provider's URL in parts. Its syntax is checked: create it with `parse_provider_url`, or `tunnel_to`."""

    scheme: str
    host: str  # a name or an address in lower case, IPv6 without brackets
    port: int
    base_path: str  # to which /chat/completions is added; it ends in a version, such as /v1, without a slash
    literal_address: Address | None  # None where the host is a name

    @property
    def authority(self) -> str:
        """The host and any port that is not the scheme's own, as the Host header wants them."""
        host = f"[{self.host}]" if isinstance(self.literal_address, IPv6Address) else self.host
        return host if self.port == DEFAULT_PORTS.get(self.scheme, self.port) else f"{host}:{self.port}"

    @property
    def canonical(self) -> str:
        """The one spelling of this URL, ending in its version; it parses back to an equal value."""
        return f"{self.scheme}://{self.authority}{self.base_path}"

    @property
    def known_addresses(self) -> tuple[Address, ...]:
        """The addresses of the host that need no DNS: the literal one, loopback for localhost, or none."""
        if self.literal_address is not None:
            return (self.literal_address,)
        return LOOPBACK_ADDRESSES if self.host in LOOPBACK_NAMES or self.host.endswith(".localhost") else ()


def tunnel_to(passport_id: str) -> ProviderUrl:
    """Return what stands for the URL of an outbound node. Its agent knows the real one, which nobody else uses."""
    return ProviderUrl(TUNNEL, passport_id, 0, base_path_of(""), None)


def parse_provider_url(text: str, *, require_https: bool = False) -> ProviderUrl:
    """Parse a provider's URL, strictly enough that no other parser finds another host or port in it.

    Raises:
        ValueError: the URL is invalid. The message says what to send, and quotes neither user name nor password.
    """
    _check_characters(text)
    match = re.fullmatch(r"(https?)://([^/]*)(.*)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"The URL starts with neither http:// nor https://; send one like {_EXAMPLE}.")
    scheme = match[1].lower()
    if require_https and scheme != "https":
        raise ValueError("This service takes https URLs only; answer over TLS and send the https:// URL.")
    host, port = _parse_authority(match[2].lower(), DEFAULT_PORTS[scheme])
    address = _find_literal_address(host)
    url = ProviderUrl(scheme, host if address is None else str(address), port, _parse_base_path(match[3]), address)
    _check_characters(url.canonical)  # which may be longer than the text by its /v1
    return url


@dataclass(frozen=True, slots=True)
class AllowedNetwork:
    """A network that the operator opens to providers, on ports `first_port` to `last_port` inclusive."""

    network: Network
    first_port: int = 1
    last_port: int = 65535

    def __str__(self) -> str:
        """Return the entry as `LUCID_EGRESS_ALLOW` has it."""
        is_all = (self.first_port, self.last_port) == (1, 65535)
        ports = f"{self.first_port}" if self.first_port == self.last_port else f"{self.first_port}-{self.last_port}"
        network = f"[{self.network}]" if self.network.version == 6 else str(self.network)  # noqa: PLR2004 - IPv6
        return str(self.network) if is_all else f"{network}:{ports}"

    def covers(self, address: Address, port: int) -> bool:
        """Return whether this entry opens `address` at `port`."""
        # Only a /96 says where a local NAT64 prefix keeps the IPv4 address (RFC 6052, section 2.2).
        vague = address in _LOCAL_NAT64 and self.network.num_addresses > 2**32
        return address in self.network and self.first_port <= port <= self.last_port and not vague


def parse_allowed_networks(text: str) -> tuple[AllowedNetwork, ...]:
    """Parse `LUCID_EGRESS_ALLOW`: networks separated by commas, each with an optional port or range of ports.

    Loopback has no effect here: `EgressPolicy.allow_loopback` alone decides about it.

    Raises:
        ValueError: an entry is invalid. The message quotes it and says how to write it.
    """
    return tuple(_parse_allowed_network(entry.strip()) for entry in text.split(",")) if text.strip() else ()


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Which of the URLs and addresses that providers name this service may connect to."""

    allow_loopback: bool = False  # True only while the service itself listens on loopback alone
    allowed: tuple[AllowedNetwork, ...] = ()  # private networks that the operator opens
    require_https: bool = False

    def check_url(self, text: str) -> ProviderUrl:
        """Parse a provider's URL and check everything that needs no DNS.

        Raises:
            ValueError: the URL is refused. The message says what to send, or what the operator can allow.
        """
        url = parse_provider_url(text, require_https=self.require_https)
        _check_port(url.port)
        for address in url.known_addresses:
            self.check_address(address, url.port)
        return url

    def check_base_url(self, text: str) -> ProviderUrl:
        """Parse the base URL of a node or an upstream and check everything that needs no DNS.

        Raises:
            ValueError: the URL is refused, or it ends in an endpoint. The message says what to send.
        """
        url = self.check_url(text)
        _, slash, path = text.partition("://")[2].partition("/")
        if (endpoint := endpoint_in(slash + path)) is not None:
            raise ValueError(f"The URL ends in the endpoint {endpoint}; send the base URL, without {endpoint}.")
        return url

    def check_address(self, address: Address, port: int) -> None:
        """Check that this service may connect to `address` at `port`; to be called for every address of a name.

        Raises:
            ValueError: the address is refused. The message says what to do.
        """
        _check_port(port)
        address = _plain(address)
        if _find_kind(_LOOPBACK, address):
            if not self.allow_loopback:
                why = "is loopback, open only while this service listens on loopback alone"
                raise ValueError(f"{address} {why}; send an address that other machines can reach.")
        elif kind := _find_kind(_NEVER, address):
            raise ValueError(
                f"{address} is in {kind}, which is never connected to; send one that is reached over the network."
            )
        elif any(entry.covers(address, port) for entry in self.allowed):
            for carried in _carried_ipv4(address):
                self.check_address(carried, port)
        elif kind := _find_kind(_CLOSED, address):
            prefix = 24 if isinstance(address, IPv4Address) else 96 if _carried_ipv4(address) else 64
            setting = f"LUCID_EGRESS_ALLOW={ip_network(f'{address}/{prefix}', strict=False)}"
            raise ValueError(f"{address} is in {kind}; the operator of this service can allow it with {setting}")


def _check_characters(text: str) -> None:
    """Refuse an over-long URL and the characters that URL parsers interpret differently."""
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"The URL is longer than {MAX_URL_CHARACTERS} characters; send a shorter one.")
    for pattern, sentence in _FORBIDDEN_CHARACTERS:
        if re.search(pattern, text):
            raise ValueError(f"The URL has {sentence}.")


def _parse_authority(authority: str, default_port: int) -> tuple[str, int]:
    """Split `host`, `host:port` or `[address]:port`; an IPv6 host keeps its brackets."""
    if "@" in authority:
        raise ValueError("The URL has a user name or password before the host; send it without them.")
    if "%" in authority:
        raise ValueError("The host has a % in it; send it without percent-encoding and without an IPv6 zone.")
    match = re.fullmatch(r"(\[[^\[\]]+]|[^\[\]:]+)(?::([^:]*))?", authority)
    if match is None:
        raise ValueError(f"The URL has no readable host; send one like {_EXAMPLE} or http://[2001:4860::1]:8080/v1.")
    port = match[2] or ""
    if match[2] is not None and not re.fullmatch(_PORT, port):
        raise ValueError(f"The port is not a number from 1 to 65535; send one like {_EXAMPLE}.")
    _check_port(int(port or default_port))
    return match[1], int(port or default_port)


def _check_port(port: int) -> None:
    """Refuse ports where usually other protocols than HTTP are served."""
    if port not in DEFAULT_PORTS.values() and (port not in range(1024, 65536) or port in DENIED_PORTS):
        denied = "2375-2380, 3306, 5432, 6379, 6443, 9200, 10250, 11211 and 27017"
        raise ValueError(f"Port {port} is refused; use 443, 80 or 1024-65535 except {denied}.")


def _find_literal_address(host: str) -> Address | None:
    """Return the address that `host` is; None for a name, which needs DNS."""
    try:
        if host.startswith("["):
            return IPv6Address(host[1:-1])
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
            return IPv4Address(host)  # refuses 127.1, 0x7f.1, 2130706433 and leading zeros, which inet_aton(3) reads
    except AddressValueError as error:
        raise ValueError("The host is not a plain address; send IPv4 as 203.0.114.7 and IPv6 in brackets.") from error
    if not _NAME.fullmatch(host):
        raise ValueError("The host is no name; send letters, digits, - and _, with dots between parts of 1 to 63.")
    if host in METADATA_NAMES:
        raise ValueError(f"{host} names {_METADATA}; send the name of another machine.")
    return None


def _parse_base_path(path: str) -> str:
    """Return the path without a final slash, ending in a version."""
    path = path.removesuffix("/")
    if not _SEGMENTS.fullmatch(path):
        raise ValueError("The path has an empty part or a character that is not allowed there; send one like /v1.")
    if ".." in path or "." in path.split("/") or _ENCODED_TRICKS.search(path):
        raise ValueError("The path has . or .. steps or an encoded . / \\ % or control character; send it resolved.")
    return base_path_of(path)


def _parse_allowed_network(entry: str) -> AllowedNetwork:
    """Parse one entry of `LUCID_EGRESS_ALLOW`."""
    match = _ENTRY.fullmatch(entry)
    bracketed, ipv4, ipv6, first, last = match.groups() if match else (None,) * 5
    try:
        network = ip_network(bracketed or ipv4 or ipv6 or "")
    except ValueError as error:
        forms = "192.168.1.0/24, 192.168.1.0/24:8000-8999, fd00::/8 or [fd00::/8]:8000-8999"
        raise ValueError(f"LUCID_EGRESS_ALLOW has {entry!r}; write {forms}, starting at a first address.") from error
    allowed = AllowedNetwork(network, int(first or 1), int(last or first or 65535))
    if allowed.last_port not in range(allowed.first_port, 65536):
        raise ValueError(f"LUCID_EGRESS_ALLOW has {entry!r}; write its ports as first-last, from 1 to 65535.")
    if any(network[0] in never and network[-1] in never for never, _ in (*_NEVER, (_MAPPED, ""))):
        raise ValueError(f"LUCID_EGRESS_ALLOW has {entry!r}, which nothing opens; remove it, or write IPv4 as IPv4.")
    return allowed


def _plain(address: Address) -> Address:
    """Return the address without a zone, and an IPv4-mapped one as its IPv4 address."""
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped or IPv6Address(int(address))


def _find_kind(table: tuple[tuple[Network, str], ...], address: Address) -> str | None:
    """Return the name of the first network in the table that contains `address`."""
    return next((kind for network, kind in table if address in network), None)


def _carried_ipv4(address: Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that a tunnel's or translator's address contains; none for an ordinary address."""
    if isinstance(address, IPv4Address):
        return ()
    if any(address in network for network in _IPV4_LAST):
        return (IPv4Address(int(address) & 0xFFFFFFFF),)
    return address.teredo or ((address.sixtofour,) if address.sixtofour else ())
