"""The words of a dry run, `--dry-run` and what goes with it; imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

__all__ = ["Asked", "add_price_options", "asked", "take_estimate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an estimate is to tell besides memory, tokens and FLOPs.

    Args:
        measure: Whether a few steps are tried, to tell time.
        memory: Bytes of one device, into which a micro-batch is to fit; `None` = not asked.
        watts: Power of one device, to tell energy.
        kwh_price: Money per kilowatt hour.
        hour_price: Money per hour of one device.
    """

    measure: bool = False
    memory: int | None = None
    watts: float | None = None
    kwh_price: float | None = None
    hour_price: float | None = None


def add_price_options(parser: argparse.ArgumentParser) -> None:
    """What every dry run takes."""
    parser.add_argument("--measure", action="store_true", help="try a few steps to estimate time")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of one device: which micro-batch fits into it")
    parser.add_argument("--watts", type=float, help="power of one device, for the energy (with --measure)")
    parser.add_argument("--kwh-price", type=float, help="money per kilowatt hour (with --watts)")
    parser.add_argument("--hour-price", type=float, help="money per hour of one device (with --measure)")


def asked(options: argparse.Namespace) -> Asked:
    """What the words of `add_price_options` say."""
    memory = None if options.memory is None else round(options.memory * 2**30)
    return Asked(
        measure=options.measure or options.watts is not None or options.hour_price is not None,
        memory=memory,
        watts=options.watts,
        kwh_price=options.kwh_price,
        hour_price=options.hour_price,
    )


def take_estimate(words: list[str]) -> tuple[list[str], Asked | None]:
    """The words of a run without those of a dry run, and what that is asked; `None` = it is to be trained."""
    if not {"--dry-run", "--dry_run"} & {*words}:
        return words, None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    add_price_options(parser)
    options, rest = parser.parse_known_args(words)
    return rest, asked(options)
