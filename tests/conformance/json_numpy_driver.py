"""Runs in an environment with ``requests`` and ``json-numpy`` alone: OpenVLA's and GR00T's ways.

``python json_numpy_driver.py URL SCRIPT.npz`` posts the observation of SCRIPT (``agentview`` and
``wrist`` uint8 (H, W, 3), ``state`` (8,), ``instruction``) in every way that published clients
use, and prints what came back as JSON. No file of this project is imported here.
"""

import json
import sys

import json_numpy
import numpy as np
import requests


def seen(response, value):
    """What a client holds: status, the Content-Type that was sent, types and numbers."""
    first = value[0] if isinstance(value, list) else value
    return {
        "status": response.status_code,
        "sent_type": response.request.headers.get("Content-Type"),
        "type": f"{type(value).__name__} of {type(first).__name__}",
        "actions": np.asarray(value).tolist() if not isinstance(value, dict) else value,
    }


def openvla_oft_without_content_type(url, request):
    response = requests.post(f"{url}/act", data=json_numpy.dumps(request))
    return seen(response, json_numpy.loads(response.text))


def openvla_oft_encoded(url, request):
    body = {"encoded": json_numpy.dumps(request)}
    response = requests.post(f"{url}/act", data=json.dumps(body))
    return seen(response, json_numpy.loads(response.json()))


def openvla_oft_patched(url, request):
    """As get_action_from_server of OpenVLA-OFT does, after json_numpy.patch()."""
    response = requests.post(f"{url}/act", json=request)
    return seen(response, response.json())


def openvla_one_image(url, request):
    """As in OpenVLA's README, with the state that a policy may need beside it."""
    short = {"image": request["full_image"], "state": request["state"]}
    short["instruction"] = request["instruction"]
    response = requests.post(f"{url}/act", json=short)
    return seen(response, response.json())


def openvla_wrong_keys(url, request):
    response = requests.post(f"{url}/act", json={"img": request["full_image"]})
    return seen(response, response.json())


def groot_patched(url, request):
    """As GR00T's http_client_example.py, with the keys of its LIBERO example."""
    names = ("x", "y", "z", "roll", "pitch", "yaw")
    parts = dict(zip(names, request["state"][:6], strict=True))
    observation = {
        "video.image": request["full_image"][None],
        "video.wrist_image": request["wrist_image"][None],
        **{f"state.{name}": np.array([[value]]) for name, value in parts.items()},
        "state.gripper": request["state"][None, 6:],
        "annotation.human.action.task_description": [request["instruction"]],
    }
    response = requests.post(f"{url}/act", json={"observation": observation})
    return seen(response, response.json())


def main(url, script):
    recorded = np.load(script)
    request = {
        "full_image": recorded["agentview"],
        "wrist_image": recorded["wrist"],
        "state": recorded["state"],
        "instruction": str(recorded["instruction"]),
    }
    report = {"ready": requests.get(f"{url}/act").status_code}
    for way in (openvla_oft_without_content_type, openvla_oft_encoded):
        report[way.__name__] = way(url, request)
    json_numpy.patch()
    for way in (openvla_oft_patched, openvla_one_image, openvla_wrong_keys, groot_patched):
        report[way.__name__] = way(url, request)
    sys.stdout.write(json_numpy.dumps(report))


main(*sys.argv[1:])
