# Two stages: the first installs the packages by hash; the second has the result and no installer.
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/llm-quota-proxy
WORKDIR /src
COPY requirements-run.lock ./
RUN /opt/llm-quota-proxy/bin/pip install --require-hashes --no-deps -r requirements-run.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
RUN /opt/llm-quota-proxy/bin/pip install --no-deps --no-build-isolation . \
 && /opt/llm-quota-proxy/bin/pip uninstall --yes hatchling editables pathspec pluggy trove-classifiers pip setuptools

FROM python:3.11-slim
ENV PATH=/opt/llm-quota-proxy/bin:$PATH PYTHONUNBUFFERED=1
# /data is the working directory, so the default database (sqlite:///quotas.db) is on the volume. USER is a number,
# because Kubernetes (runAsNonRoot) cannot tell from a name that it is not root.
RUN useradd --uid 10001 --create-home --home-dir /data --shell /usr/sbin/nologin quota
COPY --from=build /opt/llm-quota-proxy /opt/llm-quota-proxy
USER 10001
WORKDIR /data
VOLUME /data

# The default addresses are loopback. In a container set `server: {api: "0.0.0.0:8080", admin: "0.0.0.0:8081"}`.
EXPOSE 8080 8081
# Asks the API listener, because the admin listener can be turned off. ProxyHandler({}) ignores HTTP_PROXY.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["llm-quota-proxy"]
CMD ["serve", "--config", "/etc/llm-quota-proxy/quotas.yaml"]
