"""The systems under test, made of at most one stock server, one of ours and one PEFT process."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.coserve.client import LoadOrder, LoadRecord, read_record
from benchmarks.coserve.loads import streams
from benchmarks.coserve.processes import ProcessGroup
from benchmarks.coserve.servers import Server, clean_environment
from benchmarks.coserve.training import POLL_SECONDS, JobTraining, PeftTraining, Training

# What shares the machine with requests, in the order in which each load is run; and who trains
# without requests.
SERVING = ("stock", "spatial", "temporal", "coserve")
IDLE = ("peft", "alone")
SYSTEMS = (*SERVING, *IDLE)
# Seconds of load that a server gets before it is measured for the first time.
WARM_UP = 8.0


@dataclass(frozen=True)
class System:
    """A server, a trainer, or both.

    Attributes:
        server: that answers; None for training alone.
        training: beside it; None for inference alone.
        gives_way: the trainer is stopped while a request is in flight.
    """

    server: Server | None
    training: Training | None
    gives_way: bool = False


class Systems:
    """Starts what a system needs when it is first asked for, and keeps it asleep in between.

    Args:
        model: folder of the model.
        data: training file.
        folder: for logs, the job store and what passes between processes.
        ours_flags: more flags of our server.
        seed: of the loads.
    """

    def __init__(
        self, model: str, data: Path, folder: Path, ours_flags: tuple[str, ...], seed: int
    ) -> None:
        self._model = model
        self._data = data
        self._folder = folder
        self._ours_flags = ours_flags
        self._seed = seed
        self._stock: Server | None = None
        self._ours: tuple[str, Server, JobTraining] | None = None
        self._peft: PeftTraining | None = None
        self.starts: list[str] = []

    def get(self, name: str, tpot_slo_ms: float | None = None) -> System:
        """The system of that name.

        Args:
            name: one of :data:`SYSTEMS`.
            tpot_slo_ms: of our server, which is started anew if it has another; None: auto.
        """
        if name in ("coserve", "alone"):
            return System(*self._our_server(tpot_slo_ms))
        server = self._stock_server() if name != "peft" else None
        training = self._peft_process() if name != "stock" else None
        return System(server, training, gives_way=name == "temporal")

    def run(
        self, system: System, load: str, warm_up: float, seconds: float, capacity: float | None
    ) -> LoadRecord:
        """Has the client put a load on a system that is awake and training."""
        path = {name: self._folder / f"client-{name}.json" for name in ("order", "record")}
        training = system.training and system.training.group
        order = LoadOrder(
            url=system.server.url if system.server else None,
            streams=streams(load, warm_up + seconds, capacity, self._seed),
            warm_up=warm_up,
            seconds=seconds,
            seed=self._seed,
            training=training.id if training else None,
            gives_way=system.gives_way,
        )
        path["order"].write_text(json.dumps(asdict(order)))
        command = [sys.executable, "-m", "benchmarks.coserve.client", *map(str, path.values())]
        log = self._folder / "client.log"
        client = ProcessGroup(command, log, clean_environment())
        while not client.wait(POLL_SECONDS):
            if system.training:
                system.training.poll()
        if client.status != 0:
            raise RuntimeError(f"the load client failed:\n{log.read_text()[-3000:]}")
        client.end()
        return read_record(path["record"].read_text())

    def end(self) -> None:
        """Ends the servers and the trainer."""
        for server in (self._stock, self._ours and self._ours[1]):
            if server:
                server.end()
        if self._peft:
            self._peft.close()

    def _stock_server(self) -> Server:
        if self._stock is None:
            self._stock = Server(self._model, self._folder / "stock.log")
            self._warm(System(self._stock, None))
            self._note("stock", self._stock)
        return self._stock

    def _our_server(self, tpot_slo_ms: float | None) -> tuple[Server, JobTraining]:
        target = "auto" if tpot_slo_ms is None else f"{tpot_slo_ms:.2f}"
        if self._ours and self._ours[0] != target:
            self._ours[1].end()
            self._ours = None
        if self._ours is None:
            # Always the same folder: it is part of the key of vLLM's compilation cache.
            flags = ("--enable-finetuning", "--finetuning-dir", str(self._folder / "store"))
            slo = ("--finetuning-tpot-slo-ms", target)
            log = self._folder / "ours.log"
            server = Server(self._model, log, *flags, *slo, *self._ours_flags)
            training = JobTraining(server, self._model, self._data)
            self._warm(System(server, training))
            self._note(f"ours, target {target}", server)
            self._ours = target, server, training
        return self._ours[1:]

    def _peft_process(self) -> PeftTraining:
        if self._peft is None:
            began = time.monotonic()
            self._peft = PeftTraining(self._model, self._data, self._folder)
            print(f"# peft: started in {time.monotonic() - began:.0f} s", flush=True)
        return self._peft

    def _warm(self, system: System) -> None:
        """Some load, so that what is compiled or learnt at first use is behind it."""
        with awake(system):
            self.run(system, "busy-4", 0.0, WARM_UP, None)

    def _note(self, name: str, server: Server) -> None:
        note = f"{name}: started in {server.started_in:.0f} s, idle {server.idle_cpu:.0%} of a core"
        self.starts.append(note)
        print(f"# {note}", flush=True)


@contextlib.contextmanager
def awake(system: System) -> Iterator[None]:
    """Within this block a system serves and trains; an exception ends the run anyway."""
    if system.server:
        system.server.resume()
    if system.training:
        system.training.begin()
    yield
    if system.training:
        system.training.end()
    if system.server:
        system.server.pause()
