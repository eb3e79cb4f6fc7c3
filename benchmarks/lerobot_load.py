"""Runs in lerobot's environment: its unmodified dataset class, one sample after another.

Each line on stdin is JSON: ``{"root", "indices", "backend"}``. Answers with the CPU seconds that
reading those samples took, threads included, and how many images a sample held; or with
``{"error"}``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

DATASETS: dict[tuple[str, str], Any] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    root, backend = request["root"], request["backend"]
    if (root, backend) not in DATASETS:
        DATASETS[root, backend] = LeRobotDataset(
            "local/benchmark", root=root, video_backend=backend
        )
    dataset = DATASETS[root, backend]
    began = time.process_time()
    items = [dataset[index] for index in request["indices"]]
    seconds = time.process_time() - began
    images = sum(name.startswith("observation.images") for name in items[0])
    return {"seconds": seconds, "images": images}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # whatever it is belongs into the benchmark's report
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
