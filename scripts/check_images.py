"""Builds both images without Docker: every line of the Dockerfiles in a clean Debian root.

    python scripts/check_images.py --root CLEAN_DEBIAN --work FOLDER [--side server] [--serve]

Needs root, for ``chroot``, ``mount`` and ``setpriv``. Without ``--root`` debootstrap makes one.
RUN, COPY, ENV, WORKDIR and ARG are executed as written, each stage in its own copy of the root;
what an image must and must not hold is asserted then. With ``--serve`` the two processes run with
the images' users, environments, entry points and health check, on read-only roots, the
simulator's client once the server is healthy. What is not imitated: layers, registries, the NVIDIA
runtime, container networks. Prints a table of all lines as markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = (
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER",
    "WORKDIR",
)  # fmt: skip
USER = 10001


@dataclass(frozen=True)
class Line:
    """One instruction of a Dockerfile, continued lines joined."""

    number: int
    instruction: str
    argument: str


@dataclass
class Image:
    """What a stage has become.

    Attributes:
        root: of its files.
        environment: of its processes.
    """

    root: Path
    environment: dict[str, str]
    folder: str = "/"
    user: int = 0
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def parse(dockerfile: Path) -> list[Line]:
    """The instructions of a Dockerfile. ValueError for one that is not understood here."""
    lines: list[Line] = []
    text, begin = "", 0
    for number, raw in enumerate(dockerfile.read_text().splitlines(), 1):
        if not text and (not raw.strip() or raw.lstrip().startswith("#")):
            continue
        begin = begin or number
        text += raw.rstrip().removesuffix("\\").strip() + " "
        if raw.rstrip().endswith("\\"):
            continue
        instruction, _, argument = text.strip().partition(" ")
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"{dockerfile}:{begin}: {instruction} is not understood")
        lines.append(Line(begin, instruction, argument.strip()))
        text, begin = "", 0
    return lines


def substituted(text: str, values: Mapping[str, str]) -> str:
    """``${NAME}`` and ``${NAME:-default}`` as Docker substitutes them."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: values.get(m[1]) or m[2] or "", text)


class Builder:
    """Builds one Dockerfile.

    Args:
        dockerfile: to build.
        clean: the root that stands for every base image.
        work: where stages are made.
        arguments: ``--build-arg``.
        outside: environment of RUN lines that is not the image's: proxies, certificates.
        binds: host folders that RUN lines see too.
    """

    def __init__(
        self,
        dockerfile: Path,
        clean: Path,
        work: Path,
        arguments: Mapping[str, str],
        outside: Mapping[str, str],
        binds: list[Path],
    ) -> None:
        self.dockerfile, self._clean, self._work = dockerfile, clean, work
        self._arguments, self._outside, self._binds = dict(arguments), dict(outside), binds
        self.stages: dict[str, Image] = {}
        self.table: list[tuple[int, str, str]] = []
        self._skip = False

    def build(self, *, skip: bool = False) -> Image:
        """The last stage. ``skip``: its files are there already, from an earlier call."""
        self._skip = skip
        image: Image | None = None
        known: dict[str, str] = {}
        for line in parse(self.dockerfile):
            began = time.monotonic()
            if line.instruction == "FROM":
                image, known = self._begin(line)
                done = f"a copy of the clean root in the place of {line.argument.split()[0]}"
            elif line.instruction == "ARG":
                name, _, default = line.argument.partition("=")
                known[name] = self._arguments.get(name, default)
                done = f"set to {known[name]!r}"
            else:
                assert image is not None
                done = self._execute(line, image, known)
            seconds = time.monotonic() - began
            said = f"{done} ({seconds:.0f} s)" if seconds >= 1 else done
            self.table.append((line.number, f"{line.instruction} {line.argument}", said))
            print(f"{self.dockerfile.name}:{line.number} {line.instruction}: {said}", flush=True)
        assert image is not None
        return image

    def _begin(self, line: Line) -> tuple[Image, dict[str, str]]:
        words = line.argument.split()
        name = words[2] if len(words) == 3 else "final"
        folder = self._work / f"{self.dockerfile.stem}-{name}"
        if not self._skip:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["cp", "--archive", "--reflink=auto", self._clean, folder], check=True)
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        image = Image(folder, {"PATH": path})
        self.stages[name] = image
        return image, {}

    def _execute(self, line: Line, image: Image, known: Mapping[str, str]) -> str:
        values = {**known, **image.environment}
        argument = line.argument
        if self._skip and line.instruction in ("RUN", "COPY"):
            return "done by an earlier call"
        if line.instruction == "RUN":
            environment = {"HOME": "/root", **self._outside, **known, **image.environment}
            with mounted(image.root, self._binds):
                inside(image.root, ["/bin/sh", "-c", argument], environment, folder=image.folder)
            return "executed, status 0"
        if line.instruction == "COPY":
            return self._copy(argument, image)
        if line.instruction == "ENV":
            for pair in shlex.split(argument):
                name, _, value = pair.partition("=")
                image.environment[name] = substituted(value, values)
            return "set, and used by all that follows"
        if line.instruction == "WORKDIR":
            image.folder = argument
            (image.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return "made"
        if line.instruction == "USER":
            image.user = int(argument.split(":")[0])
            return "used by the processes of --serve"
        if line.instruction == "HEALTHCHECK":
            found = argument.partition("CMD ")[2]
            image.health = json.loads(found) if found else []
            return "asked by --serve" if found else "none"
        if line.instruction in ("ENTRYPOINT", "CMD"):
            words = json.loads(argument)
            if line.instruction == "ENTRYPOINT":
                image.entrypoint = words
            else:
                image.command = words
            return "started by --serve"
        return "not imitated: there is no container network"

    def _copy(self, argument: str, image: Image) -> str:
        words = argument.split()
        source = ROOT
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).removeprefix("--from=")].root
        *names, target = words
        into = target if target.startswith("/") else f"{image.folder}/{target}"
        place = image.root / into.lstrip("/")
        for name in names:
            found = source / name.lstrip("/")
            if found.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, place, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                directory = target.endswith("/") or len(names) > 1
                file = place / found.name if directory else place
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, file)
        return "copied"


