"""Alembic's entry: migrates over the connection that `hypernas.store.connection` hands in."""

from alembic import context

from hypernas.store.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
