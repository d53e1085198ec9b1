"""The migrations to the tables in `ledger/schema.py`, in order. From the first release on they only add."""
