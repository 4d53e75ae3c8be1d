# Ray's own image, with the packages of the GPU lock and rdpo:
#   docker build -f cluster/gpu.Dockerfile -t REGISTRY/rdpo:gpu .
FROM rayproject/ray:2.60.0-py311-gpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /home/ray/rdpo

COPY --chown=ray:users cluster/locks/gpu.lock cluster/locks/gpu.lock
RUN pip install --no-cache-dir --no-deps -r cluster/locks/gpu.lock

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users rdpo rdpo
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir --no-deps .
