"""Runs in openpi-client's own environment: drives the unmodified client as its parent says.

Commands come on stdin and results go to stdout as a 4-byte big-endian length and a map in
openpi's codec. No file of this project is imported here.
"""

import struct
import sys

import numpy as np
from openpi_client import image_tools, msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class Driver:
    def __init__(self):
        self.policy = None

    def connect(self, url, broker_horizon=None, api_key=None):
        client = WebsocketClientPolicy(url, api_key=api_key)
        self.policy = ActionChunkBroker(client, broker_horizon) if broker_horizon else client
        return client.get_server_metadata()

    def infer(self, observation):
        return self.policy.infer(observation)

    def pack(self, message):
        return msgpack_numpy.packb(message)

    def resize(self, images, size):
        return image_tools.resize_with_pad(images, size, size)

    def numpy_version(self):
        return np.__version__


def main():
    driver, stdin, stdout = Driver(), sys.stdin.buffer, sys.stdout.buffer
    while header := stdin.read(4):
        command = msgpack_numpy.unpackb(stdin.read(struct.unpack(">I", header)[0]))
        try:
            reply = {"result": getattr(driver, command["call"])(**command["arguments"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        frame = msgpack_numpy.packb(reply)
        stdout.write(struct.pack(">I", len(frame)) + frame)
        stdout.flush()


main()
