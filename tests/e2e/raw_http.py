"""HTTP by hand, over a connection that is kept: for loads that no client library is to slow down."""

import asyncio
import json


def request(body: object, path: str = "/predict") -> bytes:
    sent = json.dumps(body).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), len(sent)) + sent


async def received(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    """Status, head in small letters, and body of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split(" ", 2)[1]), head, await reader.readexactly(length)
