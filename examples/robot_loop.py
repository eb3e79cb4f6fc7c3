"""A robot's control loop. The policy runs elsewhere: serve-policy --ckpt checkpoints/demo"""

import sys
import time

import numpy as np

from reflexarc.client import AsynchronousExecutor, PolicyClient, RobotGuard
from reflexarc.contract import Observation

TASK = "pick up the alphabet soup and place it in the basket"
URL = sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000"

with PolicyClient(URL, retry_for=1.0) as policy:

    def observe() -> Observation:  # put your robot's cameras and state in place of the zeros
        cameras = policy.contract.cameras  # `reflexarc query` shows what they must look like
        images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in cameras}
        return Observation(images, np.zeros(policy.contract.state.dimension), TASK)

    spec = policy.contract.action
    limit = 0.5 * np.array(spec.high)  # half of the policy's speed, for a first try
    if spec.gripper is not None:
        limit[spec.gripper.index] = spec.high[spec.gripper.index]
    guard = RobotGuard(
        policy.contract, low=-limit, high=limit,
        max_age_ms=1000,  # what was seen longer ago is not acted on: the arm holds
        on_event=lambda event: print(f"guard: {event.name} at step {event.step}: {event.detail}"),
    )  # fmt: skip
    with AsynchronousExecutor(policy, replan_steps=8, guard=guard) as executor:
        next_step = time.monotonic()
        for step in range(40):
            action = executor.next_action(observe)  # never waits for the server
            print(step, np.round(action, 3))  # execute it here
            next_step += 1 / spec.control_hz
            time.sleep(max(0.0, next_step - time.monotonic()))
    print("guard:", dict(guard.counts), f"{executor.chunks} chunks")
