"""The scans that run on a CPU against a plain loop: values, gradients, dtypes, threads, errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reflexarc.policy.layers.selective_scan import (
    Backend,
    ScanInputError,
    ScanUnavailableError,
    blocked,
    causal_convolution,
    selective_scan,
    tasks,
)
from reflexarc.policy.layers.selective_scan.choice import VARIABLE, make

from .scan_reference import loop_scan, relative_error, scan_inputs


@pytest.fixture(params=["blocked", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return make(request.param)
    except ScanUnavailableError as error:
        pytest.skip(error.message)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and four steps a block at 3 channels and 2 states, so that blocks do not fit."""
    monkeypatch.setattr(blocked, "CPU_STEP_VALUES", 12)
    monkeypatch.setattr(blocked, "CPU_BUFFER_VALUES", 48)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(y: Tensor, inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    return list(torch.autograd.grad(y, inputs, grad_y))


@pytest.mark.parametrize("shift", [-4.0, 2.0])  # softplus: near 0.02, and up to 5
@pytest.mark.parametrize(
    ("batch", "length", "channels", "state"),
    [(1, 1, 1, 1), (3, 17, 5, 2), (5, 101, 24, 16), (2, 11, 96, 64), (1, 395, 200, 16)],
)
def test_single_precision_against_a_loop_in_double(
    backend: Backend, batch: int, length: int, channels: int, state: int, shift: float
) -> None:
    exact = scan_inputs(batch, length, channels, state, torch.float64, shift=shift)
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    wanted = loop_scan(*exact, softplus=True)
    found = selective_scan(*single, softplus=True, backend=backend)
    assert relative_error(found, wanted) < 1e-5
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    reference = torch.autograd.grad(wanted, exact, grad_y)
    for name, gradient, exactly in zip(
        ["u", "delta", "A", "B", "C", "D", "gate"],
        torch.autograd.grad(found, single, grad_y.float()),
        reference,
        strict=True,
    ):
        assert relative_error(gradient, exactly) < 1e-4, name


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_dtype(data: st.DataObject) -> None:
    backend = make(data.draw(st.sampled_from(available())))
    dtype = data.draw(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    )
    sizes = st.tuples(*(st.integers(1, top) for top in (3, 40, 40, 20)))
    inputs = scan_inputs(*data.draw(sizes), torch.float64)
    if not data.draw(st.booleans()):
        inputs[5] = None  # type: ignore[call-overload]
    if not data.draw(st.booleans()):
        inputs[6] = None  # type: ignore[call-overload]
    given_ = [None if t is None else t.detach().to(dtype) for t in inputs]
    found = selective_scan(*given_, softplus=True, backend=backend)  # type: ignore[arg-type]
    assert found.dtype == dtype
    wanted = loop_scan(*(None if t is None else t.double() for t in given_), softplus=True)  # type: ignore[arg-type]
    # Everything inside is single precision or double: what remains is the output's rounding.
    assert relative_error(found, wanted) <= max(2 * torch.finfo(dtype).eps, 2e-6)


def available() -> list[str]:
    names = ["blocked"]
    try:
        make("native")
    except ScanUnavailableError:
        return names
    return [*names, "native"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("batch", "length"), [(1, 4), (2, 5), (3, 9), (2, 35)])
def test_gradients_are_exact_across_borders(backend: Backend, batch: int, length: int) -> None:
    inputs = scan_inputs(batch, length, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: selective_scan(*tensors, softplus=True, backend=backend),
        inputs,
        fast_mode=length > 5,
    )


def test_gradients_without_gate_weight_and_softplus(backend: Backend) -> None:
    u, raw, *rest, _, _ = scan_inputs(2, 19, 9, 3, torch.float64)
    inputs = [u, F.softplus(raw).detach().requires_grad_(), *rest]
    assert torch.autograd.gradcheck(
        lambda *tensors: selective_scan(*tensors, backend=backend), inputs, fast_mode=True
    )


def test_decay_that_underflows_stays_finite(backend: Backend) -> None:
    u, delta, A, B, C, D, gate = scan_inputs(2, 64, 8, 4, shift=50.0)
    y = selective_scan(u, delta, A * 20, B, C, D, gate, softplus=True, backend=backend)
    wanted = loop_scan(u, delta, A * 20, B, C, D, gate, softplus=True)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(y, [u, delta, A, B, C]))


