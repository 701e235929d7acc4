"""Alembic's entry: runs the revisions in the transaction of the store's connection.

Revisions are numbered 0001, 0002, ...; what a released one does is never changed.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # true of SQLite, because `store.database` sends BEGIN itself
)
with context.begin_transaction():
    context.run_migrations()
