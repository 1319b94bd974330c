"""The process in which a tracker's own client runs: ``python -m ...program wandb``.

A line of JSON on standard input is a request, ``[method, arguments]``; a line on standard output
answers it. So the client's threads, handlers, and hours of waiting for a network are not the
server's. The process ends with its standard input.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any, TextIO

from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.redact import redact
from flexllm_vllm.trackers.run import RunDescription, TrackerRun


def open_run(kind: str, description: RunDescription) -> TrackerRun:
    """Begin a run, or go on with the one that the job has; it takes the client's import."""
    if kind == "wandb":
        from flexllm_vllm.trackers.wandb_run import WandbRun

        return WandbRun(description)
    from flexllm_vllm.trackers.mlflow_run import MlflowRun

    return MlflowRun(description)


def open_request(description: RunDescription) -> list[Any]:
    """The first request of a process."""
    return ["open", asdict(description)]


def write_request(points: list[MetricPoint]) -> list[Any]:
    """More points."""
    return ["write", [asdict(point) for point in points]]


def _serve(kind: str, answers: TextIO) -> None:
    run: TrackerRun | None = None
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if method == "open":
                run = open_run(kind, RunDescription(**arguments[0]))
                answer["address"] = run.address and redact(run.address, os.environ)
            else:
                assert run is not None
                if method == "write":
                    run.write([MetricPoint(**point) for point in arguments[0]])
                else:
                    getattr(run, method)(*arguments)
        except Exception as error:
            reason = str(error) or type(error).__name__
            answer["error"] = redact(f"{type(error).__name__}: {reason}", os.environ)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Serve until standard input ends."""
    os.nice(19)
    # What the client prints shall not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.argv[1], answers)
    os._exit(0)  # clients wait for their network when the interpreter ends


if __name__ == "__main__":
    main()
