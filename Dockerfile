# The service, from a clean clone: docker build -t id-spam-service .
#
# TORCH        the build of torch that pip must choose, cpu or cuda, or else this stops before the download; any: pip's choice
# TORCH_INDEX  another package index for pip; with the CPU index that the torch web site names the image has 1.2 GB, not 5.6
# EXTRAS       int8: with what IDSPAM_DTYPE=int8 needs
# BASE         a Debian with Python 3.11; name it by digest for a build that can be repeated: docs/supply-chain.md
# VERSION      a label
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ARG TORCH=any
ARG TORCH_INDEX=
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY constraints.txt ./
COPY requirements requirements
COPY .ci/setup.py .ci/sbom.py .ci/
# Every package must have a sha256 of requirements/*.txt. Then lists them as a CycloneDX document, and removes pip and what only tests
# and builds of torch extensions need.
RUN TORCH=${TORCH} PIP_EXTRA_INDEX_URL=${TORCH_INDEX} python .ci/setup.py /opt/venv serve ${EXTRAS} \
 && python .ci/sbom.py /opt/venv /opt/sbom.cdx.json \
 && cd /opt/venv/lib/python3*/site-packages \
 && find torch/bin -type f ! -name torch_shm_manager -delete && rm -rf torch/include torch/share torch/test \
 && find sympy networkx -type d -name tests -prune -exec rm -rf {} + \
 && /opt/venv/bin/python -m pip uninstall -q -y pip

# The client commands, including the demo's load. They need neither torch nor the server's packages.
FROM ${BASE} AS client
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY requirements/client.txt requirements/
RUN python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --requirement requirements/client.txt \
 && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin idspam
COPY adapters adapters
COPY cli cli
COPY service service
USER idspam
ENTRYPOINT ["python", "-m", "service"]
CMD ["--help"]

FROM ${BASE}
ARG TORCH=any
ARG VERSION=unknown
# Triton compiles its kernels on the machine that runs them, and their launchers with a C compiler.
RUN if [ "${TORCH}" = cuda ]; then \
      apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null && rm -rf /var/lib/apt/lists/*; \
    fi
# 10001 is not a user of the host. Named volumes inherit the owner of these folders.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/idspam --shell /usr/sbin/nologin idspam \
 && install -d -o idspam -g idspam /var/lib/idspam/adapters /var/cache/idspam \
 && install -d -o idspam -g idspam -m 700 /var/lib/idspam/keys
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE pyproject.toml ./
COPY --from=packages /opt/sbom.cdx.json /usr/share/doc/id-spam-service/sbom.cdx.json
COPY adapters adapters
COPY cli cli
COPY service service
COPY deploy/alive.py deploy/alive.py
# The root file system may be read-only, so Python's compiled files must be in the image.
RUN /opt/venv/bin/python -m compileall -q adapters cli service deploy
ENV PATH=/opt/venv/bin:$PATH \
    IDSPAM_HOST=0.0.0.0 \
    IDSPAM_ADAPTER_DIR=/var/lib/idspam/adapters \
    HF_HOME=/var/cache/idspam/huggingface \
    TRITON_CACHE_DIR=/var/cache/idspam/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/idspam/inductor \
    PYTHONDONTWRITEBYTECODE=1
USER idspam
EXPOSE 8000
VOLUME ["/var/lib/idspam/adapters", "/var/lib/idspam/keys", "/var/cache/idspam"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-S", "deploy/alive.py"]
LABEL org.opencontainers.image.title="ID-SPAM service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]
