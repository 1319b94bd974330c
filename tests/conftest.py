"""Order of the suite: fast tests first, then those that start an engine; what they see of logs."""

import logging
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "engine" in item.path.parts)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Pytest's own that sees all of our loggers, whatever ran before. They lie below vLLM's, whose
    set-up keeps records from the root's handlers; and to build its application raises the root's
    level."""
    logger = logging.getLogger("vllm")
    propagate, level = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.DEBUG)
    yield caplog
    logger.propagate = propagate
    logger.setLevel(level)
