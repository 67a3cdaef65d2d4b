"""What the graph of a tensor consists of."""

from __future__ import annotations

from torch import Tensor

__all__ = ["count_nodes"]


def count_nodes(out: Tensor, name: str) -> int:
    """Nodes of a class in the graph that `out` was computed by."""
    seen, queue = set(), [out.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return sum(type(node).__name__ == name for node in seen)
