"""A man in the middle who only listens: a TCP proxy that keeps what passes, to look at and to send again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

Change = Callable[[bytes], bytes]


class RecordingProxy:
    """Passes bytes on to the listener; `sent` and `answered` have them, of all connections in order of arrival."""

    def __init__(self) -> None:
        self.port = 0
        self.sent = bytearray()
        self.answered = bytearray()
        self.change: Change | None = None
        """What happens to bytes on their way to the listener."""

    def passed(self) -> bytes:
        """Everything, both ways."""
        return bytes(self.sent + self.answered)


@contextlib.asynccontextmanager
async def recording_proxy(host: str, port: int) -> AsyncIterator[RecordingProxy]:
    """A proxy in front of `host:port`."""
    proxy = RecordingProxy()
    writers: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                record += data
                writer.write(proxy.change(data) if proxy.change and record is proxy.sent else data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, port)
        writers.extend((writer, there_writer))
        await asyncio.gather(pass_on(reader, there_writer, proxy.sent), pass_on(there_reader, writer, proxy.answered))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await server.wait_closed()
