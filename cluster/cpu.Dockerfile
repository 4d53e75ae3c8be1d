# Ray's own image, with the packages of the CPU lock and rdpo:
#   docker build -f cluster/cpu.Dockerfile -t REGISTRY/rdpo:cpu .
FROM rayproject/ray:2.60.0-py311-cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /home/ray/rdpo

# torch's CPU build comes from its own index; everything else is pinned and asks for nothing more.
COPY --chown=ray:users cluster/locks/cpu.lock cluster/locks/cpu.lock
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu \
    && pip install --no-cache-dir --no-deps -r cluster/locks/cpu.lock

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users rdpo rdpo
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir --no-deps .
