"""CUDA graphs: a small policy's decision is hundreds of kernels, which take longer to start one
by one than to run. A graph starts all of them at once.
"""

from __future__ import annotations

import torch

from reflexarc.policy.fixed_shapes import Capture, FixedShapeDecisions, Function
from reflexarc.policy.interface import Policy, Tensors

# Kernels choose their algorithm and libraries allocate in the first calls, which no graph may hold.
_WARM_UP_CALLS = 3


def graphed_decisions(policy: Policy) -> FixedShapeDecisions:
    """Decisions of a policy on CUDA."""
    return FixedShapeDecisions(policy, cuda_capture(policy.device))


def cuda_capture(device: torch.device) -> Capture:
    """Captures functions of tensors on ``device``. All graphs share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Function, inputs: Tensors) -> Function:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        with torch.cuda.device(device):
            beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UP_CALLS):
                    function(held)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device: decoding, another policy of the process.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = function(held)

        def replay(given: Tensors) -> Tensors:
            with torch.cuda.device(device):
                for name, tensor in held.items():
                    tensor.copy_(given[name])
                graph.replay()
                # The next graph of the pool may write over them.
                return {name: tensor.clone() for name, tensor in outputs.items()}

        return replay

    return capture
