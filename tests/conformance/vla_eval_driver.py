"""Runs in vla-eval's own environment: its whole orchestrator with a small scripted benchmark.

``python vla_eval_driver.py URL SCRIPT.npz RESULT.json``. SCRIPT holds ``agentview`` and ``wrist``
uint8 (T, H, W, 3), ``states`` float (T, 8), ``instruction`` and ``episodes``. RESULT gets what the
orchestrator returns, what the benchmark was constructed with and every action, by episode. No
file of this project is imported here.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
from vla_eval.api import run
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
)

PARAMETERS, ACTIONS = {}, []


class ScriptedBenchmark(StepBenchmark):
    """Shows recorded observations, whatever the actions; succeeds when the script is through."""

    def __init__(self, script, send_state=False, send_wrist_image=False, quat_no_antipodal=False):
        super().__init__()
        PARAMETERS.update(
            send_state=send_state,
            send_wrist_image=send_wrist_image,
            quat_no_antipodal=quat_no_antipodal,
        )
        self.script = np.load(script)

    def get_tasks(self):
        return [{"name": str(self.script["instruction"]), "suite": "scripted", "task_id": 0}]

    def reset(self, task):
        self.at = 0
        ACTIONS.append([])
        return self.at

    def step(self, action):
        ACTIONS[-1].append(np.asarray(action["actions"]).tolist())
        self.at += 1
        done = self.at == len(self.script["states"])
        return StepResult(obs=self.at, reward=float(done), done=done, info={})

    def make_obs(self, at, task):
        images = {"agentview": self.script["agentview"][at]}
        observation = {"images": images, "task_description": task["name"]}
        if PARAMETERS["send_wrist_image"]:
            images["wrist"] = self.script["wrist"][at]
        if PARAMETERS["send_state"]:
            observation["states"] = self.script["states"][at]
        return observation

    def get_step_result(self, step_result):
        return {"success": step_result.done}

    def get_action_spec(self):
        return {
            "position": POSITION_DELTA,
            "rotation": ROTATION_AA,
            "gripper": GRIPPER_CLOSE_POS,
        }

    def get_observation_spec(self):
        return {
            "agentview": IMAGE_RGB,
            "wrist": IMAGE_RGB,
            "state": STATE_EEF_POS_AA_GRIP,
            "language": LANGUAGE,
        }


def main(url, script, result):
    benchmark = {
        "benchmark": f"{Path(__file__).stem}:ScriptedBenchmark",
        "episodes_per_task": int(np.load(script)["episodes"]),
        "max_steps": 1000,
        "params": {"script": script},
    }
    sys.modules[Path(__file__).stem] = sys.modules["__main__"]  # one module, not two
    config = {"benchmarks": [benchmark], "output_dir": str(Path(result).parent)}
    logging.basicConfig(level=logging.INFO)
    results = run(config, server_url=url, docker=False, no_save=True)
    report = {"results": results, "parameters": PARAMETERS, "actions": ACTIONS}
    Path(result).write_text(json.dumps(report, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
