# The service on a Postgres of yours: set LUCID_DATABASE_URL. docker-compose.yml shows it with one.
# Without LUCID_DATABASE_URL the embedded Postgres runs inside, with its cluster in the volume /data.
#
# docker build --target agent -t lucid-agent . makes the image of the agent instead: docs/agent.md.

FROM python:3.13-slim AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# The environment has no pip of its own: nothing can be installed into the final image.
RUN python -m venv --without-pip /opt/lucid
COPY requirements/runtime.txt requirements/
RUN pip --python /opt/lucid/bin/python install --require-hashes -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY migrations migrations
RUN pip --python /opt/lucid/bin/python install --no-deps --no-build-isolation .

# The service can send traces; the agent has none to send.
FROM builder AS traced
COPY requirements/tracing.txt requirements/
RUN pip --python /opt/lucid/bin/python install --require-hashes -r requirements/tracing.txt

# The agent beside an inference server. It listens to nothing and keeps nothing.
FROM python:3.13-slim AS agent
LABEL org.opencontainers.image.title="lucid-agent" \
      org.opencontainers.image.description="Reports an inference server and its GPUs to a compute registry" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /opt/lucid /opt/lucid
# With NVIDIA's container runtime, NVML is mounted for whoever asks for `utility`.
ENV PATH="/opt/lucid/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=utility
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["lucid", "agent", "run"]

FROM python:3.13-slim
LABEL org.opencontainers.image.title="lucid-compute" \
      org.opencontainers.image.description="Compute registry for networks of GPU providers" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number that volumes and orchestrators can rely on; no home, no shell.
RUN groupadd --gid 10001 lucid \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin lucid \
    && install --directory --owner 10001 --group 10001 --mode 0700 /data
COPY --from=traced /opt/lucid /opt/lucid
ENV PATH="/opt/lucid/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LUCID_DATA_DIR=/data
WORKDIR /data
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; p = os.environ.get('LUCID_PORT', ''); p = p if p.isdigit() else '8000'; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + p + '/readyz', timeout=4)"]
ENTRYPOINT ["lucid"]
CMD ["serve", "--host", "0.0.0.0"]
