"""Provider URLs and egress addresses: tables written by hand, and properties against four other readers.

No expectation is computed by the code under test; the generators below do their own arithmetic on the octets.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import product
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.egress.policy import AllowedNetwork, EgressPolicy, parse_allowed_networks, parse_provider_url

PUBLIC = EgressPolicy()
OPEN = EgressPolicy(allowed=parse_allowed_networks("0.0.0.0/0,::/0,64:ff9b:1::/96"))

OPEN_TO_ALL = EgressPolicy(allow_loopback=True, allowed=OPEN.allowed)

LONG_LABEL, LONGEST_NAME = "a" * 64, ".".join(["a" * 63] * 3 + ["b" * 61])
# Each is canonical, and means the same without its /v1 or with a slash at the end.
CANONICAL = f"""http://your-gpu:8080/v1 http://gpu.example.com/v1 http://gpu.example.com:443/v1
    https://gpu.example.com/v1 https://gpu.example.com:80/v1 http://gpu:1024/v1 http://gpu:65535/v1
    http://gpu:2374/v1 http://gpu:2381/v1 http://gpu/llama/v1 http://gpu/xv1/v1 http://gpu/v/v1 http://gpu/v1x/v1
    http://gpu/a.b/c,d;e=f/v1 http://gpu/~me/@you:me/v1 http://gpu/a%20b%E9/v1 http://_my_gpu:8080/v1
    http://xn--bcher-kva.example/v1 http://1.2.3.4.example/v1 http://10-0-0-1.example/v1 http://0xgpu/v1
    http://localhost/v1 http://192.168.1.20/v1 http://[2001:4860::abcd]:8080/v1 http://{LONGEST_NAME}/v1"""
SPELLINGS = [(url, spelling) for url in CANONICAL.split() for spelling in (url, url + "/", url[:-3], url[:-2])]
SPELLINGS += [("http://gpu/v1/v1", "http://gpu/v1/v1"), (f"http://gpu/{'a' * 2034}/v1", f"http://gpu/{'a' * 2034}")]
SPELLINGS += [("https://gpu/v1", "HTTPS://Gpu:443/v1/"), ("http://[1::a]/v1", "http://[1:0:0::A]:80")]
# Each ends in a version of its own, and is used as it is.
VERSIONED = """http://gpu/V1 http://gpu/v3 http://gpu/api/paas/v4 http://gpu/v1beta http://gpu/v1beta/openai http://gpu/v1/openai
    http://gpu/v2alpha1 http://gpu/V4 http://gpu/a/v1.1 http://gpu/openai/v12 http://gpu/V1Beta/OpenAI
    http://gpu/v1beta1/projects/p/locations/l/endpoints/openapi http://gpu/embeddings/v1 http://gpu/chat/completions/v3"""
SPELLINGS += [(url, spelling) for url in VERSIONED.split() for spelling in (url, url + "/")]
# Bases, though a word of theirs is an endpoint's elsewhere.
BASES = f"""{VERSIONED} {CANONICAL} http://gpu http://gpu/models http://gpu/rerank http://gpu/my-completions http://gpu/chat
    http://gpu/completions2 http://gpu/v1x/models"""
PASTED = """/chat/completions /completions /embeddings /responses /messages /moderations /audio/speech
    /images/generations /v1/models
    /v1/chat /v1/rerank /v4/score /v1beta/openai/models /api/chat /api/generate /v1/messages/count_tokens"""
# A piece of the sentence that refuses, and what it refuses: whole URLs, then what stands behind http://.
NOT_HTTP = """ftp://gpu file:///etc/passwd gopher://gpu ws://gpu unix:///tmp/x gpu:8080 //gpu:8080 http:gpu http:/gpu
    httpx://gpu https//gpu javascript:alert(1) data:,x http+unix://x :// http gpu 8.8.8.8 [::1]:8080"""
