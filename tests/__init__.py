"""The tests: one package for each package of `proxy`, and journeys through the whole program."""
