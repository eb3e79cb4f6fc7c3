"""Which code scans Mamba's tokens on this machine, and what would be faster."""

from __future__ import annotations

from typing import Any, Literal

from reflexarc.cli.diagnosis.finding import Finding

_MENDS = {
    "native": "install a C++ compiler (Debian, Ubuntu: apt install g++); see docs/mamba.md",
    "triton": "pip install triton; see docs/mamba.md",
}


def judge_scans(scans: dict[str, dict[str, Any]]) -> list[Finding]:
    """One finding for each kind of device.

    Args:
        scans: device to what ``selective_scan.choice.report`` says of it.
    """
    # REFLEXARC_SCAN may name a scan of one device where there are two.
    runs_somewhere = any("error" not in found for found in scans.values())
    return [_judge(device, found, runs_somewhere) for device, found in scans.items()]


def _judge(device: str, found: dict[str, Any], runs_elsewhere: bool) -> Finding:
    title, why_not = f"scan on {device}", found.get("why_not", {})
    if "error" in found:
        said, mend = str(found["error"])[:400], "unset REFLEXARC_SCAN, or see docs/mamba.md"
        status: Literal["note", "broken"] = "note" if runs_elsewhere else "broken"
        return Finding(title, status, said, mend, ("serve", "train"))
    name = found["name"]
    missing = [faster for faster in ("triton", "native") if faster in why_not]
    if name == "blocked" and missing:
        said = f"blocked, the slow one: {'; '.join(why_not[one] for one in missing)}"
        return Finding(title, "note", said[:400], _MENDS[missing[0]])
    return Finding(title, "ok", str(name))
