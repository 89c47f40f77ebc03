"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """'1 domain', '2 domains'. many: the words for other numbers than 1, where they are not `one` with an 's'; words may go
    on to the verb, as in `counted(n, "class has", "classes have")`."""
    return f"{number} {one if number == 1 else many or one + 's'}"
