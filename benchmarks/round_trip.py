"""Round trip of one observation with a null policy: our server against openpi-server.

Everything is unmodified and in a process of its own: ``openpi-server`` 0.1.0 and ``openpi-client``
0.1.2 from the registry in their own environment, our server and our clients in this one. The
observation holds two raw 224 px images (301 kB). A bare TCP socket that takes as many bytes and
gives a chunk's back stands for what nobody can undercut. The ways are measured in turn, block by
block, so that whatever else the machine does hits all alike. Prints markdown, writes JSON.

    python benchmarks/round_trip.py [--rounds 40] [--requests 50]
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    PROMPT,
    Processes,
    describe_machine,
    openpi_python,
    openpi_request,
    openpi_server,
    write_json,
)

OPENPI, SOCKET = "openpi-client -> openpi-server", "bare TCP socket"
WAYS = {  # name: (which client, which server)
    OPENPI: ("openpi", "openpi"),
    "openpi-client -> reflexarc": ("openpi", "reflexarc"),
    "PolicyClient -> reflexarc": ("websocket", "reflexarc"),
    "HttpPolicyClient -> reflexarc": ("http", "reflexarc"),
    SOCKET: ("socket", "socket"),
}
TARGETS = (  # (way, against, at most)
    ("openpi-client -> reflexarc", OPENPI, 0.75),
    ("PolicyClient -> reflexarc", OPENPI, 0.75),
    ("PolicyClient -> reflexarc", SOCKET, 3.5),
)
REQUEST_BYTES, REPLY_BYTES = 301_500, 450


def serve_reflexarc(port: int) -> None:
    from reflexarc.contract import ActionChunk
    from reflexarc.server import NullPolicy, PolicyServer, PolicyService
    from reflexarc.server.lifecycle import open_port

    class Zeros(NullPolicy):
        def infer(self, observations: Any) -> list[ActionChunk]:
            return [ActionChunk(np.zeros((10, 7), np.float32), seen.seed) for seen in observations]

    PolicyServer(PolicyService(Zeros)).run([open_port("127.0.0.1", port)])


def serve_socket(port: int) -> None:
    listener, reply = socket.create_server(("127.0.0.1", port)), bytes(REPLY_BYTES)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while receive(connection, REQUEST_BYTES):
            connection.sendall(reply)


def receive(connection: socket.socket, length: int) -> bytes:
    """``length`` bytes, or none at the connection's end."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            return b""
        view = view[count:]
    return bytes(buffer)


def ask_as_openpi(port: int) -> Callable[[], Any]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    request, client = openpi_request(224), WebsocketClientPolicy("127.0.0.1", port)
    return lambda: client.infer(request)["actions"]


def ask_as_reflexarc(kind: str, port: int) -> Callable[[], Any]:
    from reflexarc.client import HttpPolicyClient, PolicyClient
    from reflexarc.contract import Observation

    request = openpi_request(224)
    images = {
        "agentview": request["observation/image"],
        "eye_in_hand": request["observation/wrist_image"],
    }
    observation = Observation(images, request["observation/state"], instruction=PROMPT)
    client = (PolicyClient if kind == "websocket" else HttpPolicyClient)(f"127.0.0.1:{port}")
    return lambda: client.infer(observation).actions


def ask_by_socket(port: int) -> Callable[[], Any]:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = bytes(REQUEST_BYTES)

    def ask() -> Any:
        connection.sendall(request)
        return np.frombuffer(receive(connection, REPLY_BYTES), np.float32, 70).reshape(10, 7)

    return ask


def run_client(kind: str, port: int) -> None:
    """For each line on stdin, that many requests; prints their milliseconds as JSON."""
    if kind == "openpi":
        ask = ask_as_openpi(port)
    elif kind == "socket":
        ask = ask_by_socket(port)
    else:
        ask = ask_as_reflexarc(kind, port)
    for _ in range(100):
        assert ask().shape == (10, 7)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            ask()
            milliseconds.append((time.perf_counter() - started) * 1000)
        print(json.dumps(milliseconds), flush=True)


def measure(rounds: int, requests: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every request: way -> round -> request."""
    with Processes("round_trip") as processes:
        ports = {}
        ports["openpi"] = processes.serve(*openpi_server(0.0))
        for server in ("reflexarc", "socket"):
            ports[server] = processes.serve(sys.executable, __file__, "--serve", server)
        clients = {}
        for way, (client, server) in WAYS.items():
            python = openpi_python() if client == "openpi" else sys.executable
            arguments = (python, __file__, "--client", client, "--port", str(ports[server]))
            clients[way] = processes.start(*arguments)
            processes.read(clients[way])
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        order = list(WAYS)
        for _ in range(rounds):
            for way in order:
                times[way].append(processes.ask(clients[way], str(requests)))
            order = order[1:] + order[:1]  # nobody always follows the same neighbour
        return times


def ratios(times: dict[str, list[list[float]]], way: str, against: str) -> list[float]:
    """Of the blocks' medians, round by round."""
    return [
        statistics.median(block) / statistics.median(base)
        for block, base in zip(times[way], times[against], strict=True)
    ]


def report(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Prints a markdown table; returns its figures. A ratio is the median over the rounds."""
    blocks = times[OPENPI]
    print(
        f"Round trip of 301 kB, null policy, {sum(map(len, blocks))} requests a way in "
        f"{len(blocks)} rounds; {describe_machine()}.\n\n"
        "| way | median ms | p95 ms | ratio to openpi | quartiles | ratio to the socket |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    ways = {}
    for way in times:
        every = np.concatenate(times[way])
        low, middle, high = np.quantile(ratios(times, way, OPENPI), [0.25, 0.5, 0.75])
        to_socket = statistics.median(ratios(times, way, SOCKET))
        median, p95 = np.median(every), np.quantile(every, 0.95)
        print(
            f"| {way} | {median:.3f} | {p95:.3f} | {middle:.2f} | {low:.2f} to {high:.2f} | "
            f"{to_socket:.2f} |"
        )
        ways[way] = {
            "median_ms": float(median),
            "p95_ms": float(p95),
            "ratio_to_openpi": float(middle),
            "ratio_to_socket": to_socket,
        }
    print()
    targets = []
    for way, against, most in TARGETS:
        ratio = statistics.median(ratios(times, way, against))
        print(f"- {way} against {against}: {ratio:.2f}, target at most {most}")
        targets.append({"way": way, "against": against, "ratio": ratio, "at_most": most})
    return {"rounds": len(blocks), "ways": ways, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=50, help="requests in a block")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        (serve_socket if options.serve == "socket" else serve_reflexarc)(options.port)
    elif options.client:
        run_client(options.client, options.port)
    else:
        write_json("round_trip", report(measure(options.rounds, options.requests)))


if __name__ == "__main__":
    main()
