"""A TCP proxy that holds every byte back for a while: `python -m tests.delaying_proxy DELAY_S MARK`; prints its port.

Connections come by redirection in the kernel (`testing.netns.Host.redirect`), which knows where they were meant to go. It
ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys

SO_ORIGINAL_DST = 80
CHUNK_BYTES = 1 << 18


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1000)

    async def forward() -> None:
        while True:
            due, data = await held.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    forwarding = asyncio.create_task(forward())
    try:
        while data := await reader.read(CHUNK_BYTES):
            await held.put((loop.time() + delay_s, data))
    except ConnectionError:
        pass
    await held.put((loop.time(), b""))
    await asyncio.gather(forwarding, return_exceptions=True)


async def serve(delay_s: float, mark: int) -> None:
    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        destination = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", destination)
        onward = socket.socket()
        onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        onward.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(onward, (socket.inet_ntoa(packed), port))
        except OSError:
            onward.close()
            writer.close()
            return
        there_reader, there_writer = await asyncio.open_connection(sock=onward)
        await asyncio.gather(pump(reader, there_writer, delay_s), pump(there_reader, writer, delay_s))

    server = await asyncio.start_server(accepted, "0.0.0.0", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # connections are not worth a word


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]), int(sys.argv[2])))
