"""How alembic runs the steps: on the connection that `tables.migrate` hands it, in that one transaction."""

from alembic import context

from proxy.ledger.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
