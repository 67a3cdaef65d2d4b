"""What is known of a trial between two stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from residency.engine.scoring.row_scores import means
from residency.runs.results import score_infos, score_matrices
from residency.study.planning.resolve import Resolved
from residency.study.planning.tree import Tree

__all__ = ["rows_so_far", "stopped_record", "upto"]


def upto(tree: Tree, stage: int) -> Tree:
    """The part of a tree that leads to the states after a stage and their scores."""
    nodes = {}
    for task, node in tree.nodes.items():
        until = node.task.spec["until"]
        if until is not None and until <= stage:
            nodes[task] = node
    grid = [
        replace(row, domains=row.domains[:stage], tasks=row.tasks[: stage + 1], shared=row.shared[: stage + 1])
        for row in tree.grid
    ]
    return Tree(nodes=nodes, grid=grid)


def rows_so_far(cell: Resolved, stage: int) -> list[dict[str, dict[str, float]]]:
    """Means before training and after every stage so far, from the store."""
    return [means(cell.stage_cache.scores(k)[0]) for k in range(stage + 1)]


def stopped_record(cell: Resolved, stage: int) -> dict[str, Any]:
    """The record of a cell that was stopped: a legal end, with missing rows for the stages that were not trained.

    Args:
        cell: The cell.
        stage: Its last stage.
    """
    runner = cell.stage_cache.runner
    columns = list(runner.data.columns)
    rows: list[Mapping[str, Any]] = list(rows_so_far(cell, stage))
    rows += [{}] * (len(cell.keys.stages) - stage)
    return {
        "schema": 1,
        "cell": cell.cell.id,
        "status": "stopped",
        "axes": dict(cell.cell.axes),
        "seed": cell.cell.seed,
        "split": runner.settings.split,
        "domains": cell.domains,
        "probes": columns[len(cell.domains) :],
        "stopped_after": stage,
        "scores": score_matrices(rows, columns, score_infos(runner.module, runner.data)),
        "summary": {},
    }
