"""The registry, third parties' types, functions and size estimates."""

from __future__ import annotations

import array
import pickle
import subprocess
import sys
import time
from collections import deque

import numpy as np
import pytest

from zmqtasks.errors import ConfigError, DeserializationError, SerializationError
from zmqtasks.protocol import families
from zmqtasks.protocol.payload import Payload, make_header
from zmqtasks.protocol.serialize import (
    deserialize,
    deserialize_inline,
    dumps_function,
    loads_function,
    register_serialization,
    register_serialization_family,
    serialize,
    serialize_inline,
    sizeof,
)


@pytest.fixture(autouse=True)
def own_registry():
    """Each test leaves the registry of the process as it found it."""
    tables = (families._families, families._types, families._bases, families._pending, families.user_types)
    before = [table.copy() for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


class Image:
    """A third party's type that pickle is not to see."""

    def __init__(self, size, pixels):
        self.size = size
        self.pixels = pixels

    def __reduce__(self):
        raise AssertionError("pickled")


class Thumbnail(Image):
    pass


def write_image(image):
    return {"size": image.size}, [image.pixels]


def read_image(metadata, frames):
    return Image(metadata["size"], frames[0])


class ReversedFamily:
    """Writes texts backwards, and leaves long ones to pickle."""

    def serialize(self, obj):
        return None if len(obj.text) > 10 else (b"", [obj.text[::-1].encode()])

    def deserialize(self, metadata, frames):
        return Text(bytes(frames[0]).decode()[::-1])


class Text:
    def __init__(self, text):
        self.text = text


def test_a_type_with_two_functions():
    register_serialization(Image, serializer=write_image, deserializer=read_image)
    pixels = bytearray(5000)
    payload = serialize(Image((3, 4), pixels))
    assert payload.family == f"{__name__}:Image"
    assert payload.frames[0] is pixels
    new = deserialize(payload)
    assert type(new) is Image
    assert new.size == (3, 4)  # metadata is faithful: a tuple stays one
    assert deserialize_inline(serialize_inline(Image((1, 2), b"abc"))).pixels == b"abc"


@pytest.mark.parametrize("extra", [1, lambda: 1], ids=["plain", "cloudpickle"])
def test_a_registered_type_inside_a_pickle_goes_by_its_family(extra):
    register_serialization(Image, serializer=write_image, deserializer=read_image, name="image")
    pixels = bytearray(5000)
    payload = serialize(([Image((3, 4), pixels)], extra))
    assert payload.family == "pickle"
    assert payload.frames[1].obj is pixels
    (new,), _ = deserialize(payload)
    assert new.size == (3, 4)
    assert np.shares_memory(np.frombuffer(new.pixels, "u1"), np.frombuffer(pixels, "u1"))
    (new,), _ = deserialize_inline(serialize_inline(([Image((3, 4), b"abc")], extra)))
    assert bytes(new.pixels) == b"abc"


def test_subclasses_only_when_asked_for():
    register_serialization(Image, serializer=write_image, deserializer=read_image)
    with pytest.raises(SerializationError, match="Thumbnail"):
        serialize(Thumbnail(1, b""))
    register_serialization(Image, serializer=write_image, deserializer=read_image, subclasses=True)
    assert serialize(Thumbnail(1, b"")).family == f"{__name__}:Image"
    register_serialization(Thumbnail, serializer=write_image, deserializer=read_image, name="thumbnail")
    assert serialize(Thumbnail(1, b"")).family == "thumbnail"


def test_a_family_may_leave_an_object_to_pickle():
    register_serialization_family("reversed", ReversedFamily())
    register_serialization(Text, family="reversed")
    for text in ("short", "longer than ten"):
        payload = serialize(Text(text))
        assert payload.family == ("reversed" if text == "short" else "pickle")
        assert deserialize(payload).text == text
        assert deserialize_inline(serialize_inline([Text(text)]))[0].text == text
    with pytest.raises(SerializationError, match="'reversed' cannot write"):
        serialize(Text("longer than ten"), family="reversed")


def test_registration_by_path_imports_nothing(tmp_path, monkeypatch):
    package = tmp_path / "lazy_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from lazy_pkg.inner import Thing\n")
    (package / "inner.py").write_text("class Thing:\n    def __init__(self, n): self.n = n\n")
    (package / "family.py").write_text(
        "from lazy_pkg import Thing\n"
        "def serialize(thing): return bytes([thing.n]), ()\n"
        "def deserialize(metadata, frames): return Thing(metadata[0])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    register_serialization_family("thing", "lazy_pkg.family")
    register_serialization("lazy_pkg:Thing", family="thing")
    serialize(Text("x"))
    assert not [name for name in sys.modules if name.startswith("lazy_pkg")]
    import lazy_pkg

    payload = serialize(lazy_pkg.Thing(7))  # its __module__ is lazy_pkg.inner: the registered path leads to it
    assert payload.family == "thing"
    assert deserialize(payload).n == 7
    for name in [name for name in sys.modules if name.startswith("lazy_pkg")]:
        monkeypatch.delitem(sys.modules, name)


def test_an_installed_package_announces_its_family(tmp_path, monkeypatch):
    (tmp_path / "announced.py").write_text("def deserialize(metadata, frames): return metadata\n")
    info = tmp_path / "announced-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[zmqtasks.families]\nannounced-family = announced\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert deserialize(Payload(make_header("announced-family", b"meta"), ())) == b"meta"
    monkeypatch.delitem(sys.modules, "announced")


def test_an_unknown_family_says_what_to_do():
    with pytest.raises(
        DeserializationError, match=r"'cupy_like:Array', which is not registered here: import cupy_like"
    ):
        deserialize(Payload(make_header("cupy_like:Array"), (b"x",)))
    register_serialization_family("broken", "no_such_module_here")
    with pytest.raises(DeserializationError, match=r"'broken', which cannot be loaded here.*no_such_module_here"):
        deserialize(Payload(make_header("broken"), ()))
    with pytest.raises(SerializationError, match="no serialization family 'nothing'"):
        serialize(1, family="nothing")


def test_errors_of_a_family_are_translated():
    def fail(*_):
        raise KeyError("inside")

    register_serialization(Text, serializer=fail, deserializer=fail, name="failing")
    with pytest.raises(SerializationError, match="'failing' cannot write an object of type Text: KeyError"):
        serialize(Text("a"))
    with pytest.raises(DeserializationError, match="'failing' cannot be read: "):
        deserialize(Payload(make_header("failing", b"\xc0"), ()))
    with pytest.raises(DeserializationError, match="malformed"):
        deserialize(Payload(b"nonsense", ()))


class Grid:
    """A third party's type whose family gives frames of whatever kind it has."""

    def __init__(self, frame):
        self.frame = frame


def write_grid(grid):
    return None, [grid.frame]


def read_grid(metadata, frames):
    return Grid(bytes(frames[0]))


RECORDS = np.array([(1, 2.5)] * 500, dtype=[("a", ">i4"), ("b", "f8")])


@pytest.mark.parametrize(
    "frame",
    [
        np.arange(1000.0),
        np.arange(1000.0).reshape(10, 100).data,
        array.array("d", [1.5] * 500),
        RECORDS,
        np.empty((0, 3)).data,
        np.array(3.0),
        pickle.PickleBuffer(b"x" * 2000),
    ],
    ids=["array", "2-D view", "array.array", "records", "no elements", "0-D", "PickleBuffer"],
)
def test_frames_of_a_family_become_flat_bytes(frame):
    register_serialization(Grid, serializer=write_grid, deserializer=read_grid, name="grid")
    content = bytes(pickle.PickleBuffer(frame).raw())
    payload = serialize(Grid(frame))
    assert [len(part) for part in payload.frames] == [len(content)]
    assert payload.nbytes == len(payload.header) + len(content)
    assert deserialize_inline(serialize_inline(Grid(frame))).frame == content
    for number in (1, lambda: 1):  # by pickle and by cloudpickle
        assert deserialize(serialize([Grid(frame), number]))[0].frame == content


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (np.asfortranarray(np.zeros((30, 30))), "frame of type ndarray is not C-contiguous"),
        (np.zeros(1000)[::2].data, "frame of type memoryview is not C-contiguous"),
        ("text", "'str'"),
        (None, "'NoneType'"),
        (np.zeros(3, "M8[s]"), "buffer"),
    ],
    ids=["Fortran", "strided", "text", "None", "datetime"],
)
def test_a_frame_that_is_no_flat_bytes_is_refused(frame, says):
    register_serialization(Grid, serializer=write_grid, deserializer=read_grid, name="grid")
    for obj in (Grid(frame), [Grid(frame)]):
        with pytest.raises(SerializationError, match=f"'grid' cannot write an object of type Grid: .*{says}"):
            serialize(obj)