REJECTED = {
    "user name": "me@gpu me:secret@gpu :secret@gpu @gpu gpu:80@8.8.8.8:80/v1 [::1]@gpu a@[::1] secret%40a@gpu",
    "a backslash": r"ok.com\@127.0.0.1/ gpu\v1 gpu/v1\.. gpu\.evil.com \gpu \\gpu",
    "a query": "gpu? gpu?x=1 gpu/v1?key=secret gpu#x gpu/v1# ok.com#@127.0.0.1 8.8.8.8?@gpu gpu/v1?#",
    "a % in it": "%31.0.0.1 gpu%00.x gpu%2ex [fe80::1%25eth0] [fe80::1%eth0] [2001:4860::1%1]:80 gpu%20 gpu%:80",
    "no readable host": "/ /v1 :8080 [] []:80 [::1 ::1] ::1 ::1:80 2001::1/v1 [::1]x x[::1] [[::1]] [::1][::1] a:b:80",
    "port is not a number": """gpu:0 gpu: gpu:/v1 gpu:-1 gpu:+80 gpu:080 gpu:0x50 gpu:8080a gpu:1e3 gpu:http gpu:100000
        gpu:0443 gpu:80.0 gpu:8_080 [::1]: [::1]:0""",
    "is refused; use": """gpu:1 gpu:22 a:79 a:81 a:442 a:444 gpu:1023 gpu:65536 gpu:2375 gpu:2376 gpu:2377 gpu:2378
        gpu:2379 gpu:2380 gpu:3306 gpu:5432 gpu:6379 gpu:6443 gpu:9200 gpu:10250 gpu:11211 gpu:27017 8.8.8.8:22""",
    "not a plain address": """0 1 127 127.1 1.2.3 1.2.3.4.5 256.1.1.1 1.2.3.04 01.2.3.4 0x7f.1 0X7F000001 0x 2130706433
        017700000001 gpu.1 gpu.example.0x7f gpu.0x a.b.c.4 127.0.0.0x1 .1 1..2 -1.2.3.4 1.2.3.4_.5 [gpu] [127.0.0.1]
        [::g] [1::2::3] [:::] [1:2:3:4:5:6:7] [::12345] [v1.fe80] [::1.2.3] [.] [::ffff:127.0.0.01]""",
    "The host is no name": f"""gpu. 127.0.0.1. 8.8.8.8. localhost. .gpu gpu..x . .. -gpu gpu- a.-b a-.b - gpu! g*u a,b
        $(id) a;b a=b a&b {LONG_LABEL} x.{LONG_LABEL}.x {LONGEST_NAME}b 'gpu' a|b <a> "a" ~a a+b 0x7f.1. metadata.""",
    "names the metadata": """metadata metadata.google.internal METADATA.google.internal:80/v1 metadata.goog
        instance-data metadata.tencentyun.com instance-data.ec2.internal""",
    "an empty part": """gpu//v1 gpu/v1// gpu// gpu//evil.example/v1 gpu/a//b gpu/<a> gpu/{a} gpu/a|b gpu/% gpu/%2
        gpu/%zz gpu/[a] gpu/"a" gpu/a^b gpu/a`b""",
    "or .. steps": """gpu/.. gpu/../v1 gpu/v1/.. gpu/a/../v1 gpu/./v1 gpu/. gpu/..;/v1 gpu/a..b gpu/... gpu/%2e%2e/v1
        gpu/a%2fb gpu/a%2Fb gpu/a%5cb gpu/%00 gpu/%0d%0aHost:x gpu/%09 gpu/%1f gpu/%7F gpu/%252e gpu/%c0%ae""",
    "longer than": f"gpu/{'a' * 2038} gpu/{'a' * 2035} gpu/v1/{'a/' * 2000} {'a' * 100_000}",
}
CONTROLS = [chr(code) for code in (*range(0x21), 0x7F)]
FOREIGN = "\x80\x85\xa0\xad\u00e9\u00df\u200b\u200d\u2024\u2028\u2060\u3002\uff0e\uff61\uff0f\uff20\u2488\u2460\uff11"
PLACES = "{}http://gpu:80/v1 http://g{}pu:80/v1 http://gpu:8{}0/v1 http://gpu:80/{}v1 http://gpu:80/v1{}"

