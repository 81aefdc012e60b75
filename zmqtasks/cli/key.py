"""`zmqtasks key`."""

from __future__ import annotations

import hashlib
import shlex
import stat

import click

from zmqtasks.cli.options import key_path
from zmqtasks.security import ClusterKey, load_key, new_key

_PATH = click.argument("path", required=False, type=click.Path(dir_okay=False))


@click.group()
def key() -> None:
    """Make a cluster key, or tell of one. Who holds the key can run code on the cluster."""


@key.command()
@_PATH
def new(path: str | None) -> int:
    """Make a new key in PATH (default: $ZMQTASKS_KEY_FILE, else ~/.config/zmqtasks/cluster.key).

    A file that exists is never overwritten.
    """
    file = key_path(path)
    made = new_key(file)
    option = f" --key-file {shlex.quote(str(file))}" if path else ""
    click.echo(f"made the key of cluster {made.cluster_id.hex()} in {file} (mode 0600)")
    click.echo(
        "Who holds it can run code on the cluster. To hand it to another host, over ssh and never by its arguments:"
    )
    there = file.absolute()
    receive = f"umask 077; mkdir -p {shlex.quote(str(there.parent))}; cat > {shlex.quote(str(there))}"
    click.echo(f"  ssh HOST {shlex.quote(receive)} < {shlex.quote(str(file))}")
    click.echo(
        f"Then: zmqtasks scheduler --host 0.0.0.0{option}, and on the others: zmqtasks worker tcp://HOST:8786{option}"
    )
    return 0


@key.command()
@_PATH
@click.option("--secret", is_flag=True, help="The key itself, and nothing else: for a pipe, not for a screen.")
def show(path: str | None, secret: bool) -> int:
    """Tell of the key in PATH what is no secret: its cluster, and what its nodes present to each other."""
    file = key_path(path)
    found = load_key(file)
    if secret:
        click.echo(found.hex())
        return 0
    mode = stat.S_IMODE(file.stat().st_mode)
    rows = {"file": f"{file} (mode {mode:04o})", "cluster": found.cluster_id.hex(), **_public_keys(found)}
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        click.echo(f"{name + ':':<{width}}{value}")
    return 0


def _public_keys(found: ClusterKey) -> dict[str, str]:
    """What links at other hosts show to everybody: the same on all nodes with this key, and on no others."""
    from zmqtasks.transports.tls_identity import certificate_of
    from zmqtasks.transports.zeromq.curve import curve_keys

    certificate = certificate_of(found.encryption_secret)
    curve = curve_keys(found.encryption_secret)
    return {
        "TLS certificate": f"SHA-256 {hashlib.sha256(certificate).hexdigest()}",
        "CURVE listener": curve.listener_public.decode(),
        "CURVE caller": curve.caller_public.decode(),
    }
