# Two stages: the first installs the packages by hash; the second has the result and no installer.
#
# The base is a tag, so a build gets its security fixes. docs/container.md says how to pin its digest.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/llm-quota-proxy
WORKDIR /src
COPY requirements-run.lock ./
RUN /opt/llm-quota-proxy/bin/pip install --require-hashes --no-deps -r requirements-run.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
# Then everything is removed that only a build or a test uses. Of bpe-openai only the tables are used: its library of
# 71 MB is never loaded.
RUN /opt/llm-quota-proxy/bin/pip install --no-deps --no-build-isolation . \
 && /opt/llm-quota-proxy/bin/pip uninstall --yes \
    hatchling editables packaging pathspec pluggy tomlkit trove-classifiers setuptools pip \
 && rm /opt/llm-quota-proxy/lib/python3*/site-packages/bpe_openai/_bindings*.so \
 && find /opt/llm-quota-proxy -type d -name tests -prune -exec rm -r {} +

FROM ${BASE}
LABEL org.opencontainers.image.title="llm-quota-proxy" \
      org.opencontainers.image.description="An OpenAI-compatible proxy with exact token quotas" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
ENV PATH=/opt/llm-quota-proxy/bin:$PATH PYTHONUNBUFFERED=1 HOME=/data TMPDIR=/tmp \
    HEALTH_URL=http://127.0.0.1:8080/healthz
RUN python -m pip uninstall --yes pip setuptools wheel \
 && install -d -o 10001 -g 10001 -m 0700 /data
COPY --from=build /opt/llm-quota-proxy /opt/llm-quota-proxy
# A number, because Kubernetes (runAsNonRoot) cannot tell from a name that it is not root.
USER 10001:10001
# The root can be read-only. /data is the working directory, so the default database (sqlite:///quotas.db) is there;
# /tmp has uploads and, with --workers, the metrics.
WORKDIR /data
VOLUME ["/data", "/tmp"]

# The default addresses are loopback. In a container set `server: {api: "0.0.0.0:8080", admin: "0.0.0.0:8081"}`.
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
# Asks the API listener, because the admin listener can be turned off. /healthz is there with and without
# `server.prefix`. If `server.api` has another port, set HEALTH_URL. ProxyHandler({}) ignores HTTP_PROXY.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-IS", "-c", "import os; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open(os.environ['HEALTH_URL'], timeout=2)"]
ENTRYPOINT ["llm-quota-proxy"]
CMD ["serve", "--config", "/etc/llm-quota-proxy/quotas.yaml"]
