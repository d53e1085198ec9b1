"""What is parsed of an answer. How its texts are counted is in test_meter.py."""

import pytest

from proxy.formats.texts import read_object


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b'{"a": NaN}', None),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b"[1]", None),
        (b"{", None),
        (b"[" * 100_000, None),
    ],
)
def test_an_object_that_a_client_can_parse_is_parsed(data, value):
    """Including what strict JSON forbids and Python's parser accepts."""
    found = read_object(data)
    if data == b'{"a": NaN}':
        assert found is not None
        assert found["a"] != found["a"]  # NaN is not equal to itself
    else:
        assert found == value
