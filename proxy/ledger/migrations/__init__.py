"""The steps by which a database comes up to the schema in `tables`. They only add."""
