"""llama.cpp's own server, as a program: one that generates and one that embeds, on free ports of loopback.

python tests/llama_server.py MODEL KEY

Needs `xllamacpp` and nothing of ours. Prints where the two are, and ends when its standard input does.
"""

import os
import signal
import sys

START_S = 30
SLOTS, CONTEXT = 4, 8192


def main(model: str, key: str) -> None:
    """Serve until whoever started us is gone."""
    signal.alarm(START_S)  # ends us, also out of code that is not Python's
    told = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes its log to both

    import xllamacpp

    def server(*, embeds: bool) -> "xllamacpp.Server":
        asked = xllamacpp.CommonParams()
        asked.model.path = model
        asked.model_alias = {"tiny"}
        asked.api_keys = [key]
        asked.port = 0
        # Several would wait for each other with the processor busy.
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
        asked.n_parallel = SLOTS
        asked.n_ctx = SLOTS * CONTEXT
        asked.endpoint_metrics = True
        asked.embedding = embeds
        if embeds:
            asked.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        return xllamacpp.Server(asked)

    servers = [server(embeds=False), server(embeds=True)]
    signal.alarm(0)
    os.write(told, " ".join(server.listening_address for server in servers).encode() + b"\n")
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
