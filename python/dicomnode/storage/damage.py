"""Damage to a ledger that SQLite reads without complaint.

Solves that a bit which has changed on the disk is known at a start, when the ledger can be rebuilt, not by an
error later or by a case under another identifier.
"""

import sqlite3
from collections import deque
from collections.abc import Set
from contextlib import closing


def check_values(db: sqlite3.Connection, tables: str, states: Set[str]) -> None:
    """Whether each value is of the kind that its column has in `tables`, each text is one, and each state.

    Raises sqlite3.DatabaseError, which does not tell what is there instead: it may be of a patient.
    """
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(tables)
        for (table,) in fresh.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            columns = _columns(fresh, table)
            if _columns(db, table) != columns:
                raise sqlite3.DatabaseError(f"other columns than those of {table}")
            _check_table(db, table, columns)
    found = db.execute("SELECT DISTINCT state FROM cases NOT INDEXED")
    if not {row[0] for row in found} <= states:
        raise sqlite3.DatabaseError("a state that is none in cases")


def _check_table(db: sqlite3.Connection, table: str, columns: list[tuple[str, str]]) -> None:
    # Not by an index, which has values of its own.
    rows = f"{table} NOT INDEXED"
    others = [f"typeof({name}) != '{kind.lower()}'" for name, kind in columns if kind]
    try:
        deque(db.execute(f"SELECT * FROM {rows}"), maxlen=0)
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
        raise sqlite3.DatabaseError(f"bytes that are no text in {table}") from None
    if (
        others
        and db.execute(f"SELECT 1 FROM {rows} WHERE {' OR '.join(others)} LIMIT 1").fetchone()
    ):
        raise sqlite3.DatabaseError(f"a value of another kind in {table}")


def _columns(db: sqlite3.Connection, table: str) -> list[tuple[str, str]]:
    """Name and kind of each."""
    return [(row[1], row[2]) for row in db.execute(f"PRAGMA table_info({table})")]
