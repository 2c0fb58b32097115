# A GPU node's image: the checkout with everything installed, and nothing trained in it.
#
#     docker build -t nanochat-jax .
#     docker run --gpus all --shm-size 16g -v /data/runs:/nanochat/runs nanochat-jax \
#         run_speedrun.py --config configs/d24.yaml --mesh configs/mesh/h100_x8.yaml
#     docker run -v /data/runs:/nanochat/runs -p 8000:8000 nanochat-jax -m server --run-dir runs/d24 --host 0.0.0.0
#
# CUDA's libraries come with the gpu extra; the host needs its driver and the NVIDIA container toolkit. Runs and their
# cache lie in the volume, so that a container that is stopped resumes in the next one. The sandbox for programs that
# a model wrote wants --security-opt seccomp=unconfined --security-opt apparmor=unconfined, or a host that lets
# containers make user namespaces; without them the log says what is missing.
FROM python:3.12-bookworm

RUN pip install --no-cache-dir uv
WORKDIR /nanochat
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
# the dependencies by themselves: a change of the code does not install them again
COPY pyproject.toml README.md ./
RUN uv sync --no-dev --extra gpu
COPY . .

VOLUME /nanochat/runs
EXPOSE 8000
ENTRYPOINT ["uv", "run", "--no-sync", "python"]
CMD ["run_speedrun.py"]
