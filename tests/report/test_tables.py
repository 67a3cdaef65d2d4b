"""Tables and the verdict, on records whose numbers can be checked by eye."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from residency.core.errors import UserError
from residency.runs.views.tables import printable, score_table

Record = dict[str, Any]


def record(name: str = "none", seed: int = 0, *, forgetting: float | None = 1.24, learning: float = 1.67) -> Record:
    """A finished cell: the loss on medical goes from 1.41 to 3.69; the summary is a utility, hence minus the loss."""
    matrix = [[5.68, 11.15, 4.10], [1.41, 9.60, 4.35], [3.69, 2.10, 3.90]]
    accuracy = [[0.25, None, None], [0.62, None, None], [0.41, None, None]]
    nll = {"average": -2.9, "learning": -learning, "bwt": -1.0, "forgetting": forgetting, "fwt": 1.55}
    return {
        "schema": 1,
        "cell": f"{name}-s{seed}",
        "status": "done",
        "axes": {"mitigation": name},
        "seed": seed,
        "domains": ["medical", "legal"],
        "probes": ["chat"],
        "task_id_at_test": False,
        "scores": {
            "nll": {"higher_is_better": False, "unit": "nats per completion token", "R": matrix},
            "accuracy": {"higher_is_better": True, "unit": "share", "R": accuracy},
        },
        "summary": {"nll": nll, "accuracy": {"average": None, "learning": None, "bwt": -0.21, "forgetting": 0.21}},
        "cost": {"seconds": 120.4, "mitigation_state_bytes": {"ewc": 2_000_000, "replay": 400_000}},
    }


FAILED: Record = {"cell": "lwf-s0", "status": "failed", "axes": {"mitigation": "lwf"}, "seed": 0}


def text(renderable: object, *, width: int = 200, styled: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=styled, color_system="truecolor" if styled else None
    )
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(renderable: object, start: str) -> list[str]:
    return [line.strip() for line in text(renderable).splitlines() if line.strip().startswith(start)]


# -- one run ------------------------------------------------------------------------------------------------------


def test_rows_are_stages_and_losses_are_measured_from_the_diagonal() -> None:
    table = score_table(record(), "nll")
    (base,), (first,), (last,) = lines(table, "base"), lines(table, "after medical"), lines(table, "after legal")
    assert base.split() == ["base", "5.68", "11.15", "4.10"]
    assert first.split() == ["after", "medical", "1.41", "◆", "9.60", "4.35", "▼0.25"]
    # A probe is measured from the base model, and got better here; 1.41 -> 3.69 lost 2.28.
    assert last.split() == ["after", "legal", "3.69", "▼2.28", "2.10", "◆", "3.90", "▲0.20"]


def test_higher_is_better_turns_the_sign_and_missing_is_a_dash() -> None:
    table = score_table(record(), "accuracy")
    assert lines(table, "after legal")[0].split() == ["after", "legal", "0.410", "▼0.210", "-", "-"]


def test_an_unchanged_score_says_so() -> None:
    same = record()
    same["scores"]["nll"]["R"][2][0] = 1.412
    assert "1.41 =" in text(score_table(same, "nll"))


def test_the_caption_states_unit_orientation_and_what_is_bad() -> None:
    shown = text(score_table(record(), "nll"))
    for part in ("nats per completion token", "lower is better", "forgetting > 0 is bad", "since base"):
        assert part in shown


def test_colour_is_blue_and_orange_and_grows_with_the_loss() -> None:
    mild = record()
    mild["scores"]["nll"]["R"][2][0] = 1.60
    strong, weak = (text(score_table(r, "nll"), styled=True) for r in (record(), mild))
    assert "38;2;213;94;0" in strong  # vermillion
    assert "38;2;0;114;178" in strong  # blue: the probe got better
    assert "38;2;201;138;43" in weak  # under a tenth of what was gained
    assert re.search(r"\x1b\[1m +1\.41 ◆", strong)  # the diagonal is bold


def test_a_record_that_stopped_early_shows_dashes() -> None:
    stopped = record()
    del stopped["scores"]["nll"]["R"][1:]
    assert lines(score_table(stopped, "nll"), "after legal")[0].split() == ["after", "legal", "-", "-", "-"]


def test_knowing_the_domain_is_disclosed() -> None:
    oracle = record() | {"task_id_at_test": True}
    assert "told the domain at test time" in text(score_table(oracle, "nll"))


def test_an_unknown_scorer_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="rouge") as raised:
        score_table(record(), "rouge")
    assert "nll, accuracy" in raised.value.why
    with pytest.raises(UserError, match="lwf-s0 failed"):
        score_table(FAILED, "nll")


# -- names are data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["[bold]x[/bold]", "[/]", "<script>alert(1)</script>", "a\x1b[2Jb\n\tc\u202ed", "../../x"]
)
def test_names_do_no_harm(name: str) -> None:
    hostile = record(name) | {"domains": [name, "legal"], "probes": [name], "cell": name}
    shown = text(score_table(hostile, "nll"))
    assert not any(character in shown for character in "\x1b\t\u202e")
    assert printable(name) in shown.replace("\n", " ")


def test_printable_keeps_one_line_of_bounded_length() -> None:
    assert printable("a\nb\x07\u200b  c") == "a b c"
    assert printable("医学 é") == "医学 é"
    assert len(printable("x" * 500)) == 60