# First and last of each closed range, then the addresses beside it: + public, - closed too, . none. A * is all ones.
RANGES = """
    0.0.0.0 0.255.255.255 . +1.0.0.0  10.0.0.0 10.255.255.255 +9.255.255.255 +11.0.0.0
    100.64.0.0 100.127.255.255 +100.63.255.255 +100.128.0.0  127.0.0.0 127.255.255.255 +126.255.255.255 +128.0.0.0
    169.254.0.0 169.254.255.255 +169.253.255.255 +169.255.0.0  172.16.0.0 172.31.255.255 +172.15.255.255 +172.32.0.0
    192.0.0.0 192.0.0.255 +191.255.255.255 +192.0.1.0  192.0.2.0 192.0.2.255 +192.0.1.255 +192.0.3.0
    192.88.99.0 192.88.99.255 +192.88.98.255 +192.88.100.0  192.168.0.0 192.168.255.255 +192.167.255.255 +192.169.0.0
    198.18.0.0 198.19.255.255 +198.17.255.255 +198.20.0.0  198.51.100.0 198.51.100.255 +198.51.99.255 +198.51.101.0
    203.0.113.0 203.0.113.255 +203.0.112.255 +203.0.114.0  224.0.0.0 239.255.255.255 +223.255.255.255 -240.0.0.0
    240.0.0.0 255.255.255.254 -239.255.255.255 -255.255.255.255  168.63.129.16 +168.63.129.15 +168.63.129.17
    :: 1fff:* . +2000::  ::1 ::1 -:: -::2  :: ::ffff:ffff . -::1:0:0
    ::ffff:0:0:0 ::ffff:0:ffff:ffff -::fffe:ffff:ffff:ffff -::ffff:1:0:0  +1.1.1.1 +8.8.8.8 +2620:4f:8000::1
    64:ff9b:: 64:ff9b::ffff:ffff -64:ff9a:* -64:ff9b::1:0:0  64:ff9b:1:: 64:ff9b:1:* -64:ff9b:0:* -64:ff9b:2::
    2001:: 2001:1ff:* +2000:* +2001:200::  2001:db8:: 2001:db8:* +2001:db7:* +2001:db9::  2002:: 2002:* +2001:* +2003::
    3fff:: 3fff:fff:* +3ffe:* +3fff:1000::  4000:: 7fff:* +3fff:* -8000::  5f00:: 5f00:* -5eff:: -5f01::
    fc00:: fdff:* -fbff:: -fe00::  fe80:: febf:* -fe7f:: -fec0::  ff00:: ffff:* -feff:: ."""
ENDS = [text.replace("*", ":".join(["ffff"] * (8 - text.count(":")))) for text in RANGES.split() if text != "."]
OUTSIDE = [text.strip("+") for text in ENDS if text[0] == "+"]
CLOSED = [text.strip("-") for text in ENDS if text[0] != "+"]
NEVER = """:: febf::1 ff02::1 ffff::1 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:42::42 fe80::1%0 0.0.0.0 0.0.0.7
    169.254.0.0 169.254.169.254 224.0.0.1 239.255.255.255 255.255.255.255 168.63.129.16 100.100.100.200 192.0.0.192"""
NEVER_IPV4 = [text for text in NEVER.split() if ":" not in text]
LOOPBACK = """localhost LOCALHOST localhost6 localhost.localdomain ip6-localhost ip6-loopback a.b.localhost
    127.0.0.0 127.0.0.1 127.9.9.9 127.255.255.255 [::1] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1]"""
# A closed address, what its refusal calls it, and the setting that it proposes.
PROPOSALS = """
    192.168.1.20 a_private_range 192.168.1.0/24  10.1.2.3 a_private_range 10.1.2.0/24  fd00::1 a_private_range fd00::/64
    fc00:1::5 a_private_range fc00:1::/64  64:ff9b:1::808:808 no_public_range_(2000::/3) 64:ff9b:1::/96"""
# An entry of LUCID_EGRESS_ALLOW, its network and its ports.
ENTRIES = """
    10.0.0.0/8 10.0.0.0/8 1-65535  10.0.0.0/8:8000-8999 10.0.0.0/8 8000-8999  10.0.0.0/8:8000 10.0.0.0/8 8000-8000
    10.0.0.20 10.0.0.20/32 1-65535  10.0.0.20:80 10.0.0.20/32 80-80  fd00::/8 fd00::/8 1-65535  ::/0 ::/0 1-65535
    [fd00::/8] fd00::/8 1-65535  [fd00::/8]:8000-8999 fd00::/8 8000-8999  fd00::/8:8000 fd00::/8 8000-8000
    [FD00::1]:80 fd00::1/128 80-80  0.0.0.0/0 0.0.0.0/0 1-65535  127.0.0.0/8 127.0.0.0/8 1-65535"""
