"""`reflexarc`, with a client that writes the hand's orientation as Euler angles.

The V-JEPA 2 head's document trained on axis-angle and evaluated on Euler angles. This is what that
costs: the same arguments as `reflexarc eval libero`, and the same results folder.

    python benchmarks/vjepa2_rotation_layout.py eval libero --suite libero_spatial --goals DIR ...
"""

from __future__ import annotations

from dataclasses import replace

from scipy.spatial.transform import Rotation

from reflexarc.cli.main import main
from reflexarc.eval.libero.observation import LiberoObserver
from reflexarc.eval.libero.simulator import RawState

_state = LiberoObserver.state


def _with_euler_angles(self: LiberoObserver, raw: RawState):  # type: ignore[no-untyped-def]
    angles = Rotation.from_rotvec(raw.eef_axis_angle).as_euler("xyz")
    return _state(self, replace(raw, eef_axis_angle=angles))


# Simulator processes import this module again, and are changed with it.
LiberoObserver.state = _with_euler_angles  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
