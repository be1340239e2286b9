# SPDX-License-Identifier: Apache-2.0
"""Where the columns of a rank's tensor stand in the unsharded one.

Plain records: an engine adapter fills them from the model's parallel layers.
"""

from dataclasses import dataclass

# One run of columns: first local column, number, first column of the whole tensor.
Run = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shard:
    """The place of a tensor's columns.

    Attributes:
        columns: Columns of the unsharded tensor.
        runs: Runs of columns that count on this rank.
        copies: Runs (first local column, number) that are copies of another rank's
            columns; they count there.
    """

    columns: int
    runs: tuple[Run, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def local_columns(self) -> int:
        """Columns on this rank."""
        counted = sum(length for _, length, _ in self.runs)
        return counted + sum(length for _, length in self.copies)


# A tensor that every rank holds as a whole.
WHOLE_ON_ALL = Shard(0, ())

Places = dict[str, Shard]


def even_runs(sizes: list[int], rank: int, ranks: int) -> tuple[Run, ...]:
    """Runs of a rank where each of several blocks of columns is cut evenly.

    Args:
        sizes: Columns of each block of the unsharded tensor, in order.
        rank: Number of the rank.
        ranks: How many there are.
    """
    runs = []
    local = start = 0
    for size in sizes:
        part = size // ranks
        runs.append((local, part, start + rank * part))
        local += part
        start += size
    return tuple(runs)
