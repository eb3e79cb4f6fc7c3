"""The two images' processes as docker compose would start them; see check_images.py."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml
from check_images import ROOT, USER, Image, substituted

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
START_SECONDS = 600.0
SETTINGS = {
    "REFLEXARC_TASKS": "0",
    "REFLEXARC_TRIALS": "1",
    "REFLEXARC_BASELINES": "none",
}


def run_both(server: Image, sim: Image, work: Path) -> None:
    """Server, health check, client, orderly end; then what must be refused."""
    enter_network_of_their_own()
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    secret = make_secrets(work / "secrets")
    checkpoint = work / "checkpoint"
    shutil.copytree(ROOT / "checkpoints/demo", checkpoint, dirs_exist_ok=True)
    say = Table()
    refuse(server, compose, secret, checkpoint, say)
    command = words(compose["server-cpu"]["command"])
    process = start(
        server, command, {checkpoint: "/checkpoint", secret / "api_keys": "/run/secrets/api_keys"}
    )
    try:
        say("health check passes", wait_until_healthy(server, process))
        read_only(server, process, say)
        began = time.monotonic()
        results = work / "results"
        results.mkdir(exist_ok=True)
        owner = (sim.root / "results").stat()  # as a new volume takes it over
        os.chown(results, owner.st_uid, owner.st_gid)
        client = start(
            sim,
            words(compose["eval"]["command"]),
            {secret / "api_key": "/run/secrets/api_key"},
            environment={"REFLEXARC_API_KEY_FILE": "/run/secrets/api_key"},
            writable={results: "/results"},
        )
        status = client.wait(1200)
        rows = (results / "eval/results.jsonl").read_text().splitlines() if status == 0 else []
        say(
            "eval, as user 10001, read-only root",
            f"status {status}, {len(rows)} episode(s), {time.monotonic() - began:.0f} s",
        )
        if status or len(rows) != 1:
            raise SystemExit("the client failed")
    finally:
        os.kill(process.pid, signal.SIGTERM)
        status = process.wait(60)
    say("SIGTERM", f"status {status}")
    say.show()
    if status:
        raise SystemExit("the server did not end in order")


def refuse(
    server: Image, compose: dict[str, Any], secret: Path, checkpoint: Path, say: Table
) -> None:
    """Bad inputs of a container, each a named error and status 2."""
    keys = {secret / "api_keys": "/run/secrets/api_keys"}
    closed = checkpoint.with_name("closed")
    shutil.copytree(checkpoint, closed, dirs_exist_ok=True)
    closed.chmod(0o700)
    hidden = secret.with_name("hidden_keys")
    hidden.write_text((secret / "api_keys").read_text())
    hidden.chmod(0o600)
    cpu, gpu = (words(compose[name]["command"]) for name in ("server-cpu", "server"))
    holder = socket.create_server(("0.0.0.0", 8000))
    demo = {checkpoint: "/checkpoint"}
    cases = (
        ("profile server without a GPU", gpu, {**demo, **keys}, "config"),
        ("a checkpoint closed to user 10001", cpu, {closed: "/checkpoint", **keys}, "checkpoint"),
        ("no checkpoint", cpu, keys, "checkpoint"),
        ("a secret closed to user 10001", cpu, {**demo, hidden: "/run/secrets/api_keys"}, "config"),
        ("port in use", cpu, {**demo, **keys}, "config"),
    )
    for name, command, mounts, wanted in cases:
        process = start(server, command, mounts, piped=True)
        _, errors = process.communicate(timeout=300)
        line = next((text for text in errors.splitlines() if "error [" in text), errors[-300:])
        say(name, f"status {process.returncode}: `{line[:160]}`")
        if process.returncode != 2 or f"error [{wanted}]" not in errors or "Traceback" in errors:
            raise SystemExit(f"{name}: {errors}")
    holder.close()


def start(
    image: Image,
    command: list[str],
    mounts: dict[Path, str],
    *,
    environment: dict[str, str] | None = None,
    writable: dict[Path, str] | None = None,
    piped: bool = False,
) -> subprocess.Popen[str]:
    """The entry point with ``command``, as the image's user, in a read-only root with its /tmp."""
    root, folder = image.root, image.folder
    steps = [f"mount --bind {root} {root}"]
    for source, target in {**mounts, **(writable or {})}.items():
        place = root / target.lstrip("/")
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    if not any(target == "/checkpoint" for target in mounts.values()):
        shutil.rmtree(root / "checkpoint", ignore_errors=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost policy\n")
    steps += [f"mount -o remount,bind,ro {root}", f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"]
    steps += [
        f"mount --bind {s} {root}{t} && mount -o remount,bind,ro {root}{t}"
        for s, t in mounts.items()
    ]
    steps += [f"mount --bind {s} {root}{t}" for s, t in (writable or {}).items()]
    steps += [
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
        f"mount --rbind /sys {root}/sys",
    ]
    values = {**image.environment, **(environment or {})}
    inner = [f"cd {folder}", f"exec {shlex.join([*image.entrypoint, *command])}"]
    steps.append(
        f"exec chroot --userspec={image.user}:{image.user} --groups= {root} setpriv --no-new-privs "
        f"env -i {shlex.join(f'{k}={v}' for k, v in values.items())} "
        f"/bin/sh -c {shlex.quote(' && '.join(inner))}"
    )
    pipe = subprocess.PIPE if piped else None
    return subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-e", "-c", "\n".join(steps)],
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def within(
    process: subprocess.Popen[str], image: Image, command: list[str]
) -> subprocess.CompletedProcess[str]:
    """``docker exec``: in the root and with the user of a process that runs."""
    values = shlex.join(f"{k}={v}" for k, v in image.environment.items())
    line = f"cd {image.folder} && exec {shlex.join(command)}"
    inner = f"exec env -i {values} /bin/sh -c {shlex.quote(line)}"
    enter = ["nsenter", f"--mount=/proc/{process.pid}/ns/mnt"]
    user = ["chroot", f"--userspec={image.user}:{image.user}", str(image.root)]
    return subprocess.run(
        [*enter, *user, "/bin/sh", "-c", inner], capture_output=True, text=True, check=False
    )


def wait_until_healthy(image: Image, process: subprocess.Popen[str]) -> str:
    began = time.monotonic()
    unhealthy = 0
    while time.monotonic() - began < START_SECONDS:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        asked = within(process, image, image.health)
        if asked.returncode == 0:
            seconds = time.monotonic() - began
            return (
                f"after {seconds:.0f} s, {unhealthy} times unhealthy before: {asked.stdout.strip()}"
            )
        unhealthy += 1
        time.sleep(5)
    raise SystemExit("the server did not become healthy")


def read_only(image: Image, process: subprocess.Popen[str], say: Table) -> None:
    """The root cannot be written, /tmp can; nobody is root."""
    root = within(process, image, ["touch", "/opt/reflexarc/bin/altered"])
    temporary = within(process, image, ["touch", "/tmp/written"])
    status = within(process, image, ["sh", "-c", f"grep -h ^Uid /proc/{process.pid}/status"])
    say("writing to the root", root.stderr.strip() or "possible")
    say("user of the process", " ".join(status.stdout.split()))
    if root.returncode == 0 or temporary.returncode or str(USER) not in status.stdout:
        raise SystemExit(
            f"the root is writable, /tmp is not, or the user is wrong: {status.stdout}"
        )


def words(command: list[str]) -> list[str]:
    return [substituted(word, SETTINGS) for word in command]


def make_secrets(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    key = secrets.token_urlsafe(32)
    for name in ("api_keys", "api_key"):
        (folder / name).write_text(key + "\n")
        (folder / name).chmod(0o644)
    return folder


def enter_network_of_their_own() -> None:
    """A network namespace with a loopback alone, so that port 8000 is free and nothing leaks."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up, request = 0x1, b"lo".ljust(16, b"\0")
        fcntl.ioctl(control, 0x8914, request + struct.pack("H", up) + bytes(14))  # SIOCSIFFLAGS


class Table:
    """What was seen, as markdown."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []

    def __call__(self, what: str, seen: str) -> None:
        print(f"{what}: {seen}", flush=True)
        self._rows.append((what, seen))

    def show(self) -> None:
        print("\n| run | seen |\n|---|---|")
        for what, seen in self._rows:
            print(f"| {what} | {seen} |")
