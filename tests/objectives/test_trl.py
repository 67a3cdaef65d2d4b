"""Every loss against TRL's trainers on the same rows and model: the trainer lays out the batch, both read it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from residency.backbones.supervised import supervised_logits
from residency.core.batching import make_batch
from residency.core.types import Branch, Example
from residency.objectives.pair_losses import (
    PairSums,
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    dpo,
    hinge,
    ipo,
    kto,
    kto_baseline,
    nca,
    odds_ratio,
    robust,
    sigmoid_norm,
    simpo,
)
from residency.objectives.policy_losses import answer_weights, clipped_surrogate, kl_penalty
from residency.objectives.reward_losses import bradley_terry, centring
from residency.objectives.reward_model import RewardModel, asked_behind
from residency.objectives.token_losses import probability_weights

trl: Any = pytest.importorskip("trl", minversion="1.16", reason="pip install residency[trl]")

# TRL and what it brings remark on many things that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = [f"w{i}" for i in range(60)]
PAIRS = [
    ("w1 w2 w3 ", "w4 w5 w6 w7", "w8 w9"),
    ("w10 w11 ", "w12", "w13 w14 w15"),
    ("w20 w21 w22 ", "w4 w30", "w5 w31"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A word is a token, so that no two tokens merge across the border of prompt and completion."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(seed: int, kind: str = "LlamaForCausalLM") -> Any:
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 63}
    more = {"num_labels": 1} if "Classification" in kind else {}
    config = transformers.LlamaConfig(**sizes, **more, num_attention_heads=2, pad_token_id=0, eos_token_id=1)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Float32 on the CPU, without checkpointing: TRL's defaults are otherwise."""
    plain = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}
    return {**plain, "gradient_checkpointing": False, "per_device_train_batch_size": 3, "seed": 0, **more}


def pair_rows() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])


def log_likelihoods(model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the masked tokens of each row, and their number."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    log_p = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (log_p * mask[:, 1:]).sum(-1), mask[:, 1:].sum(-1).float()


def pair_sums(model: Any, reference: Any, batch: Any) -> PairSums:
    """The trainer's batch is all chosen, then all rejected."""
    key = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    (chosen, rejected), counts = log_likelihoods(model, *key)[0].chunk(2), log_likelihoods(model, *key)[1].chunk(2)
    with torch.no_grad():
        base = log_likelihoods(reference, *key)[0].chunk(2)
    names = ("chosen_tokens", "rejected_tokens", "reference_chosen", "reference_rejected")
    return PairSums(chosen=chosen, rejected=rejected, **dict(zip(names, (*counts, *base), strict=True)))


def gradient(loss: Tensor, model: Any) -> Tensor:
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(leaves, found, strict=True)]
    )


def same(ours: Tensor, theirs: Tensor, model: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.item() != 0 or theirs.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradient(ours, model), gradient(theirs, model), rtol=1e-3, atol=1e-5)


DPO: dict[str, Callable[[PairSums], Tensor]] = {
    "sigmoid": partial(dpo, beta=0.1),
    "robust": partial(robust, beta=0.1, smoothing=0.1),
    "hinge": partial(hinge, beta=0.1),
    "ipo": partial(ipo, beta=0.1),
    "sigmoid_norm": partial(sigmoid_norm, beta=0.1),
    "nca_pair": partial(nca, beta=0.1),
    "bco_pair": partial(bco_pair, beta=0.1),
    "apo_zero": partial(apo_zero, beta=0.1),
    "apo_down": partial(apo_down, beta=0.1),
}


