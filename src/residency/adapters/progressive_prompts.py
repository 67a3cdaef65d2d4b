"""Progressive Prompts (Razdaibiedina et al. 2023): a soft prompt per domain in front of all earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, PromptNLL, Served, copy_state
from residency.adapters.domain_names import KEY, read_names, write_names
from residency.core.errors import UserError
from residency.core.types import Example, Stage, Tensors, untyped

__all__ = ["ProgressivePrompts", "Prompted", "prepend"]


def prepend(prompts: Sequence[Tensor], embedded: Tensor) -> Tensor:
    """The input [P_t; ...; P_1; E(x)].

    Args:
        prompts: P_1 ... P_t, each (p, D).
        embedded: (B, T, D).

    Returns:
        (B, t p + T, D).
    """
    front = torch.cat([*reversed(prompts)]).to(embedded.dtype)
    return torch.cat([front.expand(embedded.shape[0], -1, -1), embedded], dim=1)


class Prompted(nn.Module):
    """A causal language model with soft prompts in front of its input.

    Args:
        model: The frozen backbone.
        hidden: Width of the residual MLP through which the newest prompt is trained; 0 = none.
    """

    def __init__(self, model: nn.Module, *, hidden: int) -> None:
        super().__init__()
        self.base_model = model
        self.prompts = nn.ParameterList()
        size = self.embeddings.embedding_dim
        self.reparam = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size)) if hidden else None
        self.active: int | None = None
        """How many prompts are in front of a row, from the oldest; `None` = all."""

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.base_model.config

    @property
    def embeddings(self) -> nn.Embedding:
        """The backbone's input embeddings."""
        result: nn.Embedding = untyped(self.base_model).get_input_embeddings()
        return result

    def get_base_model(self) -> nn.Module:
        """The backbone."""
        return self.base_model

    def front(self) -> list[Tensor]:
        """The prompts in use; the newest one by way of its MLP while that trains."""
        prompts: list[Tensor] = [*self.prompts]
        if self.reparam is not None and prompts:
            prompts[-1] = prompts[-1] + self.reparam(prompts[-1])
        return prompts[: self.active]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The backbone on the prompts and the row; logits of the prompts' positions come first.

        Raises:
            ValueError: A packed row: every example in it would need prompts of its own.
        """
        if "segments" in options:
            raise ValueError("soft prompts stand in front of a row, and a packed row holds several examples")
        prompts = self.front()
        if not prompts:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)
        embedded = prepend(prompts, self.embeddings(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.base_model(inputs_embeds=embedded, attention_mask=_widened(mask, embedded.shape[1]), **options)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """(B, T + new) the row and its continuation, as the backbone's own `generate` returns them."""
        prompts = self.front()
        run: Any = self.base_model.generate
        if not prompts:
            result: Tensor = run(input_ids=input_ids, attention_mask=attention_mask, **options)
            return result
        embedded = prepend(prompts, self.embeddings(input_ids))
        new = run(inputs_embeds=embedded, attention_mask=_widened(attention_mask, embedded.shape[1]), **options)
        return torch.cat([input_ids, new], dim=1)