@pytest.mark.parametrize(
    "register",
    [
        lambda: register_serialization(Text),
        lambda: register_serialization(Text, serializer=write_image),
        lambda: register_serialization(Text, family="pickle", serializer=write_image, deserializer=read_image),
        lambda: register_serialization(Text, family="unheard of"),
        lambda: register_serialization("no colon", family="pickle"),
        lambda: register_serialization_family("numpy", ReversedFamily()),
        lambda: register_serialization_family("", ReversedFamily()),
    ],
)
def test_wrong_registrations_are_refused(register):
    with pytest.raises(ConfigError):
        register()


def test_functions_round_trip():
    n = 3
    for function, argument, result in (
        (len, "ab", 2),
        (lambda x: x + n, 1, 4),
        (str.upper, "a", "A"),
        ("b".join, "xy", "xby"),
    ):
        assert loads_function(dumps_function(function))(argument) == result
    with pytest.raises(DeserializationError, match="AttributeError"):
        loads_function(dumps_function(test_functions_round_trip).replace(b"test_functions", b"gone_functions"))


def test_importing_the_protocol_is_cheap():
    heavy = ["cloudpickle", "numpy", "msgpack", "asyncio", "importlib.metadata"]
    code = f"import sys, zmqtasks.protocol.serialize; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "[]"


