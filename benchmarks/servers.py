"""The servers that are measured: context managers that start an upstream, nginx, the relay or the proxy, and stop it.

All listen on loopback only. nginx runs with its own configuration in a temporary folder, never as the system's
service. Where there are two cores or more, the server that is measured has the first one for itself, and everything
else the others, so that the load does not take time from it.
"""

import os
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
# That of a user whose quota is used up by one call.
REFUSED_KEY = "sk-bench-refused-0123456789abcdef"
# The source of this benchmark: the proxy that is measured if no other one is named.
HERE = Path(__file__).parent.parent
_CORES = os.sched_getaffinity(0)
_START_WITHIN_S = 60
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
    client_body_buffer_size 1m;
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

# `python -m proxy` as in its image. The library of the log imports rich if it is there: a tool of the tests needs it.
_PROXY = "import sys; sys.modules['rich'] = None; from proxy.cli import main; main()"

POLICY = """
server: {{api: "127.0.0.1:{port}", admin: null, shutdown_delay: 0s}}
database: "sqlite:///{folder}/quotas.db"
log: {{calls: {logged_calls}}}
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
  one_call:
    quotas:
      daily: {{tokens: 900_000M, requests: 1, per: day}}
      hourly: {{tokens: 900_000M, requests: 900M, per: 1h}}
users:
  alice: {{groups: [staff], keys: ["{key}"]}}
  bob: {{groups: [one_call], keys: ["{refused_key}"]}}
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
    port = free_port()
    with _nginx(folder / "upstream", _RETURN.format(port=port, answer=_ANSWER), port) as server:
        yield server


@contextmanager
def stream_upstream(tokens_per_s: float, tokens: int) -> Iterator[Server]:
    """An upstream that streams `tokens` tokens at this speed to every call."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.upstream", str(port), str(tokens_per_s), str(tokens)]
    with _running(command, port) as server:
        yield server


@contextmanager
def nginx(folder: Path, upstream: Server) -> Iterator[Server]:
    """Nginx as a plain reverse proxy in front of `upstream`."""
    port = free_port()
    server = _FORWARD.format(port=port, upstream=upstream.port)
    with _nginx(folder / "nginx", server, port, is_measured=True) as running:
        yield running


@contextmanager
def relay(upstream: Server) -> Iterator[Server]:
    """The ten-line relay of `benchmarks.relay` in front of `upstream`."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.relay", str(port), str(upstream.port)]
    with _running(command, port, is_measured=True) as server:
        yield server


@contextmanager
def proxy(
    folder: Path, upstream: Server, *, policy: str = POLICY, source: Path = HERE, workers: int = 1, **values: object
) -> Iterator[Server]:
    """The proxy in front of `upstream`, as `serve` runs it: a user with two exact quotas that are never used up.

    Another `policy` is formatted with the same values, and with more of them if they are given. `logged_calls` says
    which calls it logs, into a file: all by default. `source` is the folder with the package `proxy` to run.
    """
    port, config = free_port(), folder / "quotas.yaml"
    usual = {"port": port, "folder": folder, "upstream": upstream.port, "logged_calls": "all"}
    keys = {"key": KEY, "refused_key": REFUSED_KEY}
    config.write_text(policy.format(**{**usual, **keys, **values}))
    command = [sys.executable, "-c", _PROXY, "serve", "--config", str(config), "--workers", str(workers)]
    with _running(command, port, is_measured=True, source=source) as server:
        yield server


@contextmanager
def _nginx(folder: Path, server: str, port: int, *, is_measured: bool = False) -> Iterator[Server]:
    folder.mkdir()
    (folder / "nginx.conf").write_text(_NGINX.format(server=server, temporary=_TEMPORARY))
    command = nginx_command()
    assert command is not None, "the command checks that nginx is installed"
    command_line = [command, "-e", "stderr", "-p", f"{folder}/", "-c", "nginx.conf"]
    with _running(command_line, port, is_measured=is_measured) as running:
        yield running


def leave_first_core() -> None:
    """Leave the first core to the server that is measured. The programs that this process starts do so too."""
    if len(_CORES) > 1:
        os.sched_setaffinity(0, _CORES - {min(_CORES)})


def _take_first_core() -> None:
    os.sched_setaffinity(0, {min(_CORES)})


@contextmanager
def _running(command: list[str], port: int, *, is_measured: bool = False, source: Path = HERE) -> Iterator[Server]:
    with TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=source, stdout=log, stderr=log, preexec_fn=_take_first_core if is_measured else None
        )
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


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
