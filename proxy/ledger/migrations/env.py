"""Runs the migrations for alembic, on the connection of `schema.migrate` and in its transaction."""

from alembic import context

from proxy.ledger.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
