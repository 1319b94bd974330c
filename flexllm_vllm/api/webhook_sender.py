"""Sends what the store has for webhook endpoints: a task in each API process.

Signed as Standard Webhooks and OpenAI do it: https://www.standardwebhooks.com.
"""

import asyncio
import base64
import hashlib
import hmac
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from flexllm_vllm.api.background import in_background
from flexllm_vllm.api.public_network import (
    AddressError,
    PublicTransport,
    check_public,
    new_transport,
    parse_url,
)
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.webhook_deliveries import event_text, new_webhook_id, webhook_event
from flexllm_vllm.jobs.webhook_types import WebhookDelivery, WebhookEndpoint
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

_HOUR = 3600
# From each attempt to the next one: what Standard Webhooks recommends, cut at OpenAI's 72 hours.
RETRY_DELAYS_S = (
    5,
    5 * 60,
    30 * 60,
    2 * _HOUR,
    5 * _HOUR,
    10 * _HOUR,
    14 * _HOUR,
    20 * _HOUR,
    20 * _HOUR,
)
# Share of a delay that is left to chance: what failed together shall not come together again.
JITTER = 0.2
TIMEOUT_S = 10.0
# Of what an endpoint asks for with ``Retry-After``.
MAX_WAIT_S = 24 * _HOUR
# Attempts that this process makes at once.
MAX_IN_FLIGHT = 16
# Between looks at the store, of some microseconds each.
POLL_S = 1.0
# What attempts in flight get when the server ends.
STOP_S = 2.0


class SendError(Exception):
    """A request that got no answer, and why."""


