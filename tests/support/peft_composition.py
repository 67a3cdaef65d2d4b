"""What each tuner of PEFT composes with, found by trying on a tiny model, and the table of it.

    PYTHONPATH=tests python tests/support/peft_composition.py

writes `experiments/adapters/composition.json` and `composition.md`; `tests/adapters/test_composition.py` tries again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import OSFConfig, PeftModel, get_peft_model

from residency.adapters import OSF, Adapter, Peft
from residency.adapters.peft_tools.wrapping import expected_remarks
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.testing.tiny_models import write_backbone
from support.peft_configs import CONFIGS
from support.tuned_models import attach, backbone, fresh, learn, logits, mixed

__all__ = ["FOLDER", "NAMES", "promised", "rendered", "tried"]

FOLDER = Path(__file__).parents[2] / "experiments" / "adapters"
NAMES = [*CONFIGS, "osf"]
COLUMNS = {
    "merge": "folds into the base's weights (largest error of a logit below 2e-6)",
    "several": "two adapters active at once, each with its effect, and adding the second changes nothing for the first",
    "quantised": "trains on an NF4 base (adapter off = that base; merged on the dequantised base = the same function)",
    "export": "plain PEFT or transformers load it and compute the same",
    "reference": "adapter off = the pretrained model, bit for bit",
    "averaged": "what weight mixing averages: updates, the parameters as they are, or nothing",
}
_ROUNDING = 2e-6


def make(name: str) -> Adapter:
    """The adapter of a name."""
    return OSF(config=_config(name)) if name == "osf" else Peft(config=_config(name))


def _config(name: str) -> Any:
    return OSFConfig(target_modules=["q_proj", "v_proj"]) if name == "osf" else CONFIGS[name]()


def promised(name: str) -> dict[str, bool]:
    """What the adapter says about itself, by column."""
    provides = make(name).provides
    return {
        "merge": "mergeable" in provides,
        "export": "exportable" in provides,
        "reference": "reference" in provides,
        "averaged": "averageable" in provides,
    }


def tried(name: str, folder: Path) -> dict[str, Any]:
    """One row of the table: every column tried on a trained adapter."""
    adapter, base = make(name), fresh(folder)
    model = attach(folder, adapter)
    learn(model)
    state, on = snapshot(adapter.state(model)), logits(model)
    with model.disable_adapter():
        reference = torch.equal(logits(model), logits(base))
    return {
        "merge": _holds(lambda: _distance(logits(model.merge_and_unload()), on)),
        "several": _several(name, folder),
        "quantised": _quantised(name, folder),
        "export": _holds(lambda: _distance(_exported(adapter, folder, state), on)),
        "reference": reference and name != "osf",  # before its first re-wrap the frozen part is still the base
        "averaged": _averaged(name, folder, state),
    }


def _holds(distance: Callable[[], float]) -> bool:
    """Whether something can be done at all, and is exact up to rounding."""
    try:
        with warnings.catch_warnings(), expected_remarks():
            warnings.simplefilter("ignore")
            return distance() < _ROUNDING
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError, UserError):
        return False


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _exported(adapter: Adapter, folder: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = attach(folder, adapter)
    adapter.load_state(model, state)
    with tempfile.TemporaryDirectory() as path:
        adapter.export(model, Path(path))
        if isinstance(adapter, OSF):
            return logits(AutoModelForCausalLM.from_pretrained(path))
        return logits(PeftModel.from_pretrained(fresh(folder), path))


def _several(name: str, folder: Path) -> bool:
    def differ() -> float:
        model = attach(folder, make(name))
        learn(model)
        alone = logits(model)
        model.add_adapter("two", _config(name))
        if _distance(logits(model), alone) > _ROUNDING:
            return 1.0  # the second one has changed what the first one stands on
        torch.manual_seed(1)
        for key, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.requires_grad or (".two" in key and p.is_floating_point() and "osf" not in key):
                p.data += 0.1 * torch.randn_like(p)
        found = []
        for active in (["default"], ["two"], ["default", "two"]):
            model.base_model.set_adapter(active)
            found.append(logits(model))
        apart = [_distance(found[2], found[0]), _distance(found[2], found[1])]
        return 0.0 if min(apart) > 1e-5 and all(torch.isfinite(x).all() for x in found) else 1.0

    return _holds(differ)


def _quantised(name: str, folder: Path) -> bool:
    def works() -> float:
        base = backbone(folder, quantised=True).load()
        pristine = logits(base)
        config = _config(name)
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(0)
        model: Any = get_peft_model(base, config)
        learn(model)
        on = logits(model)
        with model.disable_adapter():
            off = logits(model)
        if not torch.equal(off, pristine) or _distance(on, off) < 1e-5:
            return 1.0
        adapter = make(name)
        return _distance(logits(adapter.merge(model)), on) / 5 if "mergeable" in adapter.provides else 0.0

    return _holds(works)


def _averaged(name: str, folder: Path, state: dict[str, torch.Tensor]) -> str:
    """`updates`, `as they are` or `nothing`, by comparing the mean of two states with the mean of what they do."""
    adapter, model = make(name), attach(folder, make(name))
    adapter.load_state(model, state)
    learn(model, steps=4, lr=5e-2)
    other = snapshot(adapter.state(model))
    if "averageable" in adapter.provides and {*adapter.weights(model, state)} != {*state}:
        return "updates"
    if "mergeable" not in adapter.provides:
        return "as they are" if "averageable" in adapter.provides else "nothing"
    merged = []
    for one in (state, other, mixed(state, other)):
        fresh = attach(folder, adapter)
        adapter.load_state(fresh, one)
        merged.append(snapshot(dict(fresh.merge_and_unload().named_parameters())))
    error = sum(float(((merged[0][k] + merged[1][k]) / 2 - merged[2][k]).square().sum()) for k in merged[0])
    apart = sum(float((merged[0][k] - merged[1][k]).square().sum()) for k in merged[0])
    return "as they are" if (error / apart) ** 0.5 < 1e-5 else "nothing"


def rendered(table: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "# What each tuner of PEFT composes with",
        "",
        "Tried on a tiny random Llama by `tests/support/peft_composition.py`, which writes this file; the tests try",
        "again. Refused tuners and their reasons: `src/residency/adapters/peft_tools/tuners.py`.",
        "",
        *(f"* **{name}**: {meaning}" for name, meaning in COLUMNS.items()),
        "",
        "| preset | " + " | ".join(COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    words = {True: "yes", False: "no"}
    for name, row in table.items():
        cells = [words[row[c]] if isinstance(row[c], bool) else str(row[c]).replace("nothing", "no") for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try everything and write both files."""
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    with tempfile.TemporaryDirectory() as folder:
        backbone_folder = write_backbone(Path(folder) / "llama")
        table = {name: tried(name, backbone_folder) for name in sorted(NAMES)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "composition.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "composition.md").write_text(rendered(table), encoding="utf-8")
    sys.stdout.write(rendered(table))


if __name__ == "__main__":
    main()
