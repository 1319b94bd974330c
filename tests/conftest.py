"""Order of the suite: fast tests first, then those that start an engine."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "engine" in item.path.parts)
