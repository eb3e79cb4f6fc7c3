"""Runs in openpi's environment: unmodified openpi clients in a closed loop, one thread each.

Each line on stdin is a block as JSON: ``{"port", "clients", "size", "seconds", "warm_up",
"think_ms", "start"}``, start in ``time.monotonic()``. Answers with the milliseconds of every
request that ended after the warm-up, client by client.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from common import openpi_request
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def run_block(block: dict[str, Any]) -> list[list[float]]:
    policies = [WebsocketClientPolicy("127.0.0.1", block["port"]) for _ in range(block["clients"])]
    begin = max(block["start"], time.monotonic() + 0.1) + block["warm_up"]
    times: list[list[float]] = [[] for _ in policies]
    threads = [
        threading.Thread(target=ask_until_end, args=(policy, block, begin, taken))
        for policy, taken in zip(policies, times)  # noqa: B905 (openpi's Python may be 3.9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for policy in policies:
        policy._ws.close()  # its class has no close
    return times


def ask_until_end(
    policy: Any, block: dict[str, Any], begin: float, milliseconds: list[float]
) -> None:
    request, think = openpi_request(block["size"]), block["think_ms"] / 1000
    end = begin + block["seconds"]
    time.sleep(max(0.0, begin - block["warm_up"] - time.monotonic()))
    while (started := time.monotonic()) < end:
        policy.infer(request)
        ended = time.monotonic()
        if begin <= ended < end:
            milliseconds.append((ended - started) * 1000)
        if think:
            time.sleep(think)


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run_block(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
