"""Which scan runs, and how the native one is built: cached, anew, several at once, not at all."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reflexarc.policy.layers.mamba import Mamba
from reflexarc.policy.layers.selective_scan import ScanUnavailableError, choice, native
from reflexarc.policy.layers.selective_scan import native_build as build

from .scan_reference import scan_inputs

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def forget_choices() -> None:
    for cached in (choice.make, choice._automatic, choice._named, native.load):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has chosen nothing yet."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    forget_choices()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget_choices()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


@needs_compiler
def test_what_was_built_is_loaded_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert choice.backend_for(CPU).name == "native"
    (kept,) = fresh.iterdir()
    assert kept == build.library_path()
    assert f"kept in {kept}" in caplog.text
    written = kept.stat().st_mtime_ns
    forget_choices()
    without_compiler(monkeypatch)
    assert choice.backend_for(CPU).name == "native"
    assert kept.stat().st_mtime_ns == written


def test_without_a_compiler_the_blocked_scan_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_compiler(monkeypatch)
    for _ in range(3):
        assert choice.backend_for(CPU).name == "blocked"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no-such-compiler" in record.getMessage()


def test_without_a_compiler_the_native_scan_is_refused_when_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_compiler(monkeypatch)
    monkeypatch.setenv(choice.VARIABLE, "native")
    with pytest.raises(ScanUnavailableError, match="is 'native', but there is no C\\+\\+ compiler"):
        Mamba(8)(torch.zeros(1, 2, 8))


def test_a_compiler_that_fails_is_named_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    fails.chmod(0o755)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(ScanUnavailableError, match="no such header"):
        build.load_library()


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_build_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # a folder without permissions would not stop root
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.INFO):
        assert choice.backend_for(CPU).name == "native"
    assert "for this process alone" in caplog.text


@needs_compiler
def test_a_library_that_was_cut_short_is_built_anew(fresh: Path) -> None:
    fresh.mkdir()
    build.library_path().write_bytes(b"\x7fELF")
    assert choice.backend_for(CPU).name == "native"
    assert build.library_path().stat().st_size > 1000


@needs_compiler
def test_several_processes_build_at_once(fresh: Path) -> None:
    # Loaded by its path: importing torch in each would take most of the time.
    code = (
        "import importlib.util, sys, types\n"
        "errors = types.ModuleType('reflexarc.policy.layers.selective_scan.errors')\n"
        "errors.ScanUnavailableError = RuntimeError\n"
        "sys.modules[errors.__name__] = errors\n"
        f"spec = importlib.util.spec_from_file_location('build', {build.__file__!r})\n"
        "build = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(build)\n"
        "print(build.load_library().vector_bytes())\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=240)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(said) == 1
    assert [path.name for path in fresh.iterdir()] == [build.library_path().name]


def test_another_source_or_processor_has_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = build.library_path()
    monkeypatch.setattr(build, "_processor", lambda: "another")
    other = build.library_path()
    changed = tmp_path / "native.cpp"
    shutil.copy(build.SOURCE, changed)
    changed.write_text(changed.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    assert len({path, other, build.library_path()}) == 3


def test_a_name_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "numba")
    wanted = "'numba', which is none of auto, blocked, native, triton, mamba_ssm"
    with pytest.raises(ScanUnavailableError, match=wanted):
        choice.backend_for(CPU)


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("mamba_ssm", "cpu", "tensors are on cpu, where these run: native, blocked"),
        ("native", "cuda", "tensors are on cuda, where these run: mamba_ssm, triton, blocked"),
        ("native", "mps", "tensors are on mps, where these run: blocked"),
    ],
)
def test_a_scan_of_another_device_is_refused(
    name: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.VARIABLE, name)
    with pytest.raises(ScanUnavailableError, match=message):
        choice.backend_for(torch.device(device))


def test_double_precision_on_an_accelerator_is_blocked() -> None:
    assert choice.backend_for(torch.device("cuda"), torch.float64).name == "blocked"


@needs_compiler
def test_backends_agree_in_a_block_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer, tokens = Mamba(64), torch.randn(2, 90, 64)
    found = []
    for name in ("blocked", "native"):
        monkeypatch.setenv(choice.VARIABLE, name)
        mixer.zero_grad()
        y = mixer(tokens)
        y.square().mean().backward()
        found.append(
            [y.detach(), *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "native.cpp"
    source = build.SOURCE.read_text()
    assert source.count("h[n] = power_of_two(d * A[n]) * h[n] + du * B[n];") == 1
    wrong.write_text(source.replace("* h[n] + du * B[n];", "* h[n] - du * B[n];"))
    monkeypatch.setattr(build, "SOURCE", wrong)
    assert choice.backend_for(CPU).name == "blocked"
    monkeypatch.setenv(choice.VARIABLE, "native")
    with pytest.raises(ScanUnavailableError, match="gives wrong results"):
        choice.backend_for(CPU)


def test_parity_with_transformers_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=64, state_size=16, expand=2, conv_kernel=4, num_hidden_layers=1
    )
    reference = MambaMixer(config, 0).double().eval()
    mixer = Mamba(64).double()
    mixer.load_state_dict(reference.state_dict())
    tokens = torch.randn(2, 70, 64, dtype=torch.float64)
    for name in ("blocked", "native") if build.compiler() else ("blocked",):
        monkeypatch.setenv(choice.VARIABLE, name)
        with torch.no_grad():
            torch.testing.assert_close(mixer(tokens), reference(tokens), atol=1e-6, rtol=0)
            single = Mamba(64)
            single.load_state_dict(reference.float().state_dict())
            wanted = mixer(tokens).float()
            torch.testing.assert_close(single(tokens.float()), wanted, atol=1e-6, rtol=0)
            reference.double()


def test_the_first_scan_of_a_shape_equals_the_second() -> None:
    inputs = [tensor.detach() for tensor in scan_inputs(2, 30, 40, 16)]
    backend = choice.backend_for(CPU)
    first, second = (backend.scan(*inputs, True) for _ in range(2))
    assert torch.equal(first, second)
