"""Programs that use the proxy as people do: each with one SDK, in a process and an environment of its own."""
