"""Compressed images of an observation, decoded; only those that its contract can accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reflexarc.contract import EncodedImage, Observation, PolicyContract
from reflexarc.contract.errors import CodecError
from reflexarc.contract.images import decode_image


def decode_images(contract: PolicyContract, observation: Observation) -> Observation:
    """The observation with arrays in place of compressed images.

    Only the contract's cameras are decoded, and rows of history only as many as it has: a frame
    may hold thousands of others, each small on the wire and large in memory. The contract check
    then refuses those by name. Past images and goals must have their camera's size; others that are
    larger than the policy takes, and than the camera gives, are refused by their header.

    Raises CodecError naming the field of an image that cannot be decoded.
    """
    if not has_encoded_images(observation):
        return observation
    history = observation.history
    if len(history) <= contract.history.span:
        history = tuple(
            row
            if row.images is None
            else replace(
                row, images=_decoded(contract, row.images, f"history[{index}].images", sized=True)
            )
            for index, row in enumerate(history)
        )
    goal = observation.goal_image
    if goal is not None and contract.needs_goal_image:
        goal = _decoded(contract, goal, "goal_image", sized=True)
    images = _decoded(contract, observation.images, "images", sized=False)
    return replace(observation, images=images, history=history, goal_image=goal)


def has_encoded_images(observation: Observation) -> bool:
    """Whether any of its images is compressed."""
    maps = [observation.images, observation.goal_image, *(r.images for r in observation.history)]
    return any(isinstance(image, EncodedImage) for m in maps if m for image in m.values())


def _decoded(
    contract: PolicyContract, images: Mapping[str, Any], where: str, *, sized: bool
) -> dict[str, Any]:
    decoded = dict(images)
    for camera in contract.cameras:
        encoded = decoded.get(camera.name)
        if isinstance(encoded, EncodedImage):
            size = (camera.height, camera.width) if sized else None
            try:
                decoded[camera.name] = decode_image(encoded, size, camera=camera)
            except CodecError as error:
                field = f"{where}.{camera.name}"
                raise CodecError(f"{field}: {error.message}", field=field) from error
    return decoded
