"""llama.cpp's own server, as a program: one server that generates and one that embeds, on free ports of loopback.

python tests/llama_server.py MODEL KEY

It needs `xllamacpp` and no code of ours. It prints the addresses of the two servers, and ends when its standard input
is closed.
"""

import os
import signal
import sys

START_S = 30
SLOTS, CONTEXT = 4, 8192


def main(model: str, key: str) -> None:
    """Serve until the parent process closes our standard input."""
    signal.alarm(START_S)  # the signal ends this process also while it runs native code
    parent = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes its log to standard output as well: send all of it to standard error

    import xllamacpp

    def server(*, embeds: bool) -> "xllamacpp.Server":
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.model_alias = {"tiny"}
        params.api_keys = [key]
        params.port = 0
        # One thread, because several threads wait for each other in busy loops.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_parallel = SLOTS
        params.n_ctx = SLOTS * CONTEXT
        params.endpoint_metrics = True
        params.embedding = embeds
        if embeds:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        return xllamacpp.Server(params)

    servers = [server(embeds=False), server(embeds=True)]
    signal.alarm(0)
    os.write(parent, " ".join(server.listening_address for server in servers).encode() + b"\n")
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
