"""A closed loop of clients that costs little: one process, one thread, prepared requests over kept connections.

Clients and server share the cores of a machine, so what the clients burn is counted, and printed beside each rate.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 300.0


@dataclass
class Seen:
    """What clients saw.

    Attributes:
        seconds: of each request, from its first byte to the answer's last.
        wall: of all.
        cpu: that the clients burnt.
    """

    seconds: list[float] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0


def prepared(texts: list[str]) -> bytes:
    """A request for base64 embeddings of `texts`."""
    body = json.dumps({"input": texts, "encoding_format": "base64"}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*head, "", ""]).encode() + body


class Client:
    """A connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self._answer = bytearray()
        self._size = 0

    def send(self, request: bytes) -> None:
        self._answer.clear()
        self._size = 0
        self.began = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Read what has come; whether the answer is whole.

        Raises:
            RuntimeError: its status is not 200.
        """
        part = self.socket.recv(1 << 20)
        self._answer += part
        if not self._size and (end := self._answer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._answer[:end]).lower()
            self._size = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        whole = 0 < self._size <= len(self._answer)
        if not part or (whole and not self._answer.startswith(b"HTTP/1.1 200")):
            raise RuntimeError(self._answer.decode(errors="replace"))
        return whole

    def ask(self, request: bytes) -> float:
        """Seconds that one request takes."""
        self.send(request)
        while not self.receive():
            pass
        return time.perf_counter() - self.began


def closed_loop(port: int, requests: Iterator[bytes], clients: int) -> Seen:
    """Let each of `clients` send the next of `requests` as soon as it has its answer, until they are used up."""
    seen, chooser = Seen(), selectors.DefaultSelector()
    cpu, began, under_way = time.process_time(), time.perf_counter(), 0
    everybody = [Client(port) for _ in range(clients)]
    for client in everybody:
        if (request := next(requests, None)) is not None:
            chooser.register(client.socket, selectors.EVENT_READ, client)
            client.send(request)
            under_way += 1
    while under_way:
        for key, _ in chooser.select(PATIENCE):
            client = key.data
            if client.receive():
                seen.seconds.append(time.perf_counter() - client.began)
                under_way -= 1
                if (request := next(requests, None)) is not None:
                    client.send(request)
                    under_way += 1
    seen.wall, seen.cpu = time.perf_counter() - began, time.process_time() - cpu
    for client in everybody:
        client.socket.close()
    return seen
