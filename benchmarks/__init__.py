"""Benchmarks: what a call, a chunk and an open stream cost in the proxy and in nginx, as a plain reverse proxy.

They promise figures that can be compared: the proxy and nginx get the same load in the same run. They never fail a
build, because figures vary with the machine and with what else runs on it; a figure that misses its aim is printed as
such. A run in which a call fails or a stream breaks prints no figures.

README.md says what is measured and how. Begin reading in `figures`, which measures; `servers` starts the upstream,
nginx and the proxy, `wrk` and `streams` make the load, `upstream` is the upstream of streams. `ledgers`, `records`
and `stalls` are commands of their own: the ledger alone, the ledger with many stored calls, and the event loop.
"""
