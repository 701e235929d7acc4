"""Alembic's entry: runs the revisions on the connection the book hands over, inside the book's own transaction.

Revisions are numbered 0001, 0002, ...; each is frozen once released and knows neither `store.tables` nor records.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    transactional_ddl=True,  # true of SQLite when, as in the book, BEGIN is sent by us
)
with context.begin_transaction():
    context.run_migrations()