BAD_ENTRIES = {
    "at a first address": """gpu 10.0.0.1/24 10.0.0.0/33 10.0.0/8 10.0.0.0/ fd00::1:80 fd00::1/8 [::/8 * ,::/0 ::/0,
        [::/8]80 ::/8: ::/8:0 ::/8:80- ::/8:-80 ::/8:8:9 ::/0,,::/0 , 0xa.0.0.0/8 010.0.0.0/8 ::/0;::/0 http://a""",
    "its ports": "10.0.0.0/8:9000-8000 10.0.0.0/8:65536 10.0.0.0/8:1-65536 10.0.0.0/8:99999 [fd00::/8]:2-1",
    "nothing opens": """169.254.0.0/16 169.254.169.254 fe80::/10 [fe80::1]:80 224.0.0.0/8 ff02::/16 0.0.0.0/32 ::/128
        168.63.129.16 100.100.100.200/32:80 fd00:ec2::254/128 ::ffff:10.0.0.0/104""",
}


def pairs(table: dict[str, str], prefix: str = "") -> list[tuple[str, str]]:
    """List the vectors of a table, each behind its key."""
    return [(key, prefix + vector) for key, vectors in table.items() for vector in vectors.split()]


def numeric_spellings(dotted: str) -> list[str]:
    """Spell an IPv4 address as inet_aton(3) and browsers read it, and as the policy must not."""
    a, b, c, d = (int(octet) for octet in dotted.split("."))
    whole, last3, last2 = (a << 24) + (b << 16) + (c << 8) + d, (b << 16) + (c << 8) + d, (c << 8) + d
    parts = product([(whole,), (a, last3), (a, b, last2), (a, b, c, d)], ["{}", "{:#x}", "{:#X}", "0{:o}", "000{:o}"])
    others = [f"{whole + 2**32}", f"{a}.{b}.{c}.{d:#x}", f"{a}.{b}.{c}.0{d:o}", f"{dotted}.", f"[{dotted}]"]
    return [*others, *({".".join(form.format(part) for part in row) for row, form in parts} - {dotted})]


def carriers(*addresses: str) -> list[str]:
    """Put IPv4 addresses into each kind of IPv6 address that carries one, the mapped kind aside."""
    found = []
    for a, b, c, d in ((int(octet) for octet in dotted.split(".")) for dotted in addresses):
        plain, flipped = f"{a:02x}{b:02x}:{c:02x}{d:02x}", f"{255 - a:02x}{255 - b:02x}:{255 - c:02x}{255 - d:02x}"
        found += [prefix + plain for prefix in ("::", "::ffff:0:", "64:ff9b::", "64:ff9b:1::")]
        found += [f"2002:{plain}::1", f"2001:0:{plain}::f7f7:f7f7", f"2001:0:808:808::{flipped}"]
    return found


def mapped(addresses: list[str]) -> list[str]:
    """Spell the IPv4 addresses among these as IPv4-mapped IPv6."""
    return [f"::ffff:{address}" for address in addresses if ":" not in address]


def refusal(address: str, policy: EgressPolicy = PUBLIC, port: int = 8080) -> str:
    """Return the sentence with which `policy` refuses `address`."""
    with pytest.raises(ValueError, match=r".+; .+") as refused:
        policy.check_address(ip_address(address), port)
    return str(refused.value)


@pytest.mark.parametrize(("canonical", "sent"), SPELLINGS)
def test_a_provider_url_has_one_canonical_spelling(canonical: str, sent: str) -> None:
    assert parse_provider_url(sent).canonical == canonical


@pytest.mark.parametrize("path", PASTED.split())
@pytest.mark.parametrize("spelling", ["{}", "{}/", "/v1{}", "/llama{}", "/api/paas/v4{}"])
def test_an_endpoint_that_is_pasted_as_a_base_is_refused_with_the_endpoint(path: str, spelling: str) -> None:
    url = f"http://gpu:8080{spelling.format(path)}"
    for sent in (url, url.upper().replace("HTTP", "http"), url.replace("t", "%74", 3).replace("h%74%74p", "http")):
        with pytest.raises(ValueError, match=r"ends in the endpoint (/.+); send the base URL, without \1\.$"):
            PUBLIC.check_base_url(sent)
    PUBLIC.check_url(url)  # of a webhook, it is a path like any other


@pytest.mark.parametrize("url", BASES.split())
def test_a_base_is_no_endpoint(url: str) -> None:
    assert OPEN_TO_ALL.check_base_url(url)


