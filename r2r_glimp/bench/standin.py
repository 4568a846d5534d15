"""A server that takes a given time to write a token and computes nothing, over real HTTP; in a
process of its own. Standard library only.

    python -m r2r_glimp.bench.standin MILLISECONDS     prints its port
"""

import asyncio
import json
import sys

TOKEN = 5


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, step_s: float) -> None:
    """Answer the requests of one connection."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length))
            count = body["max_tokens"]
            await asyncio.sleep(step_s * count)
            choice = {"text": "", "token_ids": [TOKEN] * count, "finish_reason": "length"}
            reply = json.dumps({"choices": [choice]}).encode()
            kind = b"Content-Type: application/json\r\n"
            writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n" % (kind, len(reply)))
            writer.write(reply)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main(step_ms: float) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(
        lambda reader, writer: _serve(reader, writer, step_ms / 1e3), "127.0.0.1", 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
