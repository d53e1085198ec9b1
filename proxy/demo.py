"""The demo: a proxy in front of a simulated upstream, both on loopback, with random keys in every run."""

import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from proxy.calls.tokenizer import Tokenizers
from proxy.config.loader import load_text
from proxy.server import Server, serve
from proxy.simulator.server import Simulator
from proxy.simulator.server import serve as serve_simulator

# Slow enough that one can watch an answer being streamed.
_TOKENS_PER_S = 40.0

_POLICY = """
server: {{api: "127.0.0.1:{port}", admin: "127.0.0.1:{admin_port}", shutdown_delay: 0s}}
database: "sqlite:///{database}"
admin_keys: {{ops: "{ops}"}}
help: "This is the demo: restart it for fresh quotas."
upstreams:
  simulated: {{base_url: "http://127.0.0.1:{upstream_port}/v1", api_key: "{upstream_key}", kind: simulator}}
models:
  demo-small: {{upstream: simulated, max_output_tokens: 100}}
  demo-large: {{upstream: simulated, max_output_tokens: 400}}
groups:
  staff:
    quotas:
      hourly: {{tokens: 500, per: 1h}}
      daily: {{tokens: 20k, requests: 500, per: day}}
  admins: {{unlimited: true}}
users:
  alice: {{groups: [staff], keys: ["{alice}"]}}
  root: {{groups: [admins], keys: ["{root}"]}}
"""

_GUIDE = """
  The demo is running: a proxy with quotas in front of a simulated upstream. Paste this into another terminal:

    curl {url}/chat/completions -H "Authorization: Bearer {alice}" \\
      -H "Content-Type: application/json" \\
      -d '{{"model": "demo-small", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  or this into Python (pip install openai):

    from openai import OpenAI
    client = OpenAI(base_url="{url}", api_key="{alice}")
    for turn in range(20):
        answer = client.chat.completions.create(
            model="demo-small", messages=[{{"role": "user", "content": "Hello!"}}]
        )
        print(turn, answer.usage.total_tokens, answer.choices[0].message.content)

  Alice's group may use 500 tokens an hour: after some calls you get a 429 that says when it resets.
  What is left:        curl {url}/quota -H "Authorization: Bearer {alice}"
  A user without limits has the key {root}.
  Metrics:             {admin}/metrics

  In the browser, administrators see it happen and change quotas, and Alice sees where she stands:

    {admin}/admin/     log in with {ops}
    {api}/usage        with Alice's key {alice}

  The same with commands: an administrator adds a quota, and sees who was refused and who changed what:

    curl -X PUT {admin}/admin/api/groups/staff/quotas/fast -H "Authorization: Bearer {ops}" \\
      -H "If-None-Match: *" -H "Content-Type: application/json" -d '{{"requests": 3, "per": "1m"}}'
    curl {admin}/admin/api/attention -H "Authorization: Bearer {ops}"
    curl {admin}/admin/api/audit -H "Authorization: Bearer {ops}"

  Stop with Ctrl-C. The demo's data is deleted then.
"""


async def run(port: int, admin_port: int, print_guide: Callable[[str], None], tokenizers: Tokenizers) -> None:
    """Serve the demo until it is stopped. When it serves, `print_guide` gets the text that says what to paste."""
    alice, root, ops, upstream_key = _key(), _key(), _key(), _key()
    simulator, upstream_port = await serve_simulator(Simulator(upstream_key, tokens_per_s=_TOKENS_PER_S))
    with tempfile.TemporaryDirectory(prefix="llm-quota-proxy-demo-") as folder:
        config = load_text(
            _POLICY.format(
                port=port,
                admin_port=admin_port,
                database=Path(folder) / "demo.db",
                upstream_port=upstream_port,
                upstream_key=upstream_key,
                alice=alice,
                root=root,
                ops=ops,
            ),
            "demo",
        )

        def on_started(server: Server) -> None:
            api, admin = (f"http://{address}" for address in (server.api, server.admin) if address)
            print_guide(_GUIDE.format(url=f"{api}/v1", api=api, admin=admin, alice=alice, root=root, ops=ops))

        try:
            await serve(Server(config, load=lambda: config, tokenizers=tokenizers), on_started, grace_s=0)
        finally:
            await simulator.cleanup()


def _key() -> str:
    return f"sk-demo-{secrets.token_urlsafe(24)}"
