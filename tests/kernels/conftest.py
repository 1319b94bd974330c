"""Every kernel test runs twice: on the compiled kernels and on the torch operations."""

import pytest

from flexllm_vllm.kernels import native


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.compiler() is None:
        pytest.skip("no C++ compiler")
    else:
        assert native.library() is not None
    return request.param