class Liar:
    def __sizeof__(self):
        raise RuntimeError

    @property
    def nbytes(self):
        raise RuntimeError


class NegativeSize:
    def __sizeof__(self):
        return -5


class Box:
    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize(
    ("obj", "low", "high"),
    [
        (1, 20, 40),
        (b"x" * 1000, 1000, 1100),
        (memoryview(bytearray(5000)), 5000, 5300),
        (np.zeros(1000), 8000, 8200),
        (np.zeros((10, 1000))[:, ::2], 40_000, 40_200),
        (np.broadcast_to(np.zeros(10), (10**6, 10)), 80, 300),
        ([b"x" * 1000] * 50, 50_000, 60_000),
        (deque([b"x" * 1000] * 50), 50_000, 60_000),
        (dict.fromkeys(range(50), b"x" * 1000), 50_000, 60_000),
        ([[np.zeros(1000)] * 10] * 10, 800_000, 900_000),
        (Box(np.zeros(1000)), 8000, 8700),
        (Liar(), 1, 1000),
        (NegativeSize(), 0, 1000),
        (object, 100, 10_000),
        (iter([]), 10, 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sizeof_is_about_right(obj, low, high):
    assert low <= sizeof(obj) <= high


def test_sizeof_is_quick_for_large_wide_and_cyclic_objects():
    wide = 0
    for _ in range(30):
        wide = [wide] * 100
    cyclic = [1]
    cyclic.append(cyclic)
    large = list(range(10**6))
    objects = (wide, cyclic, large, {"a": large}, set(large))
    start = time.thread_time()
    for obj in objects:
        assert sizeof(obj) > 0
    assert time.thread_time() - start < 0.5
    assert sizeof(large) > 10**7
