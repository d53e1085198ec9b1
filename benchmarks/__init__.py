"""The figures: what a call, a chunk and an open stream cost, beside nginx as a plain reverse proxy in the same run.

See README.md for what is measured and how. Nothing here is a test: figures vary with the machine and with what
else runs on it, so none of them fails anything.
"""
