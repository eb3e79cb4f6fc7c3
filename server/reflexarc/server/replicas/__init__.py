"""One policy in several processes or machines, on Ray Serve, behind the same port.

Only ``router``, ``cluster`` and ``forwarder`` import Ray, and only when replicas are asked for.
"""
