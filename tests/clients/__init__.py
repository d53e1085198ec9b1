"""Client programs for the tests: each uses one SDK, as real users do, in a process and an environment of its own."""
