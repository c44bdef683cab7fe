"""Measures a link with one TCP flow: ``send ADDRESS SECONDS`` on one node, ``receive ADDRESS SECONDS`` on the other.

The receiver prints Mbit/s of payload, the sender the median round trip of one byte in milliseconds. Standard library
only, so that it starts at once.
"""

import socket
import sys
import time
from statistics import median

PORT = 7077
CHUNK = 1 << 16
ROUND_TRIPS = 51
CONNECT_TIMEOUT_S = 10.0


def main(role: str, address: str, seconds: str) -> None:
    print(send(address, float(seconds)) if role == "send" else receive(address, float(seconds)))


def receive(address: str, seconds: float) -> float:
    with socket.create_server((address, PORT)) as server:
        server.settimeout(CONNECT_TIMEOUT_S)
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(ROUND_TRIPS):
                connection.sendall(connection.recv(1))
            # The bucket is full at first: what it lets through at once is no rate.
            count(connection, seconds / 4)
            started = time.perf_counter()
            received = count(connection, seconds / 2)
            measured = received * 8e-6 / (time.perf_counter() - started)
            while connection.recv(CHUNK):
                pass
            return measured


def count(connection: socket.socket, seconds: float) -> int:
    """Bytes that arrive within ``seconds``."""
    received, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        received += len(connection.recv(CHUNK))
    return received


def send(address: str, seconds: float) -> float:
    with connect(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append((time.perf_counter() - started) * 1e3)
        chunk, until = bytes(CHUNK), time.perf_counter() + seconds
        while time.perf_counter() < until:
            connection.sendall(chunk)
        return median(trips)


def connect(address: str) -> socket.socket:
    """The receiver may still be starting."""
    until = time.perf_counter() + CONNECT_TIMEOUT_S
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=CONNECT_TIMEOUT_S)
        except OSError:
            if time.perf_counter() > until:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
