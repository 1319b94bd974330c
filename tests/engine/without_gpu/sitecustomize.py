"""What lets parts of vLLM that are made for GPUs run on a CPU, in the processes of a test.

``FLEXLLM_TEST_INTERPRETER=1``: vLLM's Triton kernels, in which its model runner V2 prepares its
input, run in Triton's interpreter, on CPU tensors. vLLM's CPU build looks for Triton's CPU compiler
before it uses any of them: it finds this. Our own operations stay with their CPU kernels (they ask
for ``TRITON_INTERPRET``).

``FLEXLLM_TEST_KERNELS=1``: our Triton kernels run in the interpreter, in place of their CPU ones.

``FLEXLLM_TEST_STREAMS=1``: CUDA streams and events, of which asynchronous scheduling copies sampled
tokens, do nothing: everything has happened when a call returns.
"""

import contextlib
import os
from types import SimpleNamespace

if os.environ.get("FLEXLLM_TEST_INTERPRETER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions are defined when it is imported
    from triton import knobs
    from triton.backends import backends

    knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]

if os.environ.get("FLEXLLM_TEST_KERNELS") == "1":
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("FLEXLLM_TEST_STREAMS") == "1":
    import torch

    class _Nothing:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def record(self, *_: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def wait_stream(self, *_: object) -> None:
            pass

    torch.cuda.Stream = torch.cuda.Event = _Nothing  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: _Nothing()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
