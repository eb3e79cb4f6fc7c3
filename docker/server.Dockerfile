# The policy server: torch and the policy families, no simulator.
#
#   docker build -f docker/server.Dockerfile -t reflexarc-server .                         # GPU
#   docker build -f docker/server.Dockerfile -t reflexarc-server:cpu \
#     --build-arg BASE_IMAGE=debian:12.11-slim --build-arg TORCH_INDEX_URL=... .           # CPU
#
# torch's wheels bring their own CUDA libraries; the base adds what asks the host for its driver.
# scripts/check_images.py runs every RUN line of this file in a clean Debian root.
ARG BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04

FROM ${BASE_IMAGE} AS build
ARG EXTRAS=server,demo
# Of torch alone; empty takes pip's own. docs/deploy.md names the one with the CPU builds.
ARG TORCH_INDEX_URL=
# Debian 12 has Python 3.11, Ubuntu 24.04 has 3.12. Versions are the release's: its mirrors drop
# a package's older builds, so one that is named exactly cannot be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/reflexarc
ENV PATH=/opt/reflexarc/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY docker/constraints-server.txt docker/
RUN pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} \
  --constraint docker/constraints-server.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY contract contract
COPY client client
COPY data data
COPY policy policy
COPY training training
COPY server server
COPY eval eval
COPY cli cli
RUN pip install --constraint docker/constraints-server.txt ".[${EXTRAS}]"

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends python3 \
  && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 reflexarc \
  && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp \
    --shell /usr/sbin/nologin reflexarc
COPY --from=build /opt/reflexarc /opt/reflexarc
COPY docker/healthcheck.py /usr/local/lib/reflexarc/healthcheck.py
# Nothing is written beside the code: the root is read-only in compose.yaml, /tmp is in memory.
ENV PATH=/opt/reflexarc/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
  NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# The start period is what a large checkpoint may take to load and to warm up.
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=3 \
  CMD ["python3", "-I", "/usr/local/lib/reflexarc/healthcheck.py"]
ENTRYPOINT ["serve-policy"]
CMD ["--ckpt", "/checkpoint", "--host", "0.0.0.0", "--port", "8000", "--log-format", "json"]
