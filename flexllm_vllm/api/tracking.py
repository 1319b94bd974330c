"""Sends the metrics of jobs to their trackers: threads in each API process, none in the engine.

The metrics are read from the store, so that a tracker that fails, hangs or is slow concerns neither
the job nor an iteration; what it has missed comes when it works again.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.api.tracker_sinks import OpenSink, Sink, sink_opener
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.tracker_types import JobTracker
from flexllm_vllm.jobs.trackers import LEASE_S
from flexllm_vllm.log import get_logger
from flexllm_vllm.trackers.errors import TrackerError
from flexllm_vllm.trackers.points import MetricPoint, metric_point
from flexllm_vllm.trackers.redact import redact

logger = get_logger(__name__)

TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}
POLL_S = 1.0
# Between looks for trackers whose next attempt is due, or whose process has died.
IDLE_POLL_S = 10.0
# From each attempt to the next one; after the last one it gives up. A success counts anew.
RETRY_DELAYS_S = (10, 60, 5 * 60, 30 * 60, 2 * 3600, 6 * 3600)
MAX_SESSIONS = 16
# What sessions get when the server ends.
STOP_S = 3.0


class _StoppedError(Exception):
    """The server ends."""


class _ClaimLostError(Exception):
    """Another process works for the tracker: we were taken for dead."""


class Tracking:
    """The trackers that one API process works for.

    Args:
        access: what this server can reach of trackers.
        retry_delays_s: seconds from each attempt to the next; after the last one it gives up.
        poll_s: seconds between looks for changes of the store.
        lease_s: seconds that a tracker stays ours without a sign of life.
    """

    def __init__(
        self,
        store: JobStore,
        access: TrackerAccess | None = None,
        retry_delays_s: Sequence[int] = RETRY_DELAYS_S,
        poll_s: float = POLL_S,
        lease_s: int = LEASE_S,
    ) -> None:
        self._store = store
        self._trackers = store.trackers
        self._open_sink: OpenSink = sink_opener(access or TrackerAccess())
        self._retry_delays_s = tuple(retry_delays_s)
        self._poll_s = poll_s
        self._lease_s = lease_s
        self._stop = threading.Event()
        self._sessions: set[threading.Thread] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Track as long as the context lasts. It can be entered once."""
        watching = threading.Thread(target=self._watch, name="tracking", daemon=True)
        watching.start()
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.to_thread(self._join, watching)

    def _join(self, watching: threading.Thread) -> None:
        deadline = time.monotonic() + STOP_S
        for thread in (watching, *list(self._sessions)):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> None:
        version, looked = None, 0.0
        while not self._stop.wait(self._poll_s):
            try:
                now = self._store.data_version()
                if now == version and time.monotonic() - looked < IDLE_POLL_S:
                    continue
                version, looked = now, time.monotonic()
                self._start_due()
            except Exception:
                logger.exception("trackers: the store cannot be used; trying again")
                self._stop.wait(10 * self._poll_s)

    def _start_due(self) -> None:
        free = MAX_SESSIONS - len(self._sessions)
        for tracker in self._trackers.claim(free, self._lease_s) if free > 0 else []:
            session = threading.Thread(
                target=self._session, args=(tracker,), name=f"tracking-{tracker.kind}", daemon=True
            )
            self._sessions.add(session)
            session.start()

    def _session(self, tracker: JobTracker) -> None:
        sink: Sink | None = None
        try:
            job = self._store.get_job(tracker.job_id)
            live = self._sign_of_life(tracker)
            sink = self._open_sink(job, tracker, live)
            self._follow(tracker, sink, live)
        except _StoppedError:
            self._trackers.release(tracker)
        except _ClaimLostError:
            logger.warning("%s of job %s: another process has it", tracker.kind, tracker.job_id)
        except (TrackerError, OSError) as error:
            self._failed(tracker, str(error) or type(error).__name__)
        except Exception as error:
            logger.exception("%s of job %s failed", tracker.kind, tracker.job_id)
            self._failed(tracker, f"internal error, {type(error).__name__}")
        finally:
            if sink is not None:
                sink.kill()
            self._sessions.discard(threading.current_thread())

    def _sign_of_life(self, tracker: JobTracker) -> Callable[[], None]:
        """To be called while a tracker is waited for: whether to go on waiting."""
        renewed = time.monotonic()

        def live() -> None:
            nonlocal renewed
            if self._stop.is_set():
                raise _StoppedError
            if time.monotonic() - renewed > self._lease_s / 4:
                renewed = time.monotonic()
                if not self._trackers.renew(tracker, self._lease_s):
                    raise _ClaimLostError

        return live

    def _follow(self, tracker: JobTracker, sink: Sink, live: Callable[[], None]) -> None:
        """Write what comes until the job has ended, or stops for now."""
        position = self._trackers.rewind(tracker) if sink.rewinds else tracker.position
        has_run = tracker.position > 0
        while True:
            version = self._store.data_version()
            job = self._store.get_job(tracker.job_id)  # before its events: then none is missed
            points, position, all_read = self._read(tracker.job_id, position)
            if points:
                sink.write(points)
                has_run = True
                if not self._trackers.advance(tracker, position, self._lease_s):
                    raise _ClaimLostError
                self._tell_address(tracker, sink)
            if not all_read:
                continue
            if job.status.finished:
                if has_run:
                    sink.finish(job.status.value, job.fine_tuned_model)
                self._trackers.complete(tracker)
                return
            if job.status.value != "running":
                sink.suspend()
                self._trackers.release(tracker)
                return
            while self._store.data_version() == version:
                self._wait(live, sink)

    def _wait(self, live: Callable[[], None], sink: Sink) -> None:
        self._stop.wait(self._poll_s)
        if self._stop.is_set():
            sink.suspend()
        live()

    def _read(self, job_id: str, position: int) -> tuple[list[MetricPoint], int, bool]:
        """What comes after an event, the position after it, and whether that was all for now."""
        limit = 1000
        events, position, _ = self._store.events_since(job_id, position, limit)
        points = [
            metric_point(event.data, event.created_at)
            for event in events
            if event.type == "metrics" and event.data and "step" in event.data
        ]
        return points, position, len(events) < limit

    def _tell_address(self, tracker: JobTracker, sink: Sink) -> None:
        address, sink.address = sink.address, None
        if address is not None:
            message = f"{TITLES[tracker.kind]} run: {address}"
            key = f"tracker-{tracker.kind}-run"
            self._store.add_event(tracker.job_id, "info", message, key=key)

    def _failed(self, tracker: JobTracker, reason: str) -> None:
        """Told on the job once, however often it happens."""
        reason = redact(reason, os.environ)
        last = tracker.attempt > len(self._retry_delays_s)
        delay = None if last else self._retry_delays_s[tracker.attempt - 1]
        title = TITLES[tracker.kind]
        warning = NewEvent(
            f"{title} has a problem: {reason}. Training goes on, and the metrics are kept; they "
            "are sent when it works again",
            "warn",
            key=f"tracker-{tracker.kind}-failed",
        )
        then = "it is given up" if delay is None else f"trying again in {delay} s"
        logger.warning("%s of job %s: %s; %s", title, tracker.job_id, reason, then)
        try:
            self._trackers.fail(tracker, reason, delay, warning)
        except Exception:  # the lease ends, then it is tried again
            logger.exception("trackers: the failure could not be recorded")
