"""What messages are made of."""

import pytest

from deebert.errors import first_line, is_number, is_whole


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("\n a\nb"), "a"),
        (TimeoutError(), "TimeoutError"),
        (OSError("  \n"), "OSError"),
    ],
)
def test_an_error_has_one_line(error: Exception, message: str) -> None:
    assert first_line(error) == message


def test_a_truth_value_is_no_number() -> None:
    assert [is_number(value) for value in (1, 0.5, True, "1", None)] == [True, True, *[False] * 3]
    assert [is_whole(value) for value in (1, 0.5, True, "1", None)] == [True, *[False] * 4]