def test_the_same_bits_with_and_without_gradients(backend: Backend) -> None:
    inputs = scan_inputs(3, 50, 36, 8)
    with_gradients = selective_scan(*inputs, softplus=True, backend=backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            without = selective_scan(*inputs, softplus=True, backend=backend)
        assert torch.equal(without, with_gradients)


@pytest.mark.usefixtures("threads")
def test_the_same_bits_on_any_number_of_threads(backend: Backend) -> None:
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        inputs = scan_inputs(2, 40, 150, 16)
        y = selective_scan(*inputs, softplus=True, backend=backend)
        found.append([y.detach(), *gradients(y, inputs)])
    for others in found[1:]:
        if backend.name == "native":
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
        assert torch.equal(found[0][0], others[0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("batch", "length", "channels", "state"),
    [(1, 75, 150, 16), (3, 75, 40, 8), (2, 75, 17, 3), (1, 75, 512, 16), (2, 300, 100, 2),
     (1, 515, 128, 4), (4, 395, 512, 2)],
)  # fmt: skip
def test_the_blocked_scan_is_the_same_however_its_work_is_cut(
    batch: int, length: int, channels: int, state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread takes rows or channels of its own, in blocks of other sizes.

    The longer ones do not divide by the number of threads, where torch would cut them.
    """
    backend = make("blocked")
    inputs = scan_inputs(batch, length, channels, state)

    def found() -> list[Tensor]:
        y = selective_scan(*inputs, softplus=True, backend=backend)
        with torch.inference_mode():
            detached = [tensor.detach() for tensor in inputs]
            without = selective_scan(*detached, softplus=True, backend=backend)
        assert torch.equal(y, without)
        return [y.detach(), *gradients(y, inputs)]

    torch.set_num_threads(1)
    alone = found()
    monkeypatch.setattr(blocked, "CPU_TASK_VALUES", 1)
    for number in (2, 3, 5):
        torch.set_num_threads(number)
        assert torch.equal(found()[0], alone[0])


def test_modes_of_one_call_leave_nothing_behind_for_the_next() -> None:
    """A default device, or tensors that hold no values, must not reach the kept memory."""
    backend = make("blocked")
    inputs = [tensor.detach() for tensor in scan_inputs(1, 12, 64, 4)]

    def scan(tensors: Sequence[Tensor]) -> Tensor:
        return selective_scan(*tensors, softplus=True, backend=backend)

    def scans() -> list[Tensor]:
        with torch.device("meta"):
            first = scan(inputs)
        with FakeTensorMode() as mode:
            scan([mode.from_tensor(tensor) for tensor in inputs])
        return [first, scan(inputs)]

    with ThreadPoolExecutor(1) as pool:  # a new thread keeps no memory yet
        found = pool.submit(scans).result()
    assert all(torch.equal(one, scan(inputs)) for one in found)


@pytest.mark.usefixtures("threads")
def test_without_threadpoolctl_tasks_are_small_and_bits_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(2)
    backend = make("blocked")
    inputs = [t.detach() for t in scan_inputs(1, 300, 256, 16)]
    wanted = selective_scan(*inputs, softplus=True, backend=backend)
    monkeypatch.setattr(tasks, "_openmp", lambda: ())
    assert tasks.values_on_one_thread(1 << 18) == tasks.GRAIN_VALUES
    assert torch.equal(selective_scan(*inputs, softplus=True, backend=backend), wanted)


def test_a_compiled_scan_is_right_and_refuses_a_gradient(backend: Backend) -> None:
    """Traced as it reads it was wrong, by memory that one step writes and the next one reads."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds

    inputs = scan_inputs(1, 20, 128, 4)

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors, softplus=True)

    with patch.dict(os.environ, {VARIABLE: backend.name}):
        compiled = torch.compile(scan, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), scan(*inputs))
        with pytest.raises(BackendCompilerFailed, match="a compiled scan has no gradient"):
            compiled(*inputs)


def test_memory_first_used_for_inference_serves_training(backend: Backend) -> None:
    def infer_then_train() -> list[Tensor]:
        inputs = scan_inputs(2, 30, 128, 16)
        with torch.inference_mode():
            selective_scan(*inputs, softplus=True, backend=backend)
        y = selective_scan(*inputs, softplus=True, backend=backend)
        return gradients(y, inputs)

    with ThreadPoolExecutor(1) as pool:  # a new thread keeps no memory yet
        found = pool.submit(infer_then_train).result()
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.usefixtures("threads")
def test_torch_divides_nothing_within_a_task_and_as_before_after_it() -> None:
    torch.set_num_threads(3)
    seen: list[int] = []
    tasks.run([lambda: seen.append(torch.get_num_threads())] * 3)
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 3


def test_an_error_on_one_thread_is_the_callers() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("of one thread")

    with pytest.raises(ValueError, match="of one thread"):
        tasks.run([lambda: done.append(0), fail])
    assert done == [0]
    with pytest.raises(ValueError, match="of one thread"):
        tasks.run([fail, lambda: time.sleep(0.1)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """A data loader's worker inherits the pool of its parent, but none of its threads."""
    tasks.run([lambda: None] * 3)
    process = os.fork()
    if process == 0:
        done: list[int] = []
        tasks.run([partial(done.append, number) for number in range(3)])
        os._exit(0 if sorted(done) == [0, 1, 2] else 1)
    for _ in range(300):
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    pytest.fail("the forked process waits for threads that it does not have")


def test_strided_inputs_are_accepted(backend: Backend) -> None:
    inputs = [tensor.detach() for tensor in scan_inputs(3, 20, 8, 4)]
    wanted = selective_scan(*inputs, softplus=True, backend=backend)
    time_major = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs[:2]]
    channels_first = inputs[6].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([inputs[3], inputs[4]], dim=-1)
    B, C = both.split(4, dim=-1)
    strided = [*time_major, inputs[2].t().contiguous().t(), B, C, inputs[5], channels_first]
    found = selective_scan(*strided, softplus=True, backend=backend)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_only_the_inputs_that_want_a_gradient_need_one(backend: Backend) -> None:
    u, delta, A, B, C, D, gate = (tensor.detach() for tensor in scan_inputs(2, 10, 4, 2))
    A.requires_grad_()
    arguments = (u, delta, A, B, C, D, gate)
    (found,) = gradients(selective_scan(*arguments, softplus=True, backend=backend), [A])
    (wanted,) = gradients(loop_scan(*arguments, softplus=True), [A])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_threads_do_not_share_scratch(backend: Backend) -> None:
    def forward_and_backward(seed: int) -> list[Tensor]:
        inputs = scan_inputs(4, 80, 96, 16, seed=seed)
        y = selective_scan(*inputs, softplus=True, backend=backend)
        return [y.detach(), *gradients(y, inputs)]

    alone = [forward_and_backward(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(forward_and_backward, range(6)))
    for tensors, others in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize(("batch", "length", "channels", "taps"), [(2, 9, 21, 4), (1, 2, 3, 4)])
def test_the_convolution_is_torchs(
    backend: Backend, batch: int, length: int, channels: int, taps: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    wanted = F.conv1d(
        x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=channels
    )[..., :length]  # fmt: skip
    found = causal_convolution(x, weight, bias, backend=backend)
    torch.testing.assert_close(found, F.silu(wanted).transpose(1, 2))
    with torch.no_grad():
        assert torch.equal(causal_convolution(x, weight, bias, backend=backend), found)
    assert torch.autograd.gradcheck(
        lambda *tensors: causal_convolution(*tensors, backend=backend),
        (x, weight, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("position", range(7))
def test_a_nan_is_carried_into_the_output(backend: Backend, position: int) -> None:
    inputs = [tensor.detach() for tensor in scan_inputs(1, 6, 4, 3)]
    inputs[position].view(-1)[0] = float("nan")
    y = selective_scan(*inputs, softplus=True, backend=backend)
    assert torch.isnan(y).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_when_asked_for(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFLEXARC_SCAN_CHECK", "1")
    inputs = [tensor.detach() for tensor in scan_inputs(2, 6, 4, 3)]
    selective_scan(*inputs, softplus=True)
    inputs[3][1, 2, 0] = value
    with pytest.raises(ScanInputError, match=r"B \(2, 6, 3\) holds 1 .* at \(1, 2, 0\)") as caught:
        selective_scan(*inputs, softplus=True)
    assert caught.value.field == "B"


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (6, 4), r"shape of u is \(6, 4\), it must be \(batch, length, channels\)"),
        (1, (2, 5, 4), r"shape of delta is \(2, 5, 4\), it must be \(2, 6, 4\)"),
        (2, (5, 3), r"shape of A is \(5, 3\), it must be \(channels, state\) = \(4, N\)"),
        (3, (2, 6, 4), r"shape of B is \(2, 6, 4\), it must be \(2, 6, 3\)"),
        (4, (1, 6, 3), r"shape of C is \(1, 6, 3\), it must be \(2, 6, 3\)"),
        (5, (1,), r"shape of D is \(1,\), it must be \(4,\)"),
        (6, (2, 6, 8), r"shape of gate is \(2, 6, 8\), it must be \(2, 6, 4\)"),
    ],
)
def test_a_wrong_shape_is_named(position: int, shape: tuple[int, ...], message: str) -> None:
    inputs = [tensor.detach() for tensor in scan_inputs(2, 6, 4, 3)]
    inputs[position] = torch.zeros(shape)
    with pytest.raises(ScanInputError, match=message):
        selective_scan(*inputs)


def test_integers_and_other_devices_are_refused() -> None:
    inputs = [tensor.detach() for tensor in scan_inputs(2, 6, 4, 3)]
    with pytest.raises(ScanInputError, match=r"dtype of B is torch\.int64"):
        selective_scan(*inputs[:3], inputs[3].long(), *inputs[4:])
    with pytest.raises(ScanInputError, match="device of C is meta, it must be cpu"):
        selective_scan(*inputs[:4], inputs[4].to("meta"), *inputs[5:])
