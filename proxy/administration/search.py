"""Conditions of lists, in the form that each engine compares fastest.

The search for a text in columns, in any case of ASCII letters, reads the whole table. With 100,000 users the
expression that both understand (`icontains` of each column) takes SQLite five times and PostgreSQL four times as
long.
"""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

# On PostgreSQL the columns are searched as one text. This is in no name, so no text is found across two of them.
_SEPARATOR = "\n"


def contains(
    connection: AsyncConnection, columns: Sequence[sa.ColumnElement[Any]], text: str
) -> sa.ColumnElement[bool]:
    """The condition that one of the columns contains the text. A column may be NULL."""
    if connection.dialect.name == "sqlite":
        # Its LIKE takes upper and lower case letters for equal.
        return sa.or_(*(column.contains(text, autoescape=True) for column in columns))
    whole: sa.ColumnElement[str] = sa.func.coalesce(columns[0], "")
    for column in columns[1:]:
        whole = whole + _SEPARATOR + sa.func.coalesce(column, "")
    # By bytes: with the rules of a language PostgreSQL takes several times as long.
    return sa.func.lower(sa.collate(whole, "C")).contains(_lower(text), autoescape=True)


def is_of_groups(quota_id: sa.ColumnElement[str], groups: Collection[str]) -> sa.ColumnElement[bool]:
    """The condition that a quota is one of these groups. An id is `group/name`, and groups have no slash."""
    # Not with LIKE, which takes SQLite several times as long.
    is_one = (sa.func.substr(quota_id, 1, len(group) + 1) == f"{group}/" for group in groups)
    return sa.or_(sa.false(), *is_one)


def _lower(text: str) -> str:
    """The text with lower case ASCII letters, as PostgreSQL compares it by bytes."""
    return text.encode().lower().decode()
