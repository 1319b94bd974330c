"""The Triton kernels in Triton's interpreter, which must be chosen before Triton is imported: these
tests run in a process of their own (``tests/triton/test_interpreter.py`` starts it)."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
