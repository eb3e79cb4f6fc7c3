"""torch, CUDA, the driver and the devices: whether they fit each other."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

from reflexarc.cli.diagnosis.finding import Finding, ask_python
from reflexarc.cli.diagnosis.scans import judge_scans

_TIMEOUT = 120.0
_ASK = """
import json, warnings
found = {}
try:
    import torch
    found.update(version=torch.__version__, built_for=torch.version.cuda, devices=[],
                 hip=torch.version.hip, mps=torch.backends.mps.is_available())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["available"] = torch.cuda.is_available()
        found["count"] = torch.cuda.device_count()
    found["warning"] = " ".join(str(w.message).split("(Triggered")[0].strip() for w in caught)
    for number in range(found["count"] if found["available"] else 0):
        one = {"name": torch.cuda.get_device_name(number),
               "capability": "%d.%d" % torch.cuda.get_device_capability(number)}
        try:
            x = torch.ones(64, 64, device=f"cuda:{number}")
            one["computes"] = bool((x @ x).sum().item() == 64**3)
            free, total = torch.cuda.mem_get_info(number)
            one.update(free=free, total=total)
        except Exception as error:
            one["error"] = str(error).splitlines()[0]
        found["devices"].append(one)
    try:
        import mamba_ssm
        found["mamba"] = getattr(mamba_ssm, "__version__", "?")
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ModuleNotFoundError as error:
        found["mamba_error" if "mamba" in found else "mamba_absent"] = str(error)
    except Exception as error:
        found["mamba"] = found.get("mamba", "installed")
        found["mamba_error"] = f"{type(error).__name__}: {error}"
    try:
        from reflexarc.policy.layers.selective_scan.choice import report
        kinds = ["cpu", "cuda"] if found["devices"] else ["cpu"]
        found["scans"] = {kind: report(kind) for kind in kinds}
    except Exception as error:
        found["scans"] = {"cpu": {"error": f"{type(error).__name__}: {error}"}}
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
_CUDA_BUILD = "install the build of torch for your CUDA: see pytorch.org, 'Start locally'"


def check_accelerator() -> list[Finding]:
    """Findings on torch, its devices and mamba-ssm; torch is imported by another process."""
    if find_spec("torch") is None:
        return [Finding("torch", "note", "not installed; serving and training need it")]
    return judge_torch(ask_python(_ASK, _TIMEOUT), _driver())


def judge_torch(found: dict[str, Any], driver: str | None) -> list[Finding]:
    """What the answers of torch and of the driver mean.

    Args:
        found: of the script above, or ``{"error": ...}``.
        driver: version and device as nvidia-smi tells them; None where there is none.
    """
    if "error" in found:
        mend = "install it anew: pip install --force-reinstall torch"
        said = f"cannot be imported: {found['error']}"
        return [Finding("torch", "broken", said, mend, ("serve", "train"))]
    kinds = {"built_for": "CUDA", "hip": "ROCm"}
    built = next((f"{kind} {found[key]}" for key, kind in kinds.items() if found.get(key)), None)
    said = f"{found['version']}, built for {built or 'the CPU alone'}"
    if found.get("mps"):
        said += ", MPS"
    findings: list[Finding] = []
    if built is None and driver is not None:
        findings.append(Finding("torch", "note", f"{said}, but there is {driver}", _CUDA_BUILD))
    elif built is not None and not found["available"] and driver is not None:
        why = found.get("warning") or "torch finds no device"
        mend = f"update the NVIDIA driver, or {_CUDA_BUILD}"
        said = f"{said}; driver {driver}: {why}"
        findings.append(Finding("torch", "broken", said, mend, ("serve", "train")))
    else:
        findings.append(Finding("torch", "ok", said + (f"; driver {driver}" if driver else "")))
    findings += [_device(number, one) for number, one in enumerate(found["devices"])]
    return findings + _mamba(found) + judge_scans(found.get("scans", {}))


def _device(number: int, one: dict[str, Any]) -> Finding:
    name = f"device cuda:{number}"
    said = f"{one['name']}, capability {one['capability']}"
    if one.get("error") or not one.get("computes"):
        why = one.get("error", "a product of ones came out wrong")
        return Finding(name, "broken", f"{said}: {why}", _CUDA_BUILD, ("serve", "train"))
    said += f", {one['free'] / 2**30:.1f} of {one['total'] / 2**30:.1f} GiB free"
    if one["free"] < 2**30:
        return Finding(name, "note", said, "end what else holds its memory: see nvidia-smi")
    return Finding(name, "ok", said)


def _mamba(found: dict[str, Any]) -> list[Finding]:
    """mamba-ssm speeds up the scan on CUDA; without it another one gives the same results."""
    if "mamba_error" in found:
        mend = (
            "build it against this torch: pip install --no-build-isolation --force-reinstall "
            "mamba-ssm causal-conv1d; until then another scan is used"
        )
        said = f"{found.get('mamba')}, its kernels cannot be imported: {found['mamba_error']}"
        return [Finding("mamba-ssm", "note", said[:400], mend)]
    if "mamba" in found:
        return [Finding("mamba-ssm", "ok", f"{found['mamba']}, kernels import")]
    if found["devices"]:
        mend = "to use it: pip install --no-build-isolation mamba-ssm causal-conv1d"
        return [Finding("mamba-ssm", "note", "not installed; another scan is used", mend)]
    return [Finding("mamba-ssm", "ok", "not installed, and without CUDA not used")]


def _driver() -> str | None:
    """Version of the NVIDIA driver and the first device, as nvidia-smi tells them."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"],
            check=False, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
