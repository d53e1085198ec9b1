"""A reverse proxy for the OpenAI and Anthropic APIs that enforces token quotas of groups and users.

Clients send their calls to the proxy with a key of their own. The proxy reserves the largest number of tokens that a
call can use, forwards the call to an upstream with the operator's key, passes the answer on, and charges what the
answer used. A call that does not fit into the quotas of its user is refused with a 429 that says when they reset.

The packages, from the lowest to the highest:

    policy      who may use how much: windows, quotas, admission, groups, models; pure
    formats     the requests, answers and streams of the OpenAI and Anthropic APIs: parsing, metering, errors; pure
    ledger      reservations and usage in SQLite or PostgreSQL, exact and durable
    config      quotas.yaml: loads, checks and reloads it
    identity    the users and their groups, and which of them a request comes from
    upstreams   which upstream takes a call, and the HTTP client for it
    calls       one call from admission to settlement
    web         the two listeners: routes, authentication, bodies, errors, responses

    server      builds the parts of one process, starts them and stops them in order
    workers     several such processes behind one port
    demo        a proxy and a simulated upstream with random keys
    commands    the commands
    cli         the program, which imports the command that is named

    simulator   a fake upstream for the demo, the tests and the benchmarks
    torture     a load test with disconnects and crashes: compares, call by call, what was generated, received and
                charged

    errors, logs, tasks, metrics    modules that every package may use

A package or module imports only from packages that are listed before it, and from the four in the last line. Only the
commands `demo` and `torture` use the simulator and `torture`. Importing any of it has no side effects.

Begin with the docstring of the package that you need: it says what the package promises, what it never does, and
which module to read first. To follow one call, begin with `web.routes`.
"""

__version__ = "0.1.0"