def test_the_parts_of_a_url_say_where_requests_go() -> None:
    url = parse_provider_url("http://[2001:4860::8888]:8080/llama/v1")
    assert (url.scheme, url.host, url.port, url.base_path) == ("http", "2001:4860::8888", 8080, "/llama/v1")
    assert (url.authority, url.literal_address) == ("[2001:4860::8888]:8080", IPv6Address("2001:4860::8888"))
    url = parse_provider_url("https://gpu.example")
    assert (url.port, url.base_path, url.authority, url.known_addresses) == (443, "/v1", "gpu.example", ())


@pytest.mark.parametrize(("words", "url"), [*pairs({"neither http": NOT_HTTP}), *pairs(REJECTED, "http://")])
def test_a_url_that_readers_could_disagree_on_is_refused_with_its_reason(words: str, url: str) -> None:
    with pytest.raises(ValueError, match=r".+[;:] .+") as refused:
        parse_provider_url(url)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("place", PLACES.split())
@pytest.mark.parametrize("character", [*CONTROLS, *FOREIGN])
def test_an_unprinted_or_foreign_character_is_refused_wherever_it_stands(character: str, place: str) -> None:
    with pytest.raises(ValueError, match="a control character" if character in CONTROLS else "outside ASCII"):
        parse_provider_url(place.format(character))


@pytest.mark.parametrize("dotted", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.1.20", "8.8.8.8"])
def test_an_ipv4_address_has_one_spelling_and_no_other(dotted: str) -> None:
    assert parse_provider_url(f"http://{dotted}:8080").host == dotted
    for spelling in numeric_spellings(dotted):
        with pytest.raises(ValueError, match=r"not a plain address|no name"):
            parse_provider_url(f"http://{spelling}:8080/v1")


def test_plain_http_is_refused_where_https_is_required() -> None:
    assert EgressPolicy(require_https=True).check_url("https://gpu.example").port == 443
    with pytest.raises(ValueError, match="takes https URLs only"):
        EgressPolicy(require_https=True).check_url("http://gpu.example")


@pytest.mark.parametrize("address", [*OUTSIDE, *mapped(OUTSIDE)])
def test_a_public_address_is_open(address: str) -> None:
    PUBLIC.check_address(ip_address(address), 8080)


@pytest.mark.parametrize("address", [*CLOSED, *mapped(CLOSED), *carriers("8.8.8.8", "10.0.0.1", "127.0.0.1")])
def test_an_address_in_a_closed_range_is_refused(address: str) -> None:
    assert " is " in refusal(address)
    with pytest.raises(ValueError, match=" is "):
        PUBLIC.check_url(f"http://[{address}]:8080" if ":" in address else f"http://{address}:8080")


@pytest.mark.parametrize("address", [*NEVER.split(), *mapped(NEVER_IPV4), *carriers(*NEVER_IPV4)])
def test_no_allow_list_opens_link_local_multicast_or_metadata_however_wrapped(address: str) -> None:
    assert "never connected to" in refusal(address, OPEN)


@pytest.mark.parametrize("address", ["10.0.0.1", "240.0.0.1", "fd00::1", "fec0::1", "4000::1", *carriers("10.0.0.1")])
def test_an_allow_list_opens_other_closed_addresses_on_permitted_ports(address: str) -> None:
    OPEN.check_address(ip_address(address), 8080)
    assert "Port 6379 is refused" in refusal(address, OPEN, port=6379)


@pytest.mark.parametrize("host", LOOPBACK.split())
def test_loopback_is_open_only_while_the_service_listens_there_alone(host: str) -> None:
    assert EgressPolicy(allow_loopback=True).check_url(f"http://{host}:8080").port == 8080
    with pytest.raises(ValueError, match="is loopback"):
        OPEN.check_url(f"http://{host}:8080")


@pytest.mark.parametrize(("address", "kind", "proposal"), list(zip(*[iter(PROPOSALS.split())] * 3, strict=True)))
def test_a_refusal_proposes_the_setting_that_opens_the_address(address: str, kind: str, proposal: str) -> None:
    remedy = f"the operator of this service can allow it with LUCID_EGRESS_ALLOW={proposal}"
    assert refusal(address) == f"{address} is in {kind.replace('_', ' ')}; {remedy}"
    EgressPolicy(allowed=parse_allowed_networks(proposal)).check_address(ip_address(address), 8080)


def test_a_nat64_address_is_checked_as_the_ipv4_address_it_leads_to() -> None:
    nat64 = EgressPolicy(allowed=parse_allowed_networks("64:ff9b::/96,64:ff9b:1::/95"))
    nat64.check_address(ip_address("64:ff9b::808:808"), 8080)
    assert refusal("64:ff9b::a00:1", nat64).startswith("10.0.0.1 is in a private range")
    assert "no public range" in refusal("64:ff9b:1::808:808", nat64)


def test_an_allowed_network_is_open_on_its_ports_only() -> None:
    lan = EgressPolicy(allowed=parse_allowed_networks("192.168.1.0/24:8000-8999, [fd00::/8]:8000"))
    for address, port in [("192.168.1.0", 8000), ("::ffff:192.168.1.255", 8999), ("fd00::1", 8000)]:
        lan.check_address(ip_address(address), port)
    for address, port in [("192.168.1.1", 7999), ("192.168.1.1", 9000), ("192.168.2.0", 8000), ("fd00::1", 8001)]:
        refusal(address, lan, port)


@pytest.mark.parametrize(("entry", "network", "ports"), list(zip(*[iter(ENTRIES.split())] * 3, strict=True)))
def test_an_entry_of_the_allow_list_is_read(entry: str, network: str, ports: str) -> None:
    first, last = ports.split("-")
    assert parse_allowed_networks(f" {entry} ") == (AllowedNetwork(ip_network(network), int(first), int(last)),)
    assert len(parse_allowed_networks(f"{entry}, {entry}")) == len("ab")
    [read] = parse_allowed_networks(entry)
    assert parse_allowed_networks(str(read)) == (read,)
    assert parse_allowed_networks("") == parse_allowed_networks(" ") == ()


@pytest.mark.parametrize(("words", "text"), pairs(BAD_ENTRIES))
def test_an_unreadable_or_useless_entry_is_refused_with_its_reason(words: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^LUCID_EGRESS_ALLOW has .+ {words}"):
        parse_allowed_networks(text)


ADDRESSES = st.ip_addresses() | st.integers(0, 2**32 - 1).map(IPv4Address) | st.integers(0, 2**128 - 1).map(IPv6Address)
LITERALS = ADDRESSES.map(lambda address: f"[{address}]" if isinstance(address, IPv6Address) else str(address))
NAMES = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,9}[a-z])?(\.x[a-z0-9_]{1,9}){1,3}", fullmatch=True)
PIECES = "http:// gpu 127.0.0.1 0x7f 0 1 8080 : [::1] [ ] / // v1 a . .. - _ @ ? # % %2e %31 ; \\ é ::ffff:"


