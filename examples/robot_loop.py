"""A robot's control loop. The policy runs elsewhere: serve-policy --ckpt checkpoints/demo"""

import sys

import numpy as np

from reflexarc.client import PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation

TASK = "pick up the alphabet soup and place it in the basket"

with PolicyClient(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000") as policy:

    def observe() -> Observation:  # put your robot's cameras and state in place of the zeros
        cameras = policy.contract.cameras  # `reflexarc query` shows what they must look like
        images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in cameras}
        return Observation(images, np.zeros(policy.contract.state.dimension), TASK)

    executor = RecedingHorizonExecutor(policy, replan_steps=8)
    for step in range(40):
        action = executor.next_action(observe)  # asks the server at every eighth step
        print(step, np.round(action, 3))  # execute it here, at contract.action.control_hz