class ProgressivePrompts(Adapter):
    """The base is frozen; each domain trains its own prompt behind which all earlier ones stand, frozen too.

    Domain j is answered with prompts 1 ... j, so nothing is forgotten by construction, and the score says which domain
    a row is from: the run is marked so. A domain that was not learned yet is answered with all prompts.

    Args:
        length: Virtual tokens per domain, p.
        hidden: Width of the residual MLP P + MLP(P) that is folded into the prompt after its domain; 0 = none.
    """

    continues = False
    provides = frozenset({"reference", "exportable"})
    task_id_at_test = True
    not_on_classifiers = "a prompt in front of a text would be what the head reads, or hide where the text ends"

    def __init__(self, *, length: int = 10, hidden: int = 0) -> None:
        if length < 1 or hidden < 0:
            raise UserError(
                f"ProgressivePrompts with length={length}, hidden={hidden}",
                why="every domain needs at least one virtual token, and a width cannot be negative",
                fix="give length: 10 and hidden: 0 (no MLP), or a width such as 800",
            )
        self.length = length
        self.hidden = hidden

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the backbone; the first prompt."""
        if isinstance(model, Prompted):
            return model
        wrapped = Prompted(model.requires_grad_(False), hidden=self.hidden)
        wrapped.train(model.training)
        wrapped.prompts.append(self._drawn(wrapped))
        write_names(wrapped, [])
        return wrapped

    def _drawn(self, model: Prompted) -> nn.Parameter:
        """A prompt from the embeddings of random tokens (Lester et al. 2021), float32."""
        table = model.embeddings.weight
        chosen = torch.randint(table.shape[0], (self.length,)).to(table.device)
        return nn.Parameter(table.detach()[chosen].float().clone())

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """A new prompt; the earlier ones are frozen, the MLP starts anew."""
        assert isinstance(model, Prompted)
        names = self.domains(model)[: stage.index]
        if stage.index:
            _resize(model, stage.index, self.length)
            model.prompts.append(self._drawn(model))
        _train_last(model)
        if model.reparam is not None:
            for layer in model.reparam:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        write_names(model, [*names, stage.domain])

    @torch.no_grad()
    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Fold the MLP into the prompt and silence it."""
        assert isinstance(model, Prompted)
        if model.reparam is not None:
            model.prompts[-1].copy_(model.front()[-1])
            for parameter in untyped(model).reparam[-1].parameters():
                parameter.zero_()

    def domains(self, model: nn.Module) -> list[str]:
        """Domains with a prompt, in order of learning."""
        return read_names(model.get_buffer(KEY))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All prompts, the MLP and the names of the domains."""
        parts = {n: p.detach() for n, p in model.named_parameters() if n.startswith(("prompts.", "reparam."))}
        return {**parts, KEY: model.get_buffer(KEY)}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Make as many prompts as the state has, and copy them.

        Raises:
            UserError: As for every adapter.
        """
        assert isinstance(model, Prompted)
        names = read_names(state[KEY]) if KEY in state else []
        _resize(model, max(1, len(names)), self.length)
        write_names(model, names)
        copy_state(self.state(model), state, owner=type(self).__name__)

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """No prompts."""
        return _using(model, 0)

    def route(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """A domain with the prompts up to its own; what was not learned with all of them."""
        names = self.domains(model)
        yield _using(model, names.index(column) + 1 if column in names else None), examples

    def export(self, model: nn.Module, path: Path) -> None:
        """One prompt-tuning adapter of PEFT that holds all prompts, newest first."""
        assert isinstance(model, Prompted)
        front = torch.cat([*reversed(model.front())]).detach()
        tuned: Any = get_peft_model(
            untyped(model).base_model,
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(front)),
        )
        with torch.no_grad():
            tuned.prompt_encoder["default"].embedding.weight.copy_(front)
        tuned.save_pretrained(path)


def _widened(mask: Tensor, width: int) -> Tensor:
    """A mask with ones for the virtual tokens in front, (B, width)."""
    return torch.cat([mask.new_ones(len(mask), width - mask.shape[1]), mask], dim=1)


def _resize(model: Prompted, count: int, length: int) -> None:
    """The first `count` prompts; new ones are empty, to be copied into."""
    size = model.embeddings.embedding_dim
    device = model.embeddings.weight.device
    kept = [*model.prompts][:count]
    new = [nn.Parameter(torch.zeros(length, size, device=device)) for _ in range(count - len(kept))]
    model.prompts = nn.ParameterList([*kept, *new])
    _train_last(model)


def _train_last(model: Prompted) -> None:
    for index, prompt in enumerate(model.prompts):
        prompt.requires_grad_(index == len(model.prompts) - 1)


@contextmanager
def _using(model: nn.Module, count: int | None) -> Iterator[None]:
    assert isinstance(model, Prompted)
    before, model.active = model.active, count
    try:
        yield
    finally:
        model.active = before
