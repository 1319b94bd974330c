"""Requests to addresses that users name, kept out of the network that the server stands in.

A name is resolved once, every address that it has must be public, and the connection goes to one of
these addresses: a name that changes its address between the check and the connection gains nothing.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpx

MAX_URL_LENGTH = 2048

Resolve = Callable[[str, int], Awaitable[list[str]]]

# Of their own: a name server that does not answer must not keep the threads of the routes busy.
_lookups = ThreadPoolExecutor(max_workers=4, thread_name_prefix="webhook-dns")

# Translates to any IPv4 address: RFC 6052.
_NAT64 = ip_network("64:ff9b::/96")


class AddressError(ValueError):
    """An address that is not called from here, and why."""


def parse_url(url: str, allow_private: bool = False) -> httpx.URL:
    """The URL, if it has a form that may be called. No name is resolved.

    Args:
        allow_private: accept http too.

    Raises:
        AddressError: says what is wrong.
    """
    if len(url) > MAX_URL_LENGTH:
        raise AddressError(f"must have at most {MAX_URL_LENGTH} characters, got {len(url)}")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise AddressError("is not a valid URL") from None
    schemes = ("https", "http") if allow_private else ("https",)
    if parsed.scheme not in schemes or not parsed.host:
        begins = " or ".join(f"{scheme}://" for scheme in schemes)
        raise AddressError(f"must be an absolute URL that begins with {begins}")
    if not 0 < _port(parsed) < 65536:
        raise AddressError(f"has no valid port: {parsed.port}")
    if parsed.userinfo:
        raise AddressError("must not hold a user name or password")
    return parsed


async def resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a host.

    Raises:
        OSError: the name is not known.
    """
    lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_lookups, lookup)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def check_public(url: httpx.URL, resolve: Resolve = resolve) -> list[str]:
    """The addresses of a URL's host, all of them public.

    Raises:
        AddressError: one of them is private, loopback, link-local or otherwise not public.
        OSError: the name is not known.
    """
    try:
        addresses = await resolve(url.raw_host.decode("ascii"), _port(url))
    except UnicodeError:  # getaddrinfo encodes names itself
        raise AddressError("holds a host name that is not valid") from None
    if not all(is_public(address) for address in addresses):
        raise AddressError(f"leads to an address that is not public: {url.host}")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        embedded = _embedded(ip)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not ip.is_multicast


class PublicTransport(httpx.AsyncBaseTransport):
    """Connects to public addresses only.

    No connection is used twice: one that was verified for a name must not serve another name of the
    same address.

    Raises:
        AddressError: instead of connecting.
    """

    def __init__(self, resolve: Resolve = resolve) -> None:
        self._resolve = resolve
        self._transport = new_transport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        try:
            addresses = await check_public(url, self._resolve)
        except OSError as error:
            raise httpx.ConnectError(f"the host is not known: {error}", request=request) from error
        # The Host header is set already; TLS asks for, and checks, the name.
        request.extensions = {**request.extensions, "sni_hostname": url.raw_host.decode("ascii")}
        failure: Exception = httpx.ConnectError("the host has no address", request=request)
        for address in addresses:
            request.url = url.copy_with(host=address)
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def aclose(self) -> None:
        await self._transport.aclose()


def new_transport() -> httpx.AsyncHTTPTransport:
    """A transport that keeps no connections."""
    return httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))


def _port(url: httpx.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


def _embedded(ip: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return None
