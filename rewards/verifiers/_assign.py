"""The assignment problem: who is matched with whom, so that all together fit best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.float64]) -> list[tuple[int, int]]:
    """min(N, M) pairs (row, column) of least total cost [N,M], every row and column at most once; O(min^2 max).

    The Hungarian method by shortest augmenting paths with potentials u, v (Kuhn; Jonker and Volgenant): rows are added
    one at a time, and each finds the cheapest way to a free column, moving earlier rows where that pays.
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in assign(cost.T))
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for start in range(rows):
        slack = np.full(columns, np.inf)  # reduced cost of the cheapest edge from the tree to each column
        parent = np.full(columns, -1)  # column before it on that path; -1 is `start`
        done = np.zeros(columns, dtype=bool)
        row, last = start, -1
        while True:
            reduced = cost[row] - u[row] - v
            closer = ~done & (reduced < slack)
            slack[closer], parent[closer] = reduced[closer], last
            last = int(np.where(done, np.inf, slack).argmin())
            delta = slack[last]
            u[start] += delta
            u[row_of[done]] += delta
            v[done] -= delta
            slack[~done] -= delta
            done[last] = True
            row = int(row_of[last])
            if row < 0:
                break
        while last >= 0:  # turn the path around
            before = int(parent[last])
            row_of[last] = start if before < 0 else row_of[before]
            last = before
    return sorted((int(row), column) for column, row in enumerate(row_of) if row >= 0)