@contextmanager
def mounted(root: Path, binds: list[Path]) -> Iterator[None]:
    """``/proc``, ``/dev``, ``/sys`` and host folders in a root, while it lasts."""
    made: list[Path] = []
    try:
        for source in (Path("/proc"), Path("/dev"), Path("/sys"), *binds):
            place = root / str(source).lstrip("/")
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            subprocess.run(["mount", "--rbind", source, place], check=True)
            made.append(place)
            subprocess.run(["mount", "--make-rslave", place], check=True)
            if source in binds:  # a package's script must not write into the host
                subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        shutil.copy2("/etc/resolv.conf", root / "etc/resolv.conf")
        shutil.copy2("/etc/hosts", root / "etc/hosts")
        yield
    finally:
        for place in reversed(made):
            subprocess.run(["umount", "--recursive", "--lazy", place], check=False)


def inside(
    root: Path, command: list[str], environment: Mapping[str, str], *, folder: str = "/"
) -> None:
    """Run a command in a root as its root user."""
    cd = f"cd {shlex.quote(folder)} && exec {shlex.join(command)}"
    subprocess.run(["chroot", root, "/bin/sh", "-c", cd], env=dict(environment), check=True)


def assert_contents(side: str, image: Image) -> list[str]:
    """What must and must not be in an image. Raises SystemExit."""
    site = next((image.root / "opt/reflexarc/lib").glob("python3*/site-packages"))
    present = {path.name.lower() for path in site.iterdir()}
    wanted = {
        "server": (("reflexarc", "torch", "fastapi", "uvicorn"), ("mujoco", "robosuite", "libero")),
        "sim": (
            ("reflexarc", "mujoco", "robosuite", "libero"),
            ("torch", "fastapi", "transformers"),
        ),
    }[side]
    for name in wanted[0]:
        if name not in present:
            raise SystemExit(f"the image {side} lacks {name}")
    for name in wanted[1]:
        if name in present:
            raise SystemExit(f"the image {side} holds {name}")
    if any((image.root / "src").rglob("*")):
        raise SystemExit(f"the image {side} holds sources of its build")
    setuid = sorted(
        str(path.relative_to(image.root))
        for path in (image.root / "opt").rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o6000
    )
    if setuid:
        raise SystemExit(f"the image {side} holds setuid files: {setuid}")
    megabytes = subprocess.run(
        ["du", "-sm", image.root], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    held = f"holds {', '.join(wanted[0])}; none of {', '.join(wanted[1])}; no sources, no setuid"
    return [held, f"{megabytes} MB in all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="a clean Debian root; debootstrap without it")
    parser.add_argument("--work", type=Path, required=True, help="several GB are written here")
    parser.add_argument("--side", choices=("server", "sim", "both"), default="both")
    parser.add_argument("--bind", type=Path, action="append", default=[], metavar="PATH",
                        help="a host folder or file that RUN lines may read")  # fmt: skip
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                        help="environment of RUN lines alone, such as a proxy")  # fmt: skip
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--serve", action="store_true", help="also run both, health-gated")
    parser.add_argument("--no-build", action="store_true", help="take what stands in --work")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("chroot and mount need root")
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    clean = options.root or bootstrapped(work / "clean")
    images: dict[str, Image] = {}
    for side in ("server", "sim") if options.side == "both" else (options.side,):
        file = ROOT / "docker" / f"{side}.Dockerfile"
        arguments = dict(pair.split("=", 1) for pair in options.build_arg)
        outside = dict(pair.split("=", 1) for pair in options.env)
        builder = Builder(file, clean.resolve(), work, arguments, outside, options.bind)
        images[side] = builder.build(skip=options.no_build)
        contents = assert_contents(side, images[side])
        print(f"\n| {file.name} | what was done |\n|---|---|")
        for number, text, done in builder.table:
            print(f"| {number} `{text[:60]}` | {done} |")
        print(f"| contents | {'; '.join(contents)} |\n", flush=True)
    if options.serve:
        from check_images_run import run_both

        run_both(images["server"], images["sim"], work)


def bootstrapped(folder: Path) -> Path:
    """A clean Debian 12, made once."""
    if not (folder / "etc/debian_version").exists():
        command = ["debootstrap", "--variant=minbase", "bookworm", folder]
        subprocess.run([*command, "http://deb.debian.org/debian"], check=True)
    return folder


if __name__ == "__main__":
    main()
