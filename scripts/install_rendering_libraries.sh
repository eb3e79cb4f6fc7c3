#!/usr/bin/env bash
# Shared libraries that pip cannot bring: MuJoCo renders LIBERO without a screen through EGL or
# OSMesa, and the OpenCV that robosuite imports needs GLib.
set -euo pipefail

packages=(libosmesa6 libegl1 libgl1-mesa-dri libgl1 libgles2 libglib2.0-0)
[ "$(uname -s)" = Linux ] || exit 0

# ldconfig lives in /sbin, which is not on every user's PATH. Its list is read once, whole: under
# pipefail a grep that leaves at the first match would fail the pipe now and then.
installed() { "$(command -v ldconfig || echo /sbin/ldconfig)" -p 2>/dev/null || true; }
libraries=$(installed)
present() { [[ $libraries == *"$1"* ]]; }
# Mesa's EGL renders as well as OSMesa, which new distributions no longer have.
if present libEGL.so && present libGL.so && present libgthread-2.0.so &&
  { present libOSMesa.so || present libEGL_mesa.so; }; then
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  echo "Headless rendering needs OSMesa or EGL. Install with your package manager what Debian calls: ${packages[*]}" >&2
  exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "Headless rendering needs system libraries. Run this once, then make again:" >&2
  echo "  sudo apt-get update && sudo apt-get install -y ${packages[*]}" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
available=()
# libglib2.0-0t64: its name since Debian 13 and Ubuntu 24.04.
for package in "${packages[@]}" libglib2.0-0t64; do
  if apt-cache show "$package" >/dev/null 2>&1; then available+=("$package"); fi
done
apt-get install -y -qq "${available[@]}" >/dev/null
