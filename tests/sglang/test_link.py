"""The server's end of the socket."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import zmq

from megatron_rpp.rollout.server import Link
from megatron_rpp.rollout.settings import SOCKET_NAME


def test_a_request_that_arrives_while_the_server_writes_is_not_lost(tmp_path: Path) -> None:
    """ZeroMQ signals an arrival once, and a write between the arrival and the loop's next look takes the signal away."""
    client = zmq.Context.instance().socket(zmq.PAIR)
    client.setsockopt(zmq.LINGER, 0)
    client.bind(f"ipc://{tmp_path / SOCKET_NAME}")

    async def serve() -> list[dict]:
        link, received = Link(tmp_path), []
        for number in range(5):
            waiting = asyncio.create_task(link.receive())
            await asyncio.sleep(0.05)
            client.send_string(json.dumps({"number": number}))
            time.sleep(0.05)
            link.tell(event="beat")
            received.append(await asyncio.wait_for(waiting, 5))
        return received

    assert asyncio.run(serve()) == [{"number": number} for number in range(5)]
    assert [json.loads(client.recv()) for _ in range(5)] == [{"event": "beat"}] * 5
    client.close()
