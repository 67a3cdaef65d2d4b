"""One adapter per domain on a frozen base, and who answers when nobody says which domain a row is from."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, PromptNLL, Served, copy_state, missing_capability
from residency.adapters.domain_names import KEY, read_names, write_names
from residency.adapters.peft_tools.folding import merged_lora
from residency.adapters.peft_tools.tuners import capabilities, check_config, kind_of
from residency.adapters.peft_tools.wrapping import task_of, wrap
from residency.core.errors import UserError
from residency.core.types import Example, Stage, Tensors, untyped
from residency.scorers.base import ScoreInfo

__all__ = ["PerDomain", "group_rows", "lowest"]

Routing = Literal["oracle", "nll", "last"]

_NATS = "nats per completion token"
_SCORES = {
    "nll_routed": ScoreInfo(higher_is_better=False, unit=f"{_NATS}, domain not told", per_token=True),
    "nll_newest": ScoreInfo(higher_is_better=False, unit=f"{_NATS} under the newest adapter", per_token=True),
    "routing_error": ScoreInfo(higher_is_better=False, unit="share of rows routed to another domain's adapter"),
}
# Tuners that keep several named adapters beside each other, each complete in itself.
_SEVERAL = frozenset({"LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "MISS"})


def lowest(prompt_nll: Tensor) -> Tensor:
    """Route every row to the block that finds its prompt the least surprising.

    Args:
        prompt_nll: (blocks, B) nats per prompt token.

    Returns:
        (B,) index of the block; the earliest of equals.
    """
    return prompt_nll.argmin(0)


def group_rows(choice: Sequence[int], examples: Sequence[Example]) -> dict[int, list[Example]]:
    """Rows by the block that answers them, blocks in order, rows in their own order."""
    found: dict[int, list[Example]] = {}
    for block, example in sorted(zip(choice, examples, strict=True), key=lambda pair: pair[0]):
        found.setdefault(block, []).append(example)
    return found


class PerDomain(Adapter):
    """A fresh adapter for every domain; the base and the earlier adapters stay as they are.

    With `oracle` nothing is ever forgotten, by construction: the score says which domain a row is from. Read the scores
    `nll_routed` (rows routed by prompt likelihood, without the name of the domain), `routing_error` and `nll_newest`
    (row k = every domain under the k-th adapter: the wrong-adapter matrix) beside it.

    Args:
        config: Of every adapter: `peft.LoraConfig` or another tuner that keeps several adapters side by side.
        routing: `oracle`: the domain's own adapter, the base where it has none yet; the run is marked as using the
            task id at test. `nll`: the adapter under which a row's prompt is most likely. `last`: always the newest.
        compare: Score the routed and the newest adapter too, beside the oracle (costs one scoring of every domain and
            one of every prompt per adapter).

    Raises:
        UserError: The tuner cannot keep several adapters on one unchanged base.
    """

    continues = False
    scorers = _SCORES

    def __init__(self, *, config: PeftConfig, routing: Routing = "oracle", compare: bool = True) -> None:
        check_config(config)
        if kind_of(config) not in _SEVERAL or "reference" not in capabilities(config):
            raise UserError(
                f"PerDomain with {type(config).__name__}",
                why="every domain gets an adapter of its own on one unchanged base, and this tuner or its "
                "initialisation shares or changes something",
                fix="use peft.LoraConfig with its standard initialisation and bias: none, as "
                "configs/adapter/per_domain.yaml",
            )
        self.config = config
        self.routing = routing
        self.compare = compare
        self.task_id_at_test = routing == "oracle"
        if routing == "nll" or compare:
            why = "it compares adapters by the likelihood of prompts; routing: oracle with compare: false does not"
            self.not_on_classifiers = why
        self.provides = capabilities(config) & {"reference", "exportable", "linear"}

    def attach(self, model: nn.Module) -> nn.Module:
        """The first domain's adapter."""
        attached = wrap(model, self.config, name=_block(0))
        if KEY not in dict(attached.named_buffers()):
            write_names(attached, [])
        return attached

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """A new adapter; the others are frozen."""
        names = self.domains(model)[: stage.index]
        self._resize(model, stage.index if stage.index else 1)
        if stage.index:
            self._resize(model, stage.index + 1)
        write_names(model, [*names, stage.domain])

    def _resize(self, model: Any, blocks: int) -> None:
        """As many adapters as asked for, the last one active and trainable."""
        if blocks < len(model.peft_config):
            model.set_adapter(_block(blocks - 1))  # PEFT warns when the active adapter is deleted
        for index in range(len(model.peft_config) - 1, blocks - 1, -1):
            model.delete_adapter(_block(index))
        for index in range(len(model.peft_config), blocks):
            config = copy.deepcopy(self.config)
            config.task_type = config.task_type or task_of(model)
            model.add_adapter(_block(index), config)
        model.set_adapter(_block(blocks - 1))

    def domains(self, model: nn.Module) -> list[str]:
        """Domains with an adapter, in order of learning."""
        return read_names(model.get_buffer(KEY))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All adapters and the names of their domains."""
        parts = {n: p.detach() for n, p in model.named_parameters() if any(_owns(b, n) for b in _blocks(model))}
        return {**parts, KEY: model.get_buffer(KEY)}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Make as many adapters as the state has, and copy them.

        Raises:
            UserError: As for every adapter.
        """
        names = read_names(state[KEY]) if KEY in state else []
        self._resize(model, max(1, len(names)))
        write_names(model, names)
        copy_state(self.state(model), state, owner=type(self).__name__)

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """All adapters off."""
        result: AbstractContextManager[Any] = untyped(model).disable_adapter()
        return result

    def route(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """By name, by prompt, or always the newest (see `routing`)."""
        names = self.domains(model)
        if self.routing == "oracle":
            known = column in names
            yield (_active(model, names.index(column)) if known else self.reference(model)), examples
        elif self.routing == "last" or len(names) < 2:
            yield _active(model, max(0, len(names) - 1)), examples
        else:
            choice = lowest(self._prompts(model, examples, prompt_nll)).tolist()
            for block, rows in group_rows(choice, examples).items():
                yield _active(model, block), rows

    def extra_scores(
        self,
        model: nn.Module,
        column: str,
        examples: Sequence[Example],
        completion_nll: PromptNLL,
        prompt_nll: PromptNLL,
    ) -> Mapping[str, Tensor]:
        """Without the name of the domain: rows routed by their prompts; and everything under the newest adapter."""
        names = self.domains(model)
        if not (self.compare and self.routing == "oracle" and names and examples):
            return {}
        with _active(model, len(names) - 1):
            newest = completion_nll(examples)
        found = {"nll_newest": newest}
        choice = lowest(self._prompts(model, examples, prompt_nll))
        routed = newest.clone()
        place = {id(example): i for i, example in enumerate(examples)}
        for block, rows in group_rows(choice.tolist(), examples).items():
            if block < len(names) - 1:
                with _active(model, block):
                    routed[[place[id(row)] for row in rows]] = completion_nll(rows)
        found["nll_routed"] = routed
        if column in names:
            found["routing_error"] = (choice != names.index(column)).double()
        return found

    def _prompts(self, model: nn.Module, examples: Sequence[Example], prompt_nll: PromptNLL) -> Tensor:
        """(blocks, B) nats per prompt token under every adapter."""
        rows = []
        for block in range(len(self.domains(model))):
            with _active(model, block):
                rows.append(prompt_nll(examples))
        return torch.stack(rows)

    def folded_for_scoring(self, model: nn.Module) -> AbstractContextManager[Any]:
        """LoRA folded into the weights (`residency.adapters.peft_tools.folding`)."""
        return merged_lora(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """There is no one model that answers as all adapters do."""
        raise missing_capability(self, "mergeable")

    def export(self, model: nn.Module, path: Path) -> None:
        """The newest adapter as a plain PEFT folder, and every adapter in a folder `block-<k>` inside (k from 1)."""
        count = len(_blocks(model))
        untyped(model).save_pretrained(path, selected_adapters=_blocks(model))
        for index in range(count):
            (path / _block(index)).rename(path / f"block-{index + 1}")
        shutil.copytree(path / f"block-{count}", path, dirs_exist_ok=True)


@contextmanager
def _active(model: Any, block: int) -> Iterator[None]:
    """Inside, one adapter answers; what trains afterwards is what trained before."""
    before = model.active_adapter
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_adapter(_block(block), inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


def _block(index: int) -> str:
    return f"domain{index + 1}"


def _blocks(model: Any) -> list[str]:
    return list(model.peft_config)


def _owns(block: str, parameter: str) -> bool:
    return f".{block}." in parameter or parameter.endswith(f".{block}")
