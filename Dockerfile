# The service without torch: API, worker and the `deepe` command. The environments of the stages are built at run time,
# on the node's own volume.
#
#   docker build -t deepextension .
#   docker run --rm -p 127.0.0.1:8000:8000 -v deepe:/data -e DEEPE_API_TOKEN=... deepextension

FROM python:3.12-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /venv
COPY requirements.lock ./
# these versions and these files, whatever is newest today; the build system is among them
RUN /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement=requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app ./app
COPY migrations ./migrations
RUN /venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation '.[parquet]'

FROM python:3.12-slim-bookworm
# stages and their supervisors outlive the worker inside a container, so somebody has to reap them
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin deepe \
    && install --directory --mode=0700 --owner=deepe --group=deepe /data /node
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DEEPE_HOME=/data \
    DEEPE_NODE_HOME=/node \
    DEEPE_HOST=0.0.0.0 \
    DEEPE_PORT=8000 \
    DEEPE_LOG_FORMAT=json
USER deepe
WORKDIR /data
VOLUME ["/data", "/node"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['DEEPE_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["tini", "--", "deepe"]
# without DEEPE_API_TOKEN it says so and ends: the address can be reached from outside; `worker` needs none
CMD ["serve"]
