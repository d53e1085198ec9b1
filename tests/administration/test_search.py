"""The search for a text in several columns, on both engines."""

import pytest
import sqlalchemy as sa

from proxy.administration.search import contains
from proxy.ledger.schema import users
from tests.directory import UserId, user_row


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ann", "Ann joanna"),
        ("ANN", "Ann joanna"),
        ("@EXAMPLE.org", "Ann"),
        ("é", "zoé"),
        ("a%a", ""),
        ("_", "a_b"),
        ("%", ""),
        ("/", ""),
        ("\\", "a\\b"),
        ("joannaA", ""),
    ],
)
async def test_a_text_is_found_in_one_of_the_columns(rows, text, found):
    """In any case of ASCII letters. Signs of patterns are signs, and no text is found across two columns."""
    people = {"Ann": "A@example.org", "joanna": None, "zoé": "", "a_b": None, "a\\b": None}
    await rows.insert(users, [user_row(UserId("database", id), email=email) for id, email in people.items()])
    async with rows.store.transaction() as connection:
        asked = sa.select(users.c.id).where(contains(connection, (users.c.id, users.c.email), text))
        ids = set((await connection.execute(asked)).scalars())
    assert ids == set(found.split())
