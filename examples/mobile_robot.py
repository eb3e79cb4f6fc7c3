"""A mobile base driven over `POST /v1/actions` alone: HTTP, JSON and PNG, nothing of ours to ask.

    serve-policy --ckpt runs/mobile_vla_small
    python examples/mobile_robot.py --target 0 --scene 3

The base is the simulated one; in your robot's loop put its camera and its wheels in the place of
`look` and `drive`. The policy sees the last 8 frames: what was seen between two requests goes with
the next one as `history`, and the server keeps what it made of the frames before.
"""

import argparse
import base64
import io
import uuid
from typing import Any

import httpx
import numpy as np
from PIL import Image

from reflexarc.eval.mobile.scene import draw_scene
from reflexarc.eval.mobile.simulator import MobileSimulator
from reflexarc.eval.mobile.tasks import MAX_STEPS, load_tasks


def png(image: np.ndarray) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return {"format": "png", "data": base64.b64encode(buffer.getvalue()).decode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--target", type=int, default=0, help="0 to 3")
    parser.add_argument("--scene", type=int, default=0, help="any number: another scene")
    parser.add_argument("--replan-steps", type=int, default=4, help="actions driven of a chunk")
    options = parser.parse_args()

    task = load_tasks()[options.target]
    simulator = MobileSimulator(task)
    simulator.reset(draw_scene("evaluated", task.index, options.scene, seed=0))
    session = uuid.uuid4().hex

    def look() -> dict[str, Any]:
        return {"front": png(simulator.observe().images["front"])}

    def drive(velocity: list[float]) -> None:
        simulator.step(np.array(velocity))

    print(f'"{task.instruction}"')
    seen: list[dict[str, Any]] = []  # since the last request
    chunk: list[list[float]] = []
    with httpx.Client(base_url=options.url, timeout=60) as http:
        for step in range(MAX_STEPS):
            row = {"step_index": step, "state": [], "images": look()}
            if not chunk:
                body = {**row, "instruction": task.instruction, "session_id": session,
                        "history": seen}  # fmt: skip
                reply = http.post("/v1/actions", json=body)
                if reply.is_error:
                    raise SystemExit(f"{reply.status_code}: {reply.text}")
                chunk, seen = reply.json()["actions"][: options.replan_steps], []
            else:
                seen.append(row)
            drive(chunk.pop(0))
            x, y = simulator.position
            print(f"step {step:2d}  x {x:5.2f} m  y {y:+5.2f} m")
            if simulator.over:
                break
        http.delete(f"/v1/sessions/{session}")
    where = "nowhere" if simulator.reached is None else load_tasks()[simulator.reached].name
    print("reached it" if simulator.success else f"did not reach it; stands at: {where}")


if __name__ == "__main__":
    main()
