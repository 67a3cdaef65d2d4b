"""`residency presets [KIND]`: what can be given by its name, one line each."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from residency.core.errors import EXIT_DONE
from residency.core.presets import KINDS, list_presets, preset_folders
from residency.core.text import for_terminal

__all__ = ["presets_command"]

_USE = {
    "adapter": "--model.adapter NAME",
    "mitigation": "--model.mitigations.ANY NAME",
    "objective": "--model.objective NAME",
    "inspection": "--inspection.ANY NAME",
    "logger": "--trainer.logger NAME",
    "domain": "--data.domains.ANY NAME",
    "study": "residency sweep NAME",
}


def presets_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency presets`.
    """
    parser = argparse.ArgumentParser(
        prog="residency presets",
        description="List presets. Your own lie in configs/<kind>/ where you run, or in the folders that the variable "
        "RESIDENCY_PRESETS names; they count more than the package's.",
    )
    parser.add_argument("kind", nargs="?", help=f"only one of {', '.join(KINDS)}")
    options = parser.parse_args(words)
    width = max(80, min(120, shutil.get_terminal_size().columns))
    shown = ""
    for preset in list_presets(options.kind):
        if preset.kind != shown:
            shown = preset.kind
            print(f"{shown}  ({_USE.get(shown, '--config NAME')})")
        line = f"  {preset.name:<28} {textwrap.shorten(preset.summary, width - 31, placeholder='...')}"
        print(for_terminal(line.rstrip()))
    print(for_terminal(f"from {', '.join(map(str, preset_folders()))}"))
    return EXIT_DONE
