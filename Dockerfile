# sts-fast on the CPU:
#   docker build -t sts-fast .
#   docker run --rm -v "$PWD:/data" -v "$HOME/.cache/huggingface:/hf" sts-fast score --model M --sae S ...
FROM python:3.12-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY constraints.txt /
COPY --from=build /wheels /wheels
# torch without CUDA comes from its own index.
RUN pip install --no-cache-dir -c /constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    "$(echo /wheels/*.whl)[all]" && rm -r /wheels
ENV HF_HOME=/hf
WORKDIR /data
ENTRYPOINT ["sts-fast"]
