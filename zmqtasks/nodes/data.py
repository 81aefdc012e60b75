"""Bulk data between nodes: values of keys, asked for and given over data links.

A data link carries requests one way and answers the other; many requests are under way at the same time. A value
travels as its payload's header (inside the op) and frames (uncopied, in the frames of the message). Long answers are
cut between values into messages of about `CUT_BYTES`, and the answers to several requests on one link take turns message
by message: a small request waits for single values before it, however large, but never for the whole of a request for
many. Data links are not resumed: when one breaks, all its requests
fail with `CommError`, and whoever asked tries another holder or again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

from zmqtasks.config import Config
from zmqtasks.errors import (
    CommClosedError,
    CommError,
    ConfigError,
    SerializationError,
    ZmqTasksError,
)
from zmqtasks.ids import InstanceId, Key, SessionId, format_key
from zmqtasks.nodes.data_asking import AskingLink, Fetched, LinkFacts, comm_error, retrieve
from zmqtasks.nodes.data_messages import CUT_FRAMES
from zmqtasks.nodes.data_packing import Packer
from zmqtasks.nodes.links import Dialed, dial
from zmqtasks.nodes.versions import own_versions
from zmqtasks.protocol.compression import Counters, own_codecs
from zmqtasks.protocol.frames import DATA_LIMITS
from zmqtasks.protocol.handshake import LinkRequest
from zmqtasks.protocol.ops import (
    DataIntroduction,
)
from zmqtasks.protocol.payload import Payload
from zmqtasks.security import Security
from zmqtasks.transports.buffer_pool import POOL

TRIM_S = 1.0


class DataPool:
    """Data links to any number of nodes: one per address, opened when needed.

    More than `config.data_links` are closed, the least recently used first; one that a call of `get` or `put` uses, or
    waits for, never is. The pool belongs to one event loop.
    """

    def __init__(self, *, security: Security, config: Config, instance_id: InstanceId, name: str) -> None:
        self._security = security
        self._config = config
        self._request = LinkRequest(
            DataIntroduction(name, own_codecs()), instance_id, SessionId(b""), versions=own_versions()
        )
        self.compression = Counters()
        """Of all its links so far."""
        self._links: OrderedDict[str, AskingLink] = OrderedDict()
        self._users: Counter[str] = Counter()
        """Calls of `get` and `put` under way, by address."""
        self._dials: dict[str, asyncio.Task[AskingLink]] = {}
        self._closings: set[asyncio.Task[None]] = set()
        self._closed = False
        self._received_before = 0
        self._trimming: asyncio.TimerHandle | None = None

    @property
    def received_bytes(self) -> int:
        """What has come in over all its links, those that are closed too."""
        return self._received_before + sum(link.received_bytes for link in self._links.values())

    @property
    def addresses(self) -> list[str]:
        """Addresses with an open link, the least recently used first."""
        return list(self._links)

    def about(self, address: str) -> LinkFacts:
        """How the open link to `address` travels; KeyError when there is none."""
        return self._links[address].facts

    async def get(self, address: str, keys: list[Key]) -> Fetched:
        """The values of `keys` from the node at `address`.

        Raises CommError when there is no link to it, or the link fails before anything is here; what has come until then
        is given with `Fetched.broken`. A link on which nothing passes for `grace_s` while something is asked for has
        failed; there is no other limit. A cancelled get leaves the link usable,
        and what was not on its way yet does not come.
        """
        if not keys:
            return Fetched({}, [], {})
        self._users[address] += 1
        try:
            link = await self._link(address)
            return await link.get(keys)
        finally:
            self._leave(address)
            if self._trimming is None and not self._closed:
                self._trim_memory()

    async def put(self, address: str, items: list[tuple[Key, Payload]]) -> None:
        """Gives values to the node at `address`; they are held there when this returns.

        Raises CommError as `get` does, and when the node could not take them: after that any of them may be held. Raises
        SerializationError, and sends nothing, when a value has more buffers than fit into a message.
        """
        if not items:
            return
        for key, payload in items:
            if len(payload.frames) > CUT_FRAMES:
                raise SerializationError(
                    f"{format_key(key)} has {len(payload.frames)} buffers, a message takes {CUT_FRAMES}"
                )
        self._users[address] += 1
        try:
            link = await self._link(address)
            await link.put(items)
        finally:
            self._leave(address)

    async def close(self) -> None:
        """Closes all links; requests under way fail with CommClosedError. Idempotent."""
        self._closed = True
        if self._trimming is not None:
            self._trimming.cancel()
            self._trimming = None
        for task in list(self._dials.values()):
            task.cancel()
        if self._dials:
            await asyncio.wait(list(self._dials.values()))
        for link in list(self._links.values()):
            self._close(link)
        if self._closings:
            await asyncio.wait(self._closings)

    def _trim_memory(self) -> None:
        """Sees to it that the memory of what was received goes back to the system some time after nobody needs it."""
        POOL.trim()
        self._trimming = asyncio.get_running_loop().call_later(TRIM_S, self._trim_memory) if POOL.used else None

    async def _link(self, address: str) -> AskingLink:
        if self._closed:
            raise CommClosedError("the data pool is closed")
        if link := self._links.get(address):
            self._links.move_to_end(address)
            return link
        task = self._dials.get(address)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._dial(address))
            self._dials[address] = task
            task.add_done_callback(retrieve)
        try:
            # Shielded: others may wait for the same link.
            link = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise CommClosedError("the data pool is closed") from None
            raise
        except ZmqTasksError as exc:
            if isinstance(exc, CommError):
                raise type(exc)(str(exc)) from exc  # each waiter gets an error of its own
            raise CommError(f"no data link: {exc}") from exc
        if link.ended is not None:  # no second try: who admits links and cannot serve them would take them for ever
            raise comm_error(address, link.ended)
        return link

    async def _dial(self, address: str) -> AskingLink:
        try:
            dialed = await dial(
                address, self._request, security=self._security, config=self._config, limits=DATA_LIMITS
            )
            packer = self._packer(dialed)
            link = AskingLink(address, dialed.comm, packer, self._config.grace_s, self._link_ended)
            self._links[address] = link
            link.start(dialed.arrived.ended)
            self._close_surplus()
            return link
        finally:
            del self._dials[address]

    def _packer(self, dialed: Dialed) -> Packer:
        try:
            return Packer(dialed.comm, self._config.compression, dialed.welcome.codecs, self.compression)
        except ConfigError:
            dialed.comm.abort("given up")
            raise

    def _link_ended(self, link: AskingLink) -> None:
        if self._links.get(link.address) is link:
            self._received_before += link.received_bytes
            del self._links[link.address]

    def _leave(self, address: str) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
        self._close_surplus()

    def _close_surplus(self) -> None:
        surplus = len(self._links) - max(self._config.data_links, 1)
        if surplus > 0:
            idle = [link for link in self._links.values() if link.address not in self._users]
            for link in idle[:surplus]:
                self._close(link)

    def _close(self, link: AskingLink) -> None:
        self._received_before += link.received_bytes
        del self._links[link.address]
        task = asyncio.get_running_loop().create_task(link.close())
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)
