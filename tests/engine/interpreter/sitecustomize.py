"""Lets vLLM's model runner V2, whose input preparation is in Triton, run without a GPU.

In a process with ``FLEXLLM_TEST_INTERPRETER=1`` vLLM's Triton kernels run in Triton's interpreter,
on CPU tensors. vLLM's CPU build looks for Triton's CPU compiler before it uses any of them: it
finds this. Our own operations stay with their CPU kernels (they ask for ``TRITON_INTERPRET``).
"""

import os

if os.environ.get("FLEXLLM_TEST_INTERPRETER") == "1":
    from types import SimpleNamespace

    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own functions are defined when it is imported
    from triton import knobs
    from triton.backends import backends

    knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]
