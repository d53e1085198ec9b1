"""A simulated upstream: it speaks the APIs of OpenAI and Anthropic, for the demo, the tests and the benchmarks.

It promises answers that depend only on its seed and on the prompt, in the shapes that the vendors' APIs have, and a
record of the usage that it reported, so that a test can compare the proxy's counters with it. A request can ask for
faults: an error status, a stream that breaks, a usage that is missing.

It never imports anything of the proxy outside this package: the proxy's readers of answers are tested against it, and
code that both shared would hide the same mistake on both sides. It never reads the wall clock or a file, and it is
not meant to be reached from anywhere but loopback.

Begin reading in `server`, which is the HTTP server. `directives` lists what a request can ask for, `text` generates
answers, `frames` and `messages` write them in the formats of OpenAI and of Anthropic, `media` writes the answers that
are not text, `store` keeps responses that a client may read again.
"""