@given(st.sampled_from(["http", "HTTPS"]), LITERALS | NAMES, st.sampled_from(["", ":80", ":8080", "/v1/", "/A/b"]))
def test_the_canonical_form_is_read_as_itself(scheme: str, host: str, rest: str) -> None:
    url = parse_provider_url(f"{scheme}://{host}{rest}")
    assert parse_provider_url(url.canonical) == url


@given(st.lists(st.sampled_from([*PIECES.split(), "\t", " "]), max_size=8).map("".join).map("http://".__add__))
def test_every_reader_reads_what_is_accepted_alike(text: str) -> None:
    try:
        url = parse_provider_url(text)
    except ValueError:
        return
    for spelling in (text, url.canonical):
        sent, split = httpx.URL(spelling), urlsplit(spelling)
        assert {sent.raw_host.decode(), split.hostname} == {url.host}
        assert {sent.port or {"http": 80, "https": 443}[sent.scheme], split.port or url.port} == {url.port}


@given(st.lists(st.from_regex(r"0?[0-9]{1,3}|0x[0-9a-f]{0,8}|[0-9]{4,12}", fullmatch=True), min_size=1, max_size=5))
def test_what_inet_aton_reads_is_refused_or_means_the_same_address(parts: list[str]) -> None:
    with suppress(ValueError):
        url = parse_provider_url(f"http://{'.'.join(parts)}")
        assert url.host == str(url.literal_address) == socket.inet_ntoa(socket.inet_aton(".".join(parts)))


@given(ADDRESSES)
def test_what_is_open_the_standard_library_calls_global(address: IPv4Address | IPv6Address) -> None:
    with suppress(ValueError):
        PUBLIC.check_address(address, 8080)
        assert (getattr(address, "ipv4_mapped", None) or address).is_global
