"""The servers that are measured: context managers that start an upstream, nginx or the proxy, and stop it at the end.

All listen on loopback only. nginx runs with its own configuration in a temporary folder, never as the system's
service.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

KEY = "sk-bench-0123456789abcdefghijklmn"
_START_WITHIN_S = 20
_STOP_WITHIN_S = 40

_ANSWER = (
    '{"id":"chatcmpl-0123456789","object":"chat.completion","created":1750000000,"model":"short","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"The capital of France is Paris, where some two million people live.",'
    '"refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":33,'
    '"completion_tokens":14,"total_tokens":47,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
    '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}},"service_tier":"default"}'
)

# One worker, because the proxy has one process. Neither writes an access log.
_NGINX = """
daemon off; worker_processes 1; worker_rlimit_nofile 16384; pid nginx.pid; error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off; default_type application/json; keepalive_requests 1000000000; {temporary}
    {server}
}}
"""
_TEMPORARY = " ".join(f"{kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
_RETURN = "server {{ listen 127.0.0.1:{port}; location / {{ return 200 '{answer}'; }} }}"
_FORWARD = """
    upstream upstream {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://upstream; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 600s;
        }}
    }}
"""

_POLICY = """
server: {{api: "127.0.0.1:{port}", admin: null}}
database: "sqlite:///{folder}/quotas.db"
upstreams:
  upstream: {{base_url: "http://127.0.0.1:{upstream}/v1", api_key: sk-upstream, kind: openai}}
models:
  short: {{upstream: upstream, max_output_tokens: 1000}}
  long: {{upstream: upstream, max_output_tokens: 1000}}
groups:
  staff:
    quotas:
      daily: {{tokens: 900_000M, requests: 900M, per: day}}
      hourly: {{tokens: 900_000M, requests: 900M, per: 1h}}
users:
  alice: {{groups: [staff], keys: ["{key}"]}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port, and the id of its process, which may have children."""

    port: int
    pid: int

    def cpu_us(self) -> float:
        """Processor time of all its processes since their start, in microseconds."""
        # The id of another process's CPU clock, computed as clock_getcpuclockid(3) does. The clock includes all
        # threads and is exact to the nanosecond; /proc/PID/stat is exact to a hundredth of a second.
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in self._pids()) / 1000

    def memory_mb(self, kind: str) -> float:
        """Memory of all its processes: `Rss`, or `Pss`, which divides shared pages among their processes."""
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._pids())
        lines = (line for rollup in rollups for line in rollup.splitlines() if line.startswith(f"{kind}:"))
        return sum(int(line.split()[1]) for line in lines) / 1024

    def _pids(self) -> list[int]:
        pids = [self.pid]
        for pid in pids:  # grows during the iteration, so grandchildren are found too
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids


def nginx_command() -> str | None:
    """Return the path of nginx, None if it is not installed. Debian's /usr/sbin is not on every PATH."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def whole_upstream(folder: Path) -> Iterator[Server]:
    """An upstream that answers every call with the same short JSON: nginx, because nothing costs less."""
    port = _free_port()
    with _nginx(folder / "upstream", _RETURN.format(port=port, answer=_ANSWER), port) as server:
        yield server


@contextmanager
def stream_upstream(tokens_per_s: float, tokens: int) -> Iterator[Server]:
    """An upstream that streams `tokens` tokens at this speed to every call."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.upstream", str(port), str(tokens_per_s), str(tokens)]
    with _running(command, port) as server:
        yield server


@contextmanager
def nginx(folder: Path, upstream: Server) -> Iterator[Server]:
    """Nginx as a plain reverse proxy in front of `upstream`."""
    port = _free_port()
    with _nginx(folder / "nginx", _FORWARD.format(port=port, upstream=upstream.port), port) as server:
        yield server


@contextmanager
def proxy(folder: Path, upstream: Server) -> Iterator[Server]:
    """The proxy in front of `upstream`, as `serve` runs it: one user, two exact quotas that are never used up."""
    port, config = _free_port(), folder / "quotas.yaml"
    config.write_text(_POLICY.format(port=port, folder=folder, upstream=upstream.port, key=KEY))
    with _running([sys.executable, "-m", "proxy", "serve", "--config", str(config)], port) as server:
        yield server


@contextmanager
def _nginx(folder: Path, server: str, port: int) -> Iterator[Server]:
    folder.mkdir()
    (folder / "nginx.conf").write_text(_NGINX.format(server=server, temporary=_TEMPORARY))
    command = nginx_command()
    assert command is not None, "the command checks that nginx is installed"
    with _running([command, "-e", "stderr", "-p", f"{folder}/", "-c", "nginx.conf"], port) as running:
        yield running


@contextmanager
def _running(command: list[str], port: int) -> Iterator[Server]:
    with TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=log, stderr=log)
        try:
            if not _listens(process, port):
                log.seek(0)
                raise SystemExit(f"{' '.join(command)}: did not start\n{log.read().decode()}")
            yield Server(port, process.pid)
        finally:
            _stop(process)


def _listens(process: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until the port accepts connections; return False if the process exits or the time is over."""
    give_up_at = time.monotonic() + _START_WITHIN_S
    while process.poll() is None and time.monotonic() < give_up_at:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.02)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
