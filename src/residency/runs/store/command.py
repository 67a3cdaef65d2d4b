"""`residency store ls | verify | gc`: what a store holds, whether it can be trusted, and how to shrink it."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["store_command"]


def store_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency store`.
    """
    parser = argparse.ArgumentParser(prog="residency store", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("ls", "what there is, by kind, with sizes"),
        (
            "verify",
            "compare every file with its hash; damaged entries are set aside, and made anew when needed",
        ),
        ("gc", "remove what is left over; with --unused or --max-size also entries, those not used for longest first"),
    ):
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("store", type=Path, help="the folder, for example studies/quickstart/store")
    gc = verbs.choices["gc"]
    gc.add_argument("--unused", type=float, metavar="DAYS", help="remove entries that were not used for so many days")
    gc.add_argument("--max-size", metavar="SIZE", help="remove entries until the store is not larger: 500M, 20G")
    gc.add_argument("--yes", action="store_true", help="remove complete entries, which would have to be made again")
    options = parser.parse_args(words)
    # Behind the parser: the help answers at once.
    from residency.runs.store.maintenance import carry_out

    return carry_out(options)