@pytest.mark.parametrize("name", DPO)
def test_losses_of_pairs(name: str, tokenizer: Any, tmp_path: Path) -> None:
    settings = arguments(tmp_path, loss_type=name, label_smoothing=0.1 if name == "robust" else 0.0)
    trainer = trl.DPOTrainer(
        model=llama(1),
        ref_model=llama(2),
        args=trl.DPOConfig(**settings),
        train_dataset=pair_rows(),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    sums = pair_sums(trainer.model, trainer.ref_model, batch)
    assert sums.chosen_tokens.tolist() != sums.rejected_tokens.tolist()
    same(DPO[name](sums).mean(), theirs, trainer.model)


def test_kto(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"prompt": p, "completion": c, "label": i != 1} for i, (p, c, _) in enumerate(PAIRS)]
    trainer = trl.KTOTrainer(
        model=llama(1),
        ref_model=llama(2),
        args=trl.KTOConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)

    def ratio(prefix: str) -> Tensor:
        key = [batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")]
        with torch.no_grad():
            base = log_likelihoods(trainer.ref_model, *key)[0]
        return log_likelihoods(trainer.model, *key)[0] - base

    baseline = kto_baseline(ratio("KL_"))
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    same(kto(ratio(""), good, baseline, beta=0.1, weights=(1.0, 1.0)).mean(), theirs, trainer.model)


@pytest.mark.parametrize("centre", [None, 0.01])
def test_reward_model(centre: float | None, tokenizer: Any, tmp_path: Path) -> None:
    rows = pair_rows().add_column("margin", [0.3, 0.0, 1.0])
    trainer = trl.RewardTrainer(
        model=llama(1, "LlamaForSequenceClassification"),
        args=trl.RewardConfig(**arguments(tmp_path, center_rewards_coefficient=centre)),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    margin = batch["margin"]
    reads = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    chosen, rejected = trainer.model(**reads).logits.squeeze(-1).chunk(2)
    ours = bradley_terry(chosen, rejected, margin) + (centre or 0.0) * centring(chosen, rejected)
    same(ours.mean(), theirs, trainer.model)


@pytest.mark.parametrize("centre", [None, 0.01])
def test_the_reward_model_on_the_head(centre: float | None, tokenizer: Any, tmp_path: Path) -> None:
    """The whole objective: a classifier whose score is the head's row of the end token is the same model."""
    body, classifier = llama(1), llama(2, "LlamaForSequenceClassification")
    classifier.model.load_state_dict(body.model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(body.lm_head.weight[1:2])
    trainer = trl.RewardTrainer(
        model=classifier,
        args=trl.RewardConfig(**arguments(tmp_path, center_rewards_coefficient=centre)),
        train_dataset=pair_rows().add_column("margin", [0.3, 0.0, 1.0]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    laid = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in laid]
    pairs = zip(rows[:3], rows[3:], batch["margin"].tolist(), strict=True)
    examples = [
        Example(
            domain="a",
            row=str(i),
            prompt=chosen[:1],
            branches=(Branch(tokens=chosen[1:], role="chosen"), Branch(tokens=rejected[1:], role="rejected")),
            extra={"margin": margin},
        )
        for i, (chosen, rejected, margin) in enumerate(pairs)
    ]
    theirs = trainer.compute_loss(classifier, dict(batch))
    laid_out = make_batch([asked_behind(e, 1) for e in examples], layout="padded")
    ours = RewardModel(centring=centre or 0.0)(partial(supervised_logits, body), laid_out, None).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_losses_without_a_reference(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "orpo":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
    more = {"cpo": {"cpo_alpha": 1.0}, "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}}.get(name, {})
    settings = arguments(tmp_path, max_length=64, remove_unused_columns=False, **more)
    trainer = Trainer(model=llama(1), args=Config(**settings), train_dataset=pair_rows(), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, batch)
    sums = {
        side: log_likelihoods(
            trainer.model,
            batch[f"{side}_input_ids"],
            batch[f"{side}_attention_mask"],
            (batch[f"{side}_labels"] != -100).long(),
        )
        for side in ("chosen", "rejected")
    }
    (chosen, chosen_tokens), (rejected, rejected_tokens) = sums["chosen"], sums["rejected"]
    zero = torch.zeros_like(chosen)
    pairs = PairSums(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        reference_chosen=zero,
        reference_rejected=zero,
    )
    if name == "orpo":
        # TRL's likelihood term is over prompt and completion.
        text = log_likelihoods(
            trainer.model, batch["chosen_input_ids"], batch["chosen_attention_mask"], batch["chosen_attention_mask"]
        )
        ours = -text[0].sum() / text[1].sum() + 0.1 * odds_ratio(pairs).mean()
    elif name == "cpo":
        ours = cpo(pairs, beta=0.1).mean() - chosen.sum() / chosen_tokens.sum()
    else:
        ours = simpo(pairs, beta=2.0, gamma=0.5).mean()
    same(ours, theirs, trainer.model)


def rollouts() -> dict[str, Tensor]:
    """Two prompts with two answers each, of unequal lengths."""
    completion = torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0], [9, 10, 1, 0], [11, 12, 13, 14]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    prompt = torch.tensor([[20, 21, 22], [20, 21, 22], [23, 24, 25], [23, 24, 25]])
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.25]),
        "num_items_in_batch": mask.sum(),
    }


def token_log_p(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(S, T) of the completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, 2:-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 3:, None]).squeeze(-1)


@pytest.mark.parametrize(("name", "aggregate"), [("dapo", "tokens"), ("grpo", "sequences"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(name: str, aggregate: Any, beta: float, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    settings = arguments(tmp_path, loss_type=name, num_generations=2, max_completion_length=8, epsilon_high=0.28)
    trainer = trl.GRPOTrainer(
        model=llama(1),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.GRPOConfig(**{**settings, "per_device_train_batch_size": 4}),
        train_dataset=Dataset.from_list([{"prompt": p} for p, *_ in PAIRS]),
        processing_class=tokenizer,
    )
    inputs, model = rollouts(), trainer.model
    with torch.no_grad():
        # The policy that wrote the answers is a little behind, so that some ratios are clipped.
        old = token_log_p(model, inputs) + torch.linspace(-0.6, 0.6, 16).view(4, 4)
        reference = token_log_p(llama(1), inputs) + torch.linspace(0.4, -0.4, 16).view(4, 4)
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
    trainer.beta, trainer.current_gradient_accumulation_steps = beta, 1
    theirs = trainer._compute_loss(model, inputs)
    log_p, mask = token_log_p(model, inputs), inputs["completion_mask"].bool()
    advantages = inputs["advantages"][:, None].expand(4, 4)
    loss, clipped = clipped_surrogate(log_p - old, advantages, clip_low=0.2, clip_high=0.28)
    assert bool(clipped[mask].any())
    assert not bool(clipped[mask].all())
    if beta:
        loss = loss + beta * kl_penalty(log_p, reference, log_p - old, kind="k3", corrected=True)
    lengths = mask.sum(-1)
    per_answer = answer_weights(lengths, aggregate=aggregate, longest=8) * (loss * mask).sum(-1)
    ours = per_answer.sum() / (int(lengths.sum()) if aggregate == "tokens" else 4)
    same(ours, theirs, model)


def test_rloo(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    settings = arguments(tmp_path, num_generations=2, max_completion_length=8, beta=0.0)
    trainer = trl.RLOOTrainer(
        model=llama(1),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.RLOOConfig(**{**settings, "per_device_train_batch_size": 4}),
        train_dataset=Dataset.from_list([{"prompt": p} for p, *_ in PAIRS]),
        processing_class=tokenizer,
    )
    inputs, model = rollouts(), trainer.model
    mask = inputs["completion_mask"]
    with torch.no_grad():
        old = (token_log_p(model, inputs) * mask).sum(-1) + torch.tensor([0.5, -0.1, -0.5, 0.1])
    inputs["old_logps"] = old
    theirs = trainer._compute_loss(model, inputs)
    log_ratio = (token_log_p(model, inputs) * mask).sum(-1) - old
    same(clipped_surrogate(log_ratio, inputs["advantages"])[0].mean(), theirs, model)


def test_dft(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in PAIRS])
    trainer = trl.SFTTrainer(
        model=llama(1),
        args=trl.SFTConfig(**arguments(tmp_path, loss_type="dft")),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][:, 1:]
    theirs = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=(labels != -100).sum())
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    same((probability_weights(nll) * nll).mean(), theirs, trainer.model)
    assert not math.isclose(theirs.item(), nll.mean().item())
