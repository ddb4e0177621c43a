"""Who waits: a bounded queue from which users are served in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from .row import Row


class Queue:
    """Rows that wait, first come first served for each user, and one of each user after another.

    What was put back in the middle of its answer goes first.
    """

    def __init__(self) -> None:
        self.again: deque[Row] = deque()
        self.users: OrderedDict[str, deque[Row]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.again) + sum(map(len, self.users.values()))

    def __iter__(self) -> Iterator[Row]:
        yield from self.again
        for rows in self.users.values():
            yield from rows

    def put(self, row: Row) -> None:
        self.users.setdefault(row.request.user, deque()).append(row)

    def put_back(self, row: Row) -> None:
        self.again.append(row)

    def next(self) -> Row | None:
        """Whose turn it is; it stays in the queue until `taken`."""
        if self.again:
            return self.again[0]
        return next(iter(self.users.values()))[0] if self.users else None

    def taken(self) -> None:
        """The row that `next` gave has left."""
        if self.again:
            self.again.popleft()
            return
        user, rows = self.users.popitem(last=False)
        rows.popleft()
        if rows:
            self.users[user] = rows  # behind all others

    def remove(self, row: Row) -> None:
        if row in self.again:
            self.again.remove(row)
            return
        rows = self.users[row.request.user]
        rows.remove(row)
        if not rows:
            del self.users[row.request.user]
