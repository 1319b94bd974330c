import math

import pytest

from flexllm_vllm.commandline.sparkline import sparkline


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([math.nan, math.inf], 10, ""),
        ([2.0], 10, "▁"),
        ([1, 1, 1], 10, "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, math.nan, 0, 1e308], 10, "█▁"),
        ([9, 5, 1, -1], 2, "█▁"),
        ([0, 14, 7, 7, 7, 0, 0, 0, 0], 2, "█▁"),
    ],
)
def test_a_curve_lies_between_its_least_and_its_greatest(
    values: list[float], width: int, expected: str
) -> None:
    assert sparkline(values, width) == expected


def test_a_terminal_without_unicode_has_a_curve_too() -> None:
    assert sparkline([0, 7], 10, ascii_only=True) == "_@"
