"""Decoder layers as one node: values and gradients of the modules, and stepping aside where they do something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from residency.backbones import CausalLM
from residency.kernels.layers import fuse_layers
from residency.kernels.lora import fuse_lora

ROW = torch.arange(1, 13)[None]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]])
# Five tokens, and two continuations of two and three tokens behind two common ones.
BRANCHED = ((5,), (2, 2, 3))
PLAIN = ((5,), (7,))


def saved(model: Any, folder: Path) -> Any:
    """The model as a backbone loads it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return CausalLM(path=str(folder)).load()


def small(kind: type[PretrainedConfig] = LlamaConfig, **options: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **options}))


def with_lora(model: Any, **options: Any) -> PeftModel:
    chosen = {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    tuned = get_peft_model(model, LoraConfig(**chosen))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=draw)
    fuse_lora(tuned)
    return tuned  # type: ignore[no-any-return]


def run(model: Any, segments: Any = BRANCHED) -> Tensor:
    out: Tensor = model(input_ids=ROW, position_ids=POSITIONS, attention_mask=None, segments=segments, use_cache=False)
    return out.logits  # type: ignore[attr-defined, no-any-return]


def nodes(model: Any) -> int:
    """Layers that were one node of the graph of one pass."""
    seen, queue = set(), [run(model).grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return sum(type(node).__name__ == "_DecoderLayerBackward" for node in seen)


def by_modules(model: Any) -> Any:
    """The same model with the layers' own forward."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if "self_attn" in module._modules:
            vars(module).pop("forward", None)
    return plain


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return saved(small(), tmp_path)


TUNERS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "two of them": {"target_modules": ["q_proj", "v_proj"]},
    "another rank here and there": {"rank_pattern": {"k_proj": 1, "gate_proj": 5}, "alpha_pattern": {"up_proj": 2}},
    "some layers only": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("segments", [PLAIN, BRANCHED], ids=["plain", "branched"])
@pytest.mark.parametrize("options", TUNERS.values(), ids=TUNERS)
def test_values_and_gradients_are_those_of_the_modules(model: Any, options: dict[str, Any], segments: Any) -> None:
    fused = with_lora(model, **options)
    plain = by_modules(fused)
    assert nodes(plain) == 0
    assert nodes(fused) == (1 if "layers_to_transform" in options else 2)  # behind what is trained; the last is trimmed
    weights = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    found = {}
    for name, one in (("fused", fused), ("plain", plain)):
        logits = run(one, segments)
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        found[name] = logits, torch.autograd.grad((logits[0] * weights).sum(), list(trained.values()))
    torch.testing.assert_close(found["fused"], found["plain"], rtol=2e-5, atol=2e-5)


def test_gradients_are_the_derivatives(model: Any) -> None:
    """Against differences, in double precision: the node alone."""
    from residency.kernels.decoder import Norm, Parts, decoder_layer
    from residency.kernels.lora import Linear
    from residency.kernels.segments import segments_seen

    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) / 2

    shapes = [(8, 8), (4, 8), (4, 8), (8, 8), (6, 8), (6, 8), (8, 6)]
    frozen = [(drawn(*shape), drawn(shape[0])) for shape in shapes]
    trained = [drawn(*s).requires_grad_() for out, width in shapes for s in ((2, width), (out, 2))]
    norms = Norm(drawn(8), 1e-5), Norm(drawn(8), 1e-5)
    angle = drawn(5, 1, 2).repeat(1, 1, 2)

    def layer(x: Tensor, *pairs: Tensor) -> Tensor:
        ab = zip(pairs[::2], pairs[1::2], strict=True)
        linear = tuple(Linear(w, bias, a, b, 0.7) for (w, bias), (a, b) in zip(frozen, ab, strict=True))
        return decoder_layer(x, angle.cos(), angle.sin(), segments_seen(((3,), (2,))), Parts(linear, norms, 4, 0.5))

    assert torch.autograd.gradcheck(layer, (drawn(5, 8).requires_grad_(), *trained))


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return small(Qwen2Config)


def _mistral() -> Any:
    from transformers import MistralConfig

    return small(MistralConfig, sliding_window=None)


def _gelu() -> Any:
    return small(hidden_act="gelu")


def _windowed() -> Any:
    from transformers import MistralConfig

    return small(MistralConfig, sliding_window=4)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return small(Qwen3Config, head_dim=4)


def _granite() -> Any:
    from transformers import GraniteConfig

    return small(GraniteConfig, residual_multiplier=0.5, attention_multiplier=0.5)


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (small, 2),
        (_qwen2, 2),  # with biases
        (_mistral, 2),
        (_gelu, 0),
        (_windowed, 0),
        (_qwen3, 0),  # norms of queries and keys
        (_granite, 0),  # scaled sums
    ],
)
def test_architectures_are_taken_where_trying_finds_the_same(
    make: Callable[[], Any], taken: int, tmp_path: Path
) -> None:
    model = with_lora(saved(make(), tmp_path))
    assert nodes(model) == taken
    torch.testing.assert_close(run(model), run(by_modules(model)), rtol=1e-4, atol=1e-4)


def test_more_layers_are_not_taken_twice(model: Any) -> None:
    assert fuse_layers(model) == 0
    assert fuse_layers(nn.Linear(2, 2)) == 0


def test_a_copy_computes_with_its_own_weights(model: Any) -> None:
    tuned = with_lora(model)
    other = copy.deepcopy(tuned)
    before = run(tuned)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert nodes(other) == 2
    torch.testing.assert_close(run(tuned), before, rtol=0, atol=0)
    assert (run(other) - before).abs().max() > 1e-3


def _hook(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].register_forward_hook(lambda *_: None)


def _hook_on_part(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _hook_on_norm(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].input_layernorm.register_full_backward_hook(lambda *_: None)


def _train_norm(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].post_attention_layernorm.weight.requires_grad_()


def _train_weight(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].self_attn.k_proj.base_layer.weight.requires_grad_()


def _replace(tuned: Any) -> None:
    layer = tuned.base_model.model.model.layers[0]
    layer.mlp.forward = lambda x: type(layer.mlp).forward(layer.mlp, x)


def _checkpoint(tuned: Any) -> None:
    tuned.base_model.model.model.layers[0].gradient_checkpointing = True
    tuned.base_model.model.model.layers[0]._gradient_checkpointing_func = lambda function, *args: function(*args)


@pytest.mark.parametrize(
    "change", [_hook, _hook_on_part, _hook_on_norm, _train_norm, _train_weight, _replace, _checkpoint]
)
def test_a_layer_steps_aside(model: Any, change: Callable[[Any], None]) -> None:
    tuned = with_lora(model)
    before = run(tuned)
    tuned.train()
    change(tuned)
    assert nodes(tuned) == 1
    torch.testing.assert_close(run(tuned), before, rtol=1e-5, atol=1e-5)


def test_merged_and_disabled_adapters(model: Any) -> None:
    tuned = with_lora(model)
    plain = by_modules(tuned)
    trained = run(tuned)
    with tuned.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(run(tuned), run(plain), rtol=1e-5, atol=1e-5)
        assert (run(tuned) - trained).abs().max() > 1e-2
    tuned.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(run(tuned), trained, rtol=1e-3, atol=1e-3)


def test_dropout_is_left_to_the_modules(model: Any) -> None:
    tuned = with_lora(model, lora_dropout=0.5)
    tuned.train()
    assert nodes(tuned) == 0
    tuned.eval()
    assert nodes(tuned) == 2


def test_padded_batches_go_through_the_modules(model: Any) -> None:
    tuned = with_lora(model)
    ids = ROW.view(2, 6)
    whole = tuned(input_ids=ids, attention_mask=torch.ones_like(ids))
    names, queue = set(), [whole.logits.grad_fn]
    while queue:
        node = queue.pop()
        names.add(type(node).__name__)
        queue += [parent for parent, _ in node.next_functions if parent is not None and len(names) < 200]
    assert "_LoraLinearBackward" in names
    assert "_DecoderLayerBackward" not in names


def test_half_precision_is_left_to_the_modules(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    model = CausalLM(path=str(tmp_path), dtype="bfloat16").load()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_hidden_states_are_those_of_the_layers(model: Any) -> None:
    found = model(input_ids=ROW, position_ids=POSITIONS, segments=PLAIN, output_hidden_states=True, use_cache=False)
    plain = by_modules(model)(
        input_ids=ROW, position_ids=POSITIONS, segments=PLAIN, output_hidden_states=True, use_cache=False
    )
    assert len(found.hidden_states) == len(plain.hidden_states) == 4
    torch.testing.assert_close(found.hidden_states, plain.hidden_states, rtol=1e-5, atol=1e-5)


def test_a_saved_model_is_as_before(tmp_path: Path) -> None:
    model = small()
    assert isinstance(model, LlamaForCausalLM)
    loaded = saved(model, tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
