"""A robot's control loop. The policy runs elsewhere: serve-policy --ckpt checkpoints/demo

Replace ``Robot`` by your own: two images as the policy's contract asks (see ``reflexarc query``),
the state in the contract's layout, and something that executes one action.
"""

import sys

import numpy as np

from reflexarc.client import PolicyClient, RecedingHorizonExecutor
from reflexarc.contract import Observation, PolicyContract


class Robot:
    """Stands in for yours: sees grey images and counts the actions that it is given."""

    def __init__(self, contract: PolicyContract) -> None:
        self.contract, self.executed = contract, 0

    def observe(self, instruction: str) -> Observation:
        images = {
            camera.name: np.full((camera.height, camera.width, 3), 128, np.uint8)
            for camera in self.contract.cameras
        }
        return Observation(images, np.zeros(self.contract.state.dimension), instruction)

    def execute(self, action: np.ndarray) -> None:
        self.executed += 1
        print(f"{self.executed:3d}", np.round(action, 3))


def main(server: str, instruction: str, steps: int = 40) -> None:
    with PolicyClient(server) as policy:
        robot = Robot(policy.contract)
        executor = RecedingHorizonExecutor(policy, replan_steps=8)
        for _ in range(steps):
            action = executor.next_action(lambda: robot.observe(instruction))
            robot.execute(action)  # pace this at policy.contract.action.control_hz
        print(f"{executor.chunks} chunks, {np.median(executor.latencies_ms):.1f} ms each")


if __name__ == "__main__":
    main(
        server=sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000",
        instruction="pick up the alphabet soup and place it in the basket",
    )
