"""Keys as users write and read them, and as they travel: a mapping that keeps different things different.

Users write strings, ints, floats, bools, bytes, None and tuples of these (dask does). On the wire a named key is a string and an
anonymous one an int. A string travels as it is, unless it could be taken for something else; everything else is written
with its type: `#i1`, `#f1.0`, `#b1`, `#t("x",#i0)`. Anonymous keys are shown as `name-CLIENT.COUNTER`, and understood as such.
"""

from __future__ import annotations

import json
import re
from typing import TypeAlias

from zmqtasks.errors import ConfigError
from zmqtasks.ids import CLIENT_NUMBER_LIMIT, COUNTER_BITS, Key, format_key

UserKey: TypeAlias = "str | int | float | bool | bytes | tuple[UserKey, ...] | None"

_MARK = "#"
_ANONYMOUS = re.compile(r"(?s).*-(0|[1-9][0-9]{0,7})\.(0|[1-9][0-9]{0,12})")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|#[^,)]*')


def to_wire(key: object) -> Key:
    """The key that stands for `key` on the wire; raises ConfigError for what cannot be a key."""
    if type(key) is str:
        anonymous = _ANONYMOUS.fullmatch(key)
        if anonymous is not None:
            number, counter = int(anonymous[1]), int(anonymous[2])
            if number < CLIENT_NUMBER_LIMIT and counter < 1 << COUNTER_BITS:
                return (number << COUNTER_BITS) | counter
        return "#s" + key if key.startswith(_MARK) else key
    return _marked(key)


def to_wire_name(name: object) -> str:
    """As `to_wire`, for names of anything but tasks and data: none of them is anonymous."""
    if type(name) is str:
        return "#s" + name if name.startswith(_MARK) else name
    return _marked(name)


def _marked(key: object) -> str:
    if isinstance(key, str):
        return "#s" + str.__str__(key)
    if isinstance(key, bool):
        return f"#b{int(key)}"
    if isinstance(key, int):
        return f"#i{int.__repr__(key)}"
    if isinstance(key, float):
        return f"#f{float.__repr__(key)}"
    if isinstance(key, bytes):
        return f"#x{key.hex()}"
    if key is None:
        return "#n"
    if isinstance(key, tuple):
        return "#t(" + "".join(_item(item) + "," for item in key) + ")"
    raise ConfigError(f"{key!r} cannot be a key: use a string, a number or a tuple of these")


def _item(item: object) -> str:
    return json.dumps(str.__str__(item)) if isinstance(item, str) else _marked(item)


def to_user(key: Key, name: str = "") -> UserKey:
    """What the user wrote, or the printed name of an anonymous key."""
    if isinstance(key, int):
        return format_key(key, name)
    if not key.startswith(_MARK):
        return key
    value, _ = _read(key, 0)
    return value


def _read(text: str, start: int) -> tuple[UserKey, int]:
    kind = text[start + 1 : start + 2]
    if kind == "s":
        return text[start + 2 :], len(text)
    if kind == "t":
        return _read_tuple(text, start + 3)
    token = _TOKEN.match(text, start)
    assert token is not None
    body = token[0][2:]
    value: UserKey = None
    if kind == "b":
        value = body == "1"
    elif kind == "i":
        value = int(body)
    elif kind == "f":
        value = float(body)
    elif kind == "x":
        value = bytes.fromhex(body)
    return value, token.end()


def _read_tuple(text: str, start: int) -> tuple[UserKey, int]:
    items: list[UserKey] = []
    while text[start] != ")":
        if text[start] == '"':
            token = _TOKEN.match(text, start)
            assert token is not None
            items.append(json.loads(token[0]))
            start = token.end()
        else:
            item, start = _read(text, start)
            items.append(item)
        start += 1  # the comma
    return tuple(items), start + 1
