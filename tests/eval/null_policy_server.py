"""``python null_policy_server.py PORT CONTRACT_JSON LOG``: ``/v1/policy`` on a real socket.

Answers every observation with small random actions drawn from its seed, and appends to LOG one
JSON line a request: seed, step index, and each image's mean. It needs neither torch nor the
server package, so it can be killed and started again within a test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from reflexarc.contract import (
    PROTOCOL_VERSION,
    ActionChunk,
    Observation,
    PolicyContract,
    ReflexarcError,
    check_observation,
    pack,
    unpack,
)


def answer(contract: PolicyContract, frame: bytes, log: Path) -> bytes:
    try:
        observation = Observation.from_wire(unpack(frame))
        check_observation(contract, observation)
    except ReflexarcError as error:
        return pack({"error": error.to_wire()})
    record = {
        "seed": observation.seed,
        "step_index": observation.step_index,
        "session_id": observation.session_id,
        "image_means": {name: float(image.mean()) for name, image in observation.images.items()},
        "state": [float(value) for value in observation.state],
    }
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")
    seed = observation.seed or 0
    shape = (contract.action.horizon, contract.action.dimension)
    actions = np.random.default_rng(seed).uniform(-0.2, 0.2, shape).astype(np.float32)
    actions[:, -1] = -1.0
    chunk = ActionChunk(actions, seed, observation.request_id, observation.session_id)
    return pack(chunk.to_wire())


def main() -> None:
    port, contract_file, log = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    contract = PolicyContract.model_validate_json(contract_file.read_text())
    metadata = {
        "protocol": "reflexarc",
        "protocol_version": PROTOCOL_VERSION,
        "contract": contract.model_dump(mode="json"),
        "sampling": {},
    }

    def converse(connection: ServerConnection) -> None:
        connection.send(pack(metadata))
        try:
            for frame in connection:
                assert isinstance(frame, bytes)
                connection.send(answer(contract, frame, log))
        except ConnectionClosed:
            return

    with serve(converse, "127.0.0.1", port, max_size=None, compression=None) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
