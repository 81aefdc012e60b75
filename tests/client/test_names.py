"""Keys of users and keys of the wire: each stands for exactly one of the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqtasks.errors import ConfigError
from zmqtasks.ids import first_key_of_client
from zmqtasks.nodes.client.names import to_user, to_wire

PLAIN = (
    st.text()
    | st.sampled_from(["#", "#i1", "#t()", "inc-1.2", "a-1.2\n", "a-01.2", "a-99999999.1", "#-0.0", '#t("x",)'])
    | st.integers()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.binary()
    | st.none()
)
KEYS = st.recursive(PLAIN, lambda items: st.lists(items, max_size=3).map(tuple), max_leaves=6)


def identical(a: object, b: object) -> bool:
    """Equal, and of the same types all the way down; 0.0 and -0.0 are different."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@given(KEYS)
def test_keys_come_back(key: object) -> None:
    wire = to_wire(key)
    if isinstance(wire, str):
        assert identical(to_user(wire), key)
    else:
        assert identical(to_wire(to_user(wire)), wire)


@given(KEYS, KEYS)
def test_different_keys_stay_apart(a: object, b: object) -> None:
    if not identical(a, b) and isinstance(to_wire(a), str):
        assert to_wire(a) != to_wire(b)


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**40 - 1), st.text(max_size=5))
def test_anonymous_keys_are_understood_as_they_are_shown(number: int, counter: int, name: str) -> None:
    key = first_key_of_client(number) + counter
    shown = to_user(key, name)
    assert to_wire(shown) == key


def test_one_is_three_keys() -> None:
    assert {to_wire(1), to_wire(1.0), to_wire(True), to_wire("1")} == {"#i1", "#f1.0", "#b1", "1"}


def test_what_cannot_be_a_key() -> None:
    with pytest.raises(ConfigError, match=r"\[1\] cannot be a key"):
        to_wire([1])
