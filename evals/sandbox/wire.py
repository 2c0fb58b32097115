"""Messages between the evaluator and a worker: JSON with its length before it, over a socket."""

from __future__ import annotations

import json
import socket
import struct

_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, message: dict) -> None:
    data = json.dumps(message).encode()  # ASCII, so that also half a surrogate pair arrives
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> dict | None:
    """The next message; None where the other side has gone."""
    head = _exactly(connection, _LENGTH.size)
    body = head and _exactly(connection, *_LENGTH.unpack(head))
    return json.loads(body) if body else None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            data = connection.recv(size - len(parts))
        except ConnectionResetError:
            return None
        if not data:
            return None
        parts += data
    return bytes(parts)
