"""Layouts: in which order the axes of each value lie, and how few permutes a graph can do with.

A permute is no work on values, only another order of their axes. `settle` takes all permutes of a graph for
what they are, demands on the order in which a value is read, lets every call that can work in another order
do so (`rules`), finds by a minimum cut which of them should (`choice`), and writes the graph anew with the
permutes that are left (`write`).
"""

from graphsurgery.layout.settle import NORM_PRICES, Settled, settle

__all__ = ["NORM_PRICES", "Settled", "settle"]
