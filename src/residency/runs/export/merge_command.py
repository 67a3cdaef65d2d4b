"""`residency merge EXPORT EXPORT ... --method ties --output FOLDER`: several exported stages as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from residency.core.errors import EXIT_DONE
from residency.core.text import for_terminal

__all__ = ["merge_command"]


def merge_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency merge`.
    """
    parser = argparse.ArgumentParser(
        prog="residency merge",
        description="Merge exported stages of one base model. LoRA exports: PEFT's add_weighted_adapter (linear, svd, "
        "cat, ties, dare_linear, dare_ties, magnitude_prune, and these with _svd). Whole models (export --merge): "
        "linear, task_arithmetic, ties, dare_linear, dare_ties, magnitude_prune, slerp, of differences from the base.",
    )
    parser.add_argument("exports", nargs="+", type=Path, help="folders that `residency export` has written")
    parser.add_argument("--method", default="linear", help="default linear")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="a factor per export; default 1/n")
    parser.add_argument("--density", type=float, default=0.5, help="share that ties, dare and prune keep; default 0.5")
    parser.add_argument("--rank", type=int, help="of the result of *svd; default the largest of the exports")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops")
    parser.add_argument("--base", help="the base model, where the exports name none on a hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(words)
    from residency.runs.export.merge import Recipe, merge_exports

    names = ("method", "weights", "density", "seed", "rank")
    recipe = Recipe(**{name: getattr(options, name) for name in names})
    found = merge_exports(
        options.exports, options.output, recipe=recipe, base=options.base, overwrite=options.overwrite
    )
    parts = ", ".join(
        f"{weight:g} of {one['name']} stage {one['stage']}"
        for weight, one in zip(found["merge"]["weights"], found["merged_from"], strict=True)
    )
    print(for_terminal(f"{recipe.method} of {parts}: {found['path']}"))
    return EXIT_DONE
