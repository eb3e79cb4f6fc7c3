# The simulator's side: LIBERO, MuJoCo and the libraries that it renders with; no torch.
#
#   docker build -f docker/sim.Dockerfile -t reflexarc-sim .
#
# scripts/check_images.py runs every RUN line of this file in a clean Debian root.
ARG BASE_IMAGE=debian:12.11-slim

FROM ${BASE_IMAGE} AS build
# sim,ray for actors of a Ray cluster (reflexarc eval libero --ray).
ARG EXTRAS=sim
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/reflexarc
ENV PATH=/opt/reflexarc/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY docker/constraints-sim.txt docker/
COPY pyproject.toml README.md LICENSE ./
COPY contract contract
COPY client client
COPY data data
COPY policy policy
COPY training training
COPY server server
COPY eval eval
COPY cli cli
RUN pip install --constraint docker/constraints-sim.txt ".[${EXTRAS}]"

FROM ${BASE_IMAGE}
# EGL renders on a GPU and, through Mesa, without one; OSMesa is what is left where EGL fails.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends python3 libegl1 libgl1 libgl1-mesa-dri \
    libgles2 libglib2.0-0 libosmesa6 \
  && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 reflexarc \
  && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp \
    --shell /usr/sbin/nologin reflexarc
# A named volume that is mounted there first takes over its owner.
RUN install --directory --owner 10001 --group 10001 /results
COPY --from=build /opt/reflexarc /opt/reflexarc
ENV PATH=/opt/reflexarc/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
  MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba \
  NVIDIA_DRIVER_CAPABILITIES=graphics,utility
USER 10001:10001
WORKDIR /tmp
# A job, not a service: it ends by itself, with a status that says how.
HEALTHCHECK NONE
ENTRYPOINT ["reflexarc"]
CMD ["eval", "libero", "--server", "ws://policy:8000", "--output", "/results/eval"]
