"""What PEFT's tuners compose with: the published table is what happens, and what the adapters say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from residency.adapters import Peft
from residency.adapters.peft_tools.tuners import kind_of
from residency.core.errors import UserError
from support.peft_composition import FOLDER, NAMES, promised, rendered, tried
from support.peft_configs import CONFIGS
from support.tuned_models import attach

AGAIN = "write the table anew (PYTHONPATH=tests python tests/support/peft_composition.py) and say in CHANGELOG.md why"
PRESETS = Path(__file__).parents[2] / "configs" / "adapter"


def table() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads((FOLDER / "composition.json").read_text(encoding="utf-8"))
    return loaded


# The others come with `make test-pairs`: a dozen shows one of every way to be merged, averaged and quantised.
FEW = (
    *("lora", "dora", "pissa", "ia3", "oft", "prefix_tuning"),
    *("adaption_prompt", "vera", "loha", "shira", "trainable_tokens", "osf"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.pairs) for n in NAMES])
def test_the_table_is_what_happens(name: str, llama: Path) -> None:
    found = tried(name, llama)
    assert found == table()[name], AGAIN
    said = promised(name)
    assert said["averaged"] == (found["averaged"] != "nothing")
    assert {column: found[column] for column in said if column != "averaged"} == {
        column: told for column, told in said.items() if column != "averaged"
    }, "a capability is promised and not held, or held and not promised"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_base_takes_what_the_table_says(name: str, llama: Path) -> None:
    if table()[name]["quantised"]:
        attach(llama, CONFIGS[name](), quantised=True)
        return
    with pytest.raises(UserError, match=r"on a quantised backbone(.|\n)*lora\.yaml, dora\.yaml or oft\.yaml"):
        attach(llama, CONFIGS[name](), quantised=True)


def test_the_page_shows_the_table() -> None:
    assert (FOLDER / "composition.md").read_text(encoding="utf-8") == rendered(table()), AGAIN
    assert {*table()} == {*NAMES}, AGAIN
    variants = {"lora_dropout"}
    assert {*NAMES} - variants == {path.stem for path in PRESETS.glob("*.yaml")} & {*NAMES}, "every row has a preset"


def test_every_tuner_of_peft_has_a_row_or_a_reason() -> None:
    """A new release of PEFT with a new tuner fails here until somebody has tried it."""
    rows = {kind_of(make()) for make in CONFIGS.values()}
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value not in rows:
            with pytest.raises(UserError) as refused:
                Peft(config=_smallest(config))
            assert refused.value.fix.startswith(("use ", "remove "))
    assert len(rows) + 8 == len(peft.PeftType)


def _smallest(config: type[PeftConfig]) -> PeftConfig:
    needed: dict[str, dict[str, Any]] = {
        "AdaLoraConfig": {"total_step": 10},
        "CPTConfig": {
            "cpt_token_ids": [1],
            "cpt_mask": [1],
            "cpt_tokens_type_mask": [1],
            "task_type": "CAUSAL_LM",
        },
        "XLoraConfig": {"hidden_size": 8, "adapters": {"a": "b"}},
    }
    return config(**needed.get(config.__name__, {}))