def sign(secrets: Sequence[str], webhook_id: str, timestamp: int, body: str) -> str:
    """The ``webhook-signature`` of a request: one signature for each secret."""
    signed = f"{webhook_id}.{timestamp}.{body}".encode()
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    digests = [hmac.new(key, signed, hashlib.sha256).digest() for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: a number, or until a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


class WebhookSender:
    """Deliveries as one API process makes them.

    Args:
        allow_private: call private addresses and http too.
        retry_delays_s: seconds from each attempt to the next; after the last one it gives up.
        poll_s: seconds between looks for changes of the store.
    """

    def __init__(
        self,
        store: JobStore,
        allow_private: bool = False,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._deliveries = store.webhooks.deliveries
        self._allow_private = allow_private
        self._retry_delays_s = tuple(retry_delays_s)
        self._poll_s = poll_s
        self._attempts: set[asyncio.Task[None]] = set()
        self._client = httpx.AsyncClient(
            transport=new_transport() if allow_private else PublicTransport(),
            headers={"user-agent": "flexllm-vllm", "content-type": "application/json"},
            timeout=TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # receivers set none
        )

    async def check_url(self, url: str) -> None:
        """Refuse an address that would never be called. One whose name is not known may be yet.

        Raises:
            AddressError: says what is wrong.
        """
        parsed = parse_url(url, self._allow_private)
        if not self._allow_private:
            with suppress(OSError):  # a TimeoutError is one
                async with asyncio.timeout(TIMEOUT_S):
                    await check_public(parsed)

    async def test(self, endpoint: WebhookEndpoint, event_type: str) -> int:
        """Send a sample event at once.

        Returns:
            The HTTP status of the answer.

        Raises:
            SendError: there was none.
        """
        body = event_text(webhook_event(event_type, "ftjob-test", int(time.time())))
        status, _ = await self._post(endpoint.url, endpoint.secrets, new_webhook_id(), body)
        return status

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver as long as the context lasts. It can be entered once."""
        try:
            async with in_background(self._watch()):
                yield
        finally:
            await self._end_attempts()
            await self._client.aclose()

    async def _watch(self) -> None:
        while True:
            try:
                version = self._store.data_version()
                await self._wait(version, await self._start_due())
            except Exception:
                logger.exception("webhooks: the store cannot be used; trying again")
                await asyncio.sleep(10 * self._poll_s)

    async def _start_due(self) -> float | None:
        """Begin attempts that are due; returns when the next one is, as far as known."""
        due = await asyncio.to_thread(self._deliveries.next_due)
        free = MAX_IN_FLIGHT - len(self._attempts)
        if due is None or due > time.time() or free <= 0:
            return due
        for delivery in await asyncio.to_thread(self._deliveries.claim, free):
            attempt = asyncio.create_task(self._attempt(delivery))
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
        return await asyncio.to_thread(self._deliveries.next_due)

    async def _wait(self, version: int, due: float | None) -> None:
        """Until the store has changed (by our own reports too) or an attempt can begin."""
        while True:
            await asyncio.sleep(self._poll_s)
            if self._store.data_version() != version:
                return
            if due is not None and due <= time.time() and len(self._attempts) < MAX_IN_FLIGHT:
                return

    async def _attempt(self, delivery: WebhookDelivery) -> None:
        try:
            await self._deliver(delivery)
        except asyncio.CancelledError:
            # Without an await, which a second cancellation would end.
            self._deliveries.release(delivery)
            raise
        except Exception:  # the lease ends, then it is tried again
            logger.exception("webhook %s: the attempt could not be recorded", delivery.id)

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        try:
            status, wait_s = await self._post(
                delivery.url, delivery.secrets, delivery.id, delivery.body
            )
        except SendError as error:
            await self._failed(delivery, str(error))
            return
        if 200 <= status < 300:
            await asyncio.to_thread(self._deliveries.delivered, delivery)
        elif status == 410:
            reason = "the endpoint answered 410 Gone"
            await asyncio.to_thread(self._deliveries.give_up_endpoint, delivery.endpoint_id, reason)
            logger.warning("webhook endpoint %s is gone (HTTP 410)", delivery.endpoint_id)
        else:
            await self._failed(delivery, f"HTTP status {status}", wait_s)

    async def _failed(self, delivery: WebhookDelivery, reason: str, wait_s: float = 0.0) -> None:
        """``wait_s``: how long the endpoint asks us to wait, at least."""
        if delivery.attempt > len(self._retry_delays_s):
            await asyncio.to_thread(self._deliveries.give_up, delivery, reason)
            then = "it is given up"
        else:
            delay = self._retry_delays_s[delivery.attempt - 1] * (1 - JITTER * random.random())
            delay = max(delay, min(wait_s, MAX_WAIT_S))
            await asyncio.to_thread(self._deliveries.retry, delivery, reason, round(delay))
            then = f"the next one follows in {delay:.0f} s"
        logger.warning(
            "webhook %s to endpoint %s: attempt %d failed (%s), %s",
            delivery.id,
            delivery.endpoint_id,
            delivery.attempt,
            reason,
            then,
        )

    async def _post(
        self, url: str, secrets: Sequence[str], webhook_id: str, body: str
    ) -> tuple[int, float]:
        """The HTTP status of the answer, and the seconds of its ``Retry-After``; its body is not
        read."""
        timestamp = int(time.time())
        headers = {
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(secrets, webhook_id, timestamp, body),
        }
        try:
            # Of the whole exchange: httpx's own limits are for each read and write.
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._client.stream(
                    "POST", parse_url(url, self._allow_private), content=body, headers=headers
                ) as response,
            ):
                return response.status_code, retry_after_s(response.headers)
        except (TimeoutError, httpx.TimeoutException):
            raise SendError(f"no answer within {TIMEOUT_S:.0f} s") from None
        except AddressError as error:
            raise SendError(f"the URL {error}") from None
        except (httpx.HTTPError, OSError, UnicodeError) as error:  # of names that are none, too
            raise SendError(str(error) or type(error).__name__) from None

    async def _end_attempts(self) -> None:
        """Let attempts in flight finish, not for long; the others begin again elsewhere."""
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=STOP_S)
        attempts = list(self._attempts)
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
