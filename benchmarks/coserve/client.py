"""The load client, in a process of its own: light, since the cores belong to what is measured.

``python -m benchmarks.coserve.client ORDER RECORD`` reads a :class:`LoadOrder` as JSON, runs it,
and writes a :class:`LoadRecord`. Times are seconds since the epoch.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.coserve.loads import Stream
from benchmarks.coserve.processes import group_cpu_seconds

# Seconds after the window for first tokens of requests that were sent within it.
DRAIN = 5.0
VOCABULARY = (100, 40_000)


@dataclass(frozen=True)
class LoadOrder:
    """What to send.

    Attributes:
        url: of the server; None sends nothing.
        streams: the load.
        warm_up, seconds: of the load before the measuring window, and of the window.
        seed: of the prompts' tokens.
        training: process group of a trainer whose processor time is read at both ends.
        gives_way: the trainer is stopped while a request is in flight.
    """

    url: str | None
    streams: list[Stream]
    warm_up: float
    seconds: float
    seed: int
    training: int | None = None
    gives_way: bool = False


@dataclass
class RequestRecord:
    """One request.

    Attributes:
        sent: when.
        tokens: when each output token came.
        ended: when it was complete; None if it was not.
        error: what went wrong.
    """

    sent: float
    tokens: list[float] = field(default_factory=list)
    ended: float | None = None
    error: str | None = None


@dataclass
class LoadRecord:
    """What happened.

    Attributes:
        begin, end: of the measuring window.
        requests: all that were sent.
        training_cpu: processor seconds of the trainer at both ends of the window.
        stopped: when the client stopped waiting, after the window.
        client_cpu: share of a core that the client itself used.
    """

    begin: float
    end: float
    requests: list[RequestRecord]
    training_cpu: tuple[float, float] | None
    stopped: float
    client_cpu: float


class LoadClient:
    """Runs one order."""

    def __init__(self, order: LoadOrder) -> None:
        self._order = order
        self._requests: list[RequestRecord] = []
        self._in_flight = 0
        self._closing = False

    async def run(self) -> LoadRecord:
        order = self._order
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        cpu_began, began = time.process_time(), time.time()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            tasks = [
                asyncio.create_task(self._stream(session, began, index, stream))
                for index, stream in enumerate(order.streams)
            ]
            begin = began + order.warm_up
            end = begin + order.seconds
            await asyncio.sleep(begin - time.time())
            cpu = [self._training_cpu()]
            await asyncio.sleep(end - time.time())
            cpu.append(self._training_cpu())
            self._closing = True
            while time.time() < end + DRAIN and self._awaited(begin, end):
                await asyncio.sleep(0.05)
            stopped = time.time()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return LoadRecord(
            begin=begin,
            end=end,
            requests=self._requests,
            training_cpu=(cpu[0], cpu[1]) if order.training is not None else None,
            stopped=stopped,
            client_cpu=(time.process_time() - cpu_began) / (time.time() - began),
        )

    def _training_cpu(self) -> float:
        group = self._order.training
        return 0.0 if group is None else group_cpu_seconds(group)

    def _awaited(self, begin: float, end: float) -> bool:
        """Whether a request of the window still has no first token."""
        return any(
            begin <= r.sent < end and not r.tokens and r.error is None for r in self._requests
        )

    async def _stream(
        self, session: aiohttp.ClientSession, began: float, index: int, stream: Stream
    ) -> None:
        rng = random.Random(self._order.seed * 1_000_003 + index)
        await asyncio.sleep(max(0.0, began + stream.start - time.time()))
        for prompt_tokens, output_tokens in stream.requests:
            if self._closing:
                return
            prompt = [rng.randrange(*VOCABULARY) for _ in range(prompt_tokens)]
            record = RequestRecord(sent=time.time())
            self._requests.append(record)
            self._count(+1)
            try:
                await self._send(session, record, prompt, output_tokens)
            except (aiohttp.ClientError, RuntimeError) as error:
                record.error = repr(error)[:500]
                await asyncio.sleep(0.5)
            finally:
                self._count(-1)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        prompt: list[int],
        output_tokens: int,
    ) -> None:
        body = {
            "model": "base",
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        async with session.post(f"{self._order.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now = time.time()
                chunk = json.loads(line[6:])
                if "usage" not in chunk:
                    raise RuntimeError(f"a chunk without usage: {line[:300]!r}")
                # A chunk that carries several tokens counts as so many tokens at once.
                new = chunk["usage"]["completion_tokens"] - len(record.tokens)
                record.tokens.extend([now] * new)
        if len(record.tokens) != output_tokens:
            raise RuntimeError(f"{len(record.tokens)} tokens came, not {output_tokens}")
        record.ended = time.time()

    def _count(self, change: int) -> None:
        before = self._in_flight
        self._in_flight += change
        if not self._order.gives_way or self._order.training is None:
            return
        if before == 0:
            os.killpg(self._order.training, signal.SIGSTOP)
        elif self._in_flight == 0:
            os.killpg(self._order.training, signal.SIGCONT)


def read_order(text: str) -> LoadOrder:
    values: dict[str, Any] = json.loads(text)
    streams = [
        Stream(s["start"], tuple((p, o) for p, o in s["requests"])) for s in values.pop("streams")
    ]
    return LoadOrder(streams=streams, **values)


def read_record(text: str) -> LoadRecord:
    values: dict[str, Any] = json.loads(text)
    requests = [RequestRecord(**r) for r in values.pop("requests")]
    return LoadRecord(requests=requests, **values)


def main() -> None:
    order, record = map(Path, sys.argv[1:])
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    result = asyncio.run(LoadClient(read_order(order.read_text())).run())
    record.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
