# syntax=docker/dockerfile:1
# nemo_brain inside an NGC NeMo container, whose torch and Transformer Engine stay as they are; so do NeMo and Megatron-core
# in 26.02, the one image that holds versions that nemo_brain runs with. Over those of 25.11 it needs others:
#
#     docker build -t nemo_brain .
#     docker build -t nemo_brain --build-arg NEMO_TAG=25.11 \
#         --build-arg HOST_PACKAGES="nemo_toolkit==2.7.3 megatron-core==0.15.3" .
#
#     docker run --rm nemo_brain                                                   # the configuration and its help
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/workspace/nemo_brain/runs" nemo_brain \
#         torchrun --nproc-per-node 8 examples/megatron_brain.py trainer.precision=bf16-mixed
#
# This file has been linted, not built: see docs/host.md.
ARG NEMO_TAG=26.02
FROM nvcr.io/nvidia/nemo:${NEMO_TAG}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="nemo_brain" \
      org.opencontainers.image.description="BRAIn for Megatron GPT models in NeMo" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# Any user may run the container (docker run --user, Slurm's container plugins): what is written to is open to all.
ENV HOME=/home/brain \
    PYTHONUNBUFFERED=1
RUN useradd --no-log-init --create-home --home-dir /home/brain --uid 10001 brain \
    && install -d -o brain -m 1777 /workspace/nemo_brain /workspace/nemo_brain/runs \
    && chmod 1777 /home/brain

# Exact versions of NeMo and Megatron-core to put over the image's. Empty: the image's own stay.
ARG HOST_PACKAGES=""
# hadolint ignore=DL3013,SC2086
RUN if [ -n "${HOST_PACKAGES}" ]; then python -m pip install --no-cache-dir --no-deps ${HOST_PACKAGES}; fi

WORKDIR /workspace/nemo_brain
COPY . .

# Without dependencies, so that no package of the container is replaced. gguf is the one that the container lacks.
# pip then says what else is missing, which ends the build, and which versions differ from the ranges in setup.py, which
# does not.
RUN python -m pip install --no-cache-dir --no-deps gguf==0.19.0 . \
    && rm -rf build nemo_brain.egg-info \
    && { python -m pip check | grep -i '^nemo.brain ' > /tmp/requirements || true; } \
    && cat /tmp/requirements \
    && ! grep 'not installed' /tmp/requirements \
    && rm /tmp/requirements

# What Python really imports, printed with its files. The build ends where that is not the host which was asked for,
# cannot work, or comes from other files than the installed ones (/opt/NeMo, /opt/Megatron-LM).
# hadolint ignore=SC2086
RUN python -m nemo_brain.host.versions ${HOST_PACKAGES:-nemo_toolkit==2.7.* megatron-core==0.16.*}

USER 10001
CMD ["python", "examples/megatron_brain.py", "--help"]
