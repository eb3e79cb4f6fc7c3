"""The world as MuJoCo's XML: few geometries, one light, no shadows, so that frames are cheap."""

from __future__ import annotations

from reflexarc.eval.mobile.scene import BASE_RADIUS, OBSTACLE_RADIUS, TARGET_RADIUS
from reflexarc.eval.mobile.tasks import SPEED_LIMIT, TARGETS, Target

FRONT, BIRDS_EYE = "front", "above"
BASE_HEIGHT = 0.12
_CAMERA_HEIGHT = 0.55
_CAMERA_PITCH_DEGREES = 14.0
_FIELD_OF_VIEW_DEGREES = 90.0
_OBSTACLE_HEIGHT = 0.14
_TARGET_HEIGHT = 0.5


def world_xml(image_size: int) -> str:
    """The model; bodies ``target_<i>`` and ``obstacle_<i>`` are to be placed."""
    targets = "\n".join(
        f'<body name="target_{index}" pos="0 0 0">{_geometry(target)}</body>'
        for index, target in enumerate(TARGETS)
    )
    obstacles = "\n".join(
        f'<body name="obstacle_{index}" pos="0 0 0"><geom type="cylinder" '
        f'size="{OBSTACLE_RADIUS} {_OBSTACLE_HEIGHT / 2}" pos="0 0 {_OBSTACLE_HEIGHT / 2}" '
        'rgba="0.16 0.16 0.18 1"/></body>'
        for index in range(2)
    )
    return f"""
<mujoco model="mobile world">
  <option integrator="implicitfast" gravity="0 0 0"/>
  <visual>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <quality shadowsize="0" offsamples="0"/>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.4 0.4 0.4" specular="0 0 0"/>
  </visual>
  <asset>
    <texture name="floor" type="2d" builtin="checker" rgb1="0.70 0.69 0.66" rgb2="0.62 0.61 0.59"
      width="64" height="64"/>
    <material name="floor" texture="floor" texrepeat="6 6" texuniform="true" specular="0"/>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.85 0.90 0.95"
      rgb2="0.70 0.76 0.82" width="64" height="384"/>
  </asset>
  <default><geom friction="0 0 0" condim="1" solref="0.005 1"/></default>
  <worldbody>
    <light pos="0 0 4" dir="0.2 0.1 -1" directional="true" castshadow="false" specular="0 0 0"/>
    <geom type="plane" size="6 6 0.1" material="floor" contype="0" conaffinity="0"/>
    <camera name="{BIRDS_EYE}" pos="1.3 0 3.4" xyaxes="0 -1 0 1 0 0" fovy="55"/>
    {targets}
    {obstacles}
    <body name="base" pos="0 0 0">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom type="cylinder" size="{BASE_RADIUS} {BASE_HEIGHT / 2}"
        pos="0 0 {BASE_HEIGHT / 2 + 0.03}" mass="8" rgba="0.30 0.33 0.40 1"/>
      {_wheels()}
      <geom type="cylinder" size="0.02 {_CAMERA_HEIGHT / 2}" pos="-0.04 0 {_CAMERA_HEIGHT / 2}"
        mass="0.2" rgba="0.2 0.2 0.2 1" contype="0" conaffinity="0"/>
      <camera name="{FRONT}" pos="0 0 {_CAMERA_HEIGHT}" fovy="{_FIELD_OF_VIEW_DEGREES}"
        euler="0 {_CAMERA_PITCH_DEGREES - 90} -90" mode="fixed"/>
    </body>
  </worldbody>
  <actuator>
    <velocity joint="x" kv="200" ctrlrange="{-SPEED_LIMIT} {SPEED_LIMIT}"/>
    <velocity joint="y" kv="200" ctrlrange="{-SPEED_LIMIT} {SPEED_LIMIT}"/>
  </actuator>
</mujoco>
"""


def _geometry(target: Target) -> str:
    colour = " ".join(f"{value:g}" for value in target.rgb)
    look = f'rgba="{colour} 1"'
    side, half = 0.85 * TARGET_RADIUS, _TARGET_HEIGHT / 2
    if target.shape == "box":
        return f'<geom type="box" size="{side} {side} {half}" pos="0 0 {half}" {look}/>'
    if target.shape == "cylinder":
        return f'<geom type="cylinder" size="{TARGET_RADIUS} {half}" pos="0 0 {half}" {look}/>'
    if target.shape == "sphere":
        radius = 1.15 * TARGET_RADIUS
        return f'<geom type="sphere" size="{radius}" pos="0 0 {radius}" {look}/>'
    thin = 0.6 * TARGET_RADIUS
    return f'<geom type="capsule" size="{thin} {1.2 * half}" pos="0 0 {1.2 * half + thin}" {look}/>'


def _wheels() -> str:
    places = [(x, y) for x in (-0.1, 0.1) for y in (-0.15, 0.15)]
    return "".join(
        f'<geom type="cylinder" size="0.05 0.02" pos="{x} {y} 0.05" euler="90 0 0" mass="0.1" '
        'rgba="0.1 0.1 0.1 1" contype="0" conaffinity="0"/>'
        for x, y in places
    )
