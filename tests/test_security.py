"""The cluster key: made once, loaded by its owner only, never shown."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from zmqtasks.config import Config, load_config
from zmqtasks.errors import ConfigError, SecurityError
from zmqtasks.nodes.links import link_settings, link_settings_at
from zmqtasks.security import ClusterKey, Security, create_key, default_key_path, load_key, new_key, wait_for_key
from zmqtasks.transports import PLAIN, Encryption, get_transport

WAY_OUT = r"--key-file.*ZMQTASKS_KEY_FILE"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def test_created_key_is_loaded_again_and_protected(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "cluster.key"
    key = create_key(path)
    assert create_key(path) == key == load_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster.key"]


def test_many_creators_at_once_get_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    keys: list[ClusterKey] = []
    barrier = threading.Barrier(16)

    def create() -> None:
        barrier.wait()
        keys.append(create_key(path))

    threads = [threading.Thread(target=create) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 16
    assert set(keys) == {load_key(path)}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_open_to_others_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cluster.key"
    create_key(path)
    path.chmod(mode)
    for attempt in (load_key, create_key):
        with pytest.raises(SecurityError, match=f"mode 0{mode:o}.*chmod 600 {path}$"):
            attempt(path)


def test_the_command_that_helps_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "it's mine"
    create_key(path)
    path.chmod(0o644)
    with pytest.raises(SecurityError) as caught:
        load_key(path)
    subprocess.run(str(caught.value).partition("run ")[2], shell=True, check=True)
    load_key(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"00" * 32, b"zz" * 32, b"\xff" * 64, b"ab" * 33])
def test_file_without_a_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.key"
    path.write_bytes(content)
    path.chmod(0o600)
    for attempt in (load_key, create_key):
        with pytest.raises(SecurityError, match="holds no cluster key"):
            attempt(path)
    assert path.read_bytes() == content


def test_missing_key_and_folder_in_place_of_a_key(tmp_path: Path) -> None:
    with pytest.raises(SecurityError, match=r"no cluster key at .*cluster\.key: a scheduler makes one"):
        load_key(tmp_path / "cluster.key")
    with pytest.raises(SecurityError, match=f"not a regular file.*{WAY_OUT}"):
        load_key(tmp_path)
    with pytest.raises(SecurityError, match=f"cannot be written.*{WAY_OUT}"):
        create_key("/proc/nowhere/cluster.key")


def test_every_use_of_a_file_that_cannot_be_opened_names_it_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    for attempt in (load_key, create_key, new_key, lambda path: wait_for_key(path, 20)):
        with pytest.raises(SecurityError, match=f"{path} cannot be (read|written): File name too long.*{WAY_OUT}"):
            attempt(path)


@needs_root
def test_every_use_of_a_file_in_a_folder_of_another_user_names_it_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    create_key(path)
    tmp_path.chmod(0o700)
    program = (
        "import os, sys; from zmqtasks.errors import SecurityError; from zmqtasks.security import *\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for attempt in (load_key, create_key, new_key, lambda path: wait_for_key(path, 20)):\n"
        "    try: attempt(sys.argv[1])\n"
        "    except SecurityError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = f"the cluster key {path} cannot be read: Permission denied; use another file"
    told = [line.partition(" (--key-file of nodes, or ZMQTASKS_KEY_FILE)")[0] for line in done.stdout.splitlines()]
    assert told == [read, read, read.replace("read:", "written:"), read]


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.symlink_to("moved.key")
    for attempt in (load_key, create_key, new_key, lambda path: wait_for_key(path, 0.01)):
        with pytest.raises(SecurityError, match=f"{path} is a link to {tmp_path}/moved.key, where no file is"):
            attempt(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.key"]


def test_what_a_link_names_is_waited_for(tmp_path: Path) -> None:
    path, target = tmp_path / "cluster.key", tmp_path / "moved.key"
    path.symlink_to(target)
    made: list[ClusterKey] = []
    maker = threading.Timer(0.05, lambda: made.append(create_key(target)))
    maker.start()
    key = wait_for_key(path, 10)
    maker.join()
    assert made == [key]


def test_waiting_for_a_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    with pytest.raises(SecurityError, match=r"appeared at .* within 0\.01 s"):
        wait_for_key(path, 0.01)
    made: list[ClusterKey] = []
    maker = threading.Timer(0.05, lambda: made.append(create_key(path)))
    maker.start()
    key = wait_for_key(path, 10)
    maker.join()
    assert made == [key]


def test_secret_does_not_leak(tmp_path: Path) -> None:
    key = ClusterKey.generate()
    security = Security(key)
    for text in (repr(key), str(key), repr(security), repr(security.link_identity("tcp://x:1", True))):
        assert key.hex() not in text
        assert repr(key.link_key) not in text
        assert key.cluster_id.hex() in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    secret = "ab" * 31 + "xy"
    with pytest.raises(SecurityError) as caught:
        ClusterKey.from_hex(secret)
    assert secret not in str(caught.value)


def test_derived_values_differ_and_stay() -> None:
    """The vector is of `openssl kdf ... HKDF`: nodes of different releases must derive the same."""
    key = ClusterKey(bytes(range(32)))
    assert key.cluster_id.hex() == "de32de62895b0f1fe7836ea0fb832934"
    assert key.link_key[:16] != key.cluster_id
    assert key != ClusterKey.generate()
    assert ClusterKey.from_hex(key.hex()) == key


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZMQTASKS_KEY_FILE", str(tmp_path / "mine"))
    assert default_key_path() == tmp_path / "mine"
    with pytest.raises(SecurityError, match="no cluster key"):
        Security.default()
    made = Security.default(create=True)
    assert Security.default() == made
    monkeypatch.delenv("ZMQTASKS_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_key_path() == tmp_path / "zmqtasks" / "cluster.key"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_key_path() == Path.home() / ".config" / "zmqtasks" / "cluster.key"
    monkeypatch.setenv("ZMQTASKS_KEY_FILE", "~/mine")
    assert default_key_path() == Path.home() / "mine"


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMQTASKS_KEY_FILE", "~no-such-user/mine")
    with pytest.raises(SecurityError, match=f"~no-such-user/mine cannot be found.*{WAY_OUT}"):
        default_key_path()


@needs_root
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "XDG_CONFIG_HOME", "ZMQTASKS_KEY_FILE"):
        monkeypatch.delenv(variable, raising=False)
    os.setreuid(12345, -1)
    try:
        with pytest.raises(SecurityError, match=f"~/.config/zmqtasks/cluster.key cannot be found.*{WAY_OUT}"):
            default_key_path()
    finally:
        os.setreuid(0, -1)


def test_no_key_is_for_links_inside_one_process_only() -> None:
    none = Security.none()
    with pytest.raises(SecurityError, match=r"tcp://\S+ can be reached from other processes"):
        none.link_identity("tcp://127.0.0.1:1", True)
    inside = none.link_identity("inproc://a", False)
    assert inside == Security(ClusterKey.generate()).link_identity("inproc://a", False)


@needs_root
def test_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    create_key(path)
    os.chown(path, 12345, 12345)
    with pytest.raises(SecurityError, match="belongs to user 12345"):
        load_key(path)


def test_new_key_never_overwrites(tmp_path):
    path = tmp_path / "cluster.key"
    key = new_key(path)
    assert load_key(path) == key
    with pytest.raises(SecurityError, match="exists, and nodes may use the key in it"):
        new_key(path)
    assert load_key(path) == key
    with pytest.raises(SecurityError, match=f"is not a regular file.*{WAY_OUT}"):
        new_key(tmp_path)


def test_who_encrypts():
    key = ClusterKey.generate()
    secret = key.encryption_secret
    assert len({secret, key.link_key, bytes.fromhex(key.hex())}) == 3
    for mode, expected in (
        ("auto", Encryption(secret, same_host=False)),
        ("on", Encryption(secret, same_host=True)),
        ("off", PLAIN),
    ):
        assert Security(key, mode).link_encryption("off") == expected
        assert Security(key).link_encryption(mode) == expected
        assert Security.none().link_encryption(mode) == PLAIN
    for wrong in ("ON", "yes", ""):
        with pytest.raises(ConfigError, match="auto, on, off"):
            Security(key, wrong)
        with pytest.raises(ConfigError, match="auto, on, off"):
            Security(key).link_encryption(wrong)
        with pytest.raises(ConfigError, match=r"ZMQTASKS_ENCRYPTION=.* is none of auto, on, off"):
            load_config({"ZMQTASKS_ENCRYPTION": wrong})
    assert load_config({"ZMQTASKS_ENCRYPTION": "off"}).encryption == "off"
    assert repr(secret)[2:-1] not in repr(Security(key).link_encryption("auto"))


def test_links_of_nodes_are_encrypted_as_their_security_says():
    key = ClusterKey.generate()
    assert link_settings(Config(), Security(key)).encryption == Encryption(key.encryption_secret)
    assert link_settings(Config(encryption="off"), Security(key)).encryption == PLAIN
    assert link_settings(Config(encryption="off"), Security(key, "on")).encryption.same_host


def test_what_leaves_the_host_and_cannot_be_encrypted_is_refused_until_that_is_asked_for():
    class Postcard:
        """Stands for transports of others, and those whose library cannot encrypt."""

        scheme = "postcard"
        capabilities = replace(get_transport("tcp").capabilities, encrypts=False)

    key = ClusterKey.generate()
    for address, mode, refused in (
        ("postcard://192.0.2.1:1", "auto", True),
        ("postcard://0.0.0.0:0", "auto", True),
        ("postcard://127.0.0.1:1", "auto", True),
        ("postcard://[::1]:1", "auto", True),
        ("postcard://127.0.0.1:1", "on", True),
        ("postcard://192.0.2.1:1", "off", False),
        ("postcard://127.0.0.1:1", "off", False),
    ):
        if refused:
            with pytest.raises(SecurityError, match=r"postcard does not encrypt.*--encryption off"):
                link_settings_at(address, Postcard(), Config(), Security(key, mode))
        else:
            link_settings_at(address, Postcard(), Config(), Security(key, mode))
    assert link_settings_at("tcp://192.0.2.1:1", get_transport("tcp"), Config(), Security(key)).encryption.secret
    assert link_settings_at("unix://x", get_transport("unix"), Config(), Security(key, "on")).encryption.secret
