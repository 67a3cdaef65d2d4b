"""One row per adapter, mitigation, objective, scorer, metric, domain, augmentation: `residency.testing` runs on all.

A new plug-in is one row here, and inherits all properties of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, OSFConfig

from residency import scorers
from residency.adapters import (
    OSF,
    SLAO,
    Bottleneck,
    Freeze,
    GaLore,
    IncLoRA,
    InfLoRA,
    Peft,
    PerDomain,
    ProgressivePrompts,
    SinkhornResidual,
)
from residency.adapters.algebra.orthogonality import Orthogonality
from residency.backbones import Quantisation
from residency.core.assets.cache import PACKAGES, package_folder
from residency.domains import augmentation, packaged
from residency.domains.base import Domain
from residency.domains.controlled import Controlled
from residency.domains.jsonl import Jsonl
from residency.domains.table import Table
from residency.metrics.discovery import matrix_metrics
from residency.mitigations import (
    AGEM,
    DARE,
    DER,
    EMA,
    EWC,
    GEM,
    GPM,
    L2SP,
    MAS,
    MIGU,
    OGD,
    SDFT,
    SI,
    SLERP,
    TIES,
    EarlyStopping,
    FisherMerge,
    GenerativeReplay,
    IntruderReduction,
    KroneckerEWC,
    MagMax,
    OnPolicyDistillation,
    Replay,
    SelfDistillation,
    Soup,
    SourceShielding,
    TaskArithmetic,
    WeightMixing,
    WiseFT,
    ZClip,
)
from residency.objectives import (
    ASFT,
    DFT,
    EAFT,
    FLOW,
    GRPO,
    KTO,
    RLOO,
    SFT,
    STM,
    TALR,
    FullText,
    LabelPolicy,
    Preference,
    RewardModel,
)
from residency.objectives.pair_losses import PAIR_LOSSES
from residency.objectives.rewards import ExactLabel
from residency.scorers.base import Answer, LabelScore, Scorer
from residency.testing import (
    AdapterRow,
    AugmentationRow,
    DomainRow,
    MetricRow,
    MitigationRow,
    ObjectiveRow,
    ScorerRow,
    partners,
    write_domain,
)
from residency.testing.objective_rows import Parity
from support.peft_configs import CONFIGS, IDENTITY
from support.small_wordnet import write_wordnet
from support.translators import write_translator

__all__ = ["ADAPTERS", "AUGMENTATIONS", "DOMAINS", "METRICS", "MITIGATIONS", "OBJECTIVES", "SCORERS"]


def _peft_adapter(name: str) -> Peft:
    return Peft(config=CONFIGS[name]())


def _peft(name: str) -> AdapterRow:
    make = partial(_peft_adapter, name)
    return AdapterRow(make=make, identity=IDENTITY.get(name, "exact"), seeded=name == "lora")


def _blocks(**options: Any) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6, **options)


ADAPTERS: dict[str, AdapterRow] = {
    "lora_plus": AdapterRow(make=lambda: Peft(config=CONFIGS["lora"](), lr_ratio=16.0), seeded=True),
    "qlora": AdapterRow(make=lambda: Peft(config=CONFIGS["lora"]()), loading={"quantisation": Quantisation()}),
    "osf": AdapterRow(
        make=lambda: OSF(config=OSFConfig(target_modules=["q_proj", "v_proj"])),
        identity="close",
        loads_with="transformers",
        repeats=False,
    ),
    "per_domain": AdapterRow(make=lambda: PerDomain(config=CONFIGS["lora"]())),
    "per_domain_nll": AdapterRow(make=lambda: PerDomain(config=CONFIGS["ia3"](), routing="nll")),
    "progressive_prompts": AdapterRow(make=lambda: ProgressivePrompts(length=3), identity="none"),
    "progressive_prompts_mlp": AdapterRow(make=lambda: ProgressivePrompts(length=2, hidden=4), identity="none"),
    "freeze": AdapterRow(make=lambda: Freeze(bottom=1, freeze=["norm"]), loads_with="transformers"),
    "galore": AdapterRow(make=lambda: GaLore(rank=4, gap=3), loads_with="transformers"),
    "galore_layerwise": AdapterRow(
        make=lambda: GaLore(rank=4, gap=3, layerwise=True),
        loads_with="transformers",
        trainer={"gradient_clip_val": None},
    ),
    "sinkhorn_modular": AdapterRow(
        make=lambda: SinkhornResidual(inner=PerDomain(config=CONFIGS["lora"]()), mixing="unconstrained", rank=2),
        loads_with="residency",
        still=("residency_mixing",),
    ),
    "bottleneck": AdapterRow(make=lambda: Bottleneck(placement="houlsby", reduction=8), loads_with="residency"),
    "sinkhorn": AdapterRow(
        make=lambda: SinkhornResidual(inner=Peft(config=CONFIGS["lora"]()), rank=2, structural_lr_ratio=1.0),
        loads_with="residency",
        # A gate that is pushed below zero stays closed, and nothing behind it has a gradient.
        still=("residency_mixing",),
    ),
    "o_lora": AdapterRow(make=lambda: IncLoRA(config=_blocks(lora_dropout=0.1), penalty=Orthogonality(shrinkage=0.01))),
    "inf_lora": AdapterRow(make=lambda: InfLoRA(config=_blocks(), energy=0.9)),
    "slao": AdapterRow(make=lambda: SLAO(config=_blocks())),
    **{name: _peft(name) for name in CONFIGS},
    **partners.ADAPTERS,
}

MITIGATIONS: dict[str, MitigationRow] = {
    "replay": partners.MITIGATIONS["replay"],
    "replay_herding_loss": MitigationRow(
        make=lambda: Replay(ratio=1.0, every=2, capacity=6, policy="herding", draw="loss"),
        off=lambda: Replay(ratio=0.0, capacity=6, policy="herding", draw="loss"),
    ),
    "replay_kmeans_mir": MitigationRow(
        make=lambda: Replay(ratio=0.5, capacity=6, policy="kmeans", draw="mir", candidates=4),
        off=lambda: Replay(ratio=0.0, capacity=6, policy="kmeans", draw="mir"),
    ),
    "der": MitigationRow(make=lambda: DER(alpha=0.3, capacity=6, top_k=4), off=lambda: DER(alpha=0.0, beta=0.0)),
    "generative_replay": MitigationRow(
        make=lambda: GenerativeReplay(ratio=0.5, examples=6, kept=4, oversample=2),
        off=lambda: GenerativeReplay(ratio=0.0, examples=2, kept=2),
    ),
    "lamol": MitigationRow(
        make=lambda: GenerativeReplay(ratio=0.5, examples=6, shots=0, kept=0, prompt_loss=0.25),
        off=lambda: GenerativeReplay(ratio=0.0, examples=2, shots=0, kept=0),
    ),
    "dare": MitigationRow(make=lambda: DARE(drop=0.3, strength=0.6), off=lambda: DARE(drop=0.0, strength=1.0, last=1)),
    # That every improvement is too small makes it go back to the first state that it saw.
    "early_stopping": MitigationRow(
        make=lambda: EarlyStopping(every=1, min_delta=100.0), off=lambda: EarlyStopping(every=0)
    ),
    "ema": MitigationRow(make=lambda: EMA(decay=0.9), off=lambda: EMA(decay=0.0)),
    "ewc": partners.MITIGATIONS["ewc"],
    "ewc_online": MitigationRow(
        make=lambda: EWC(strength=1000.0, mode="online", decay=0.9, fisher_samples=6),
        off=lambda: EWC(strength=0.0, mode="online"),
    ),
    "agem": MitigationRow(
        make=lambda: AGEM(capacity=12, samples=3),
        off=lambda: AGEM(strength=0.0, capacity=12, samples=3),
        conditional=True,
    ),
    "gem": MitigationRow(
        make=lambda: GEM(capacity=6, samples=3), off=lambda: GEM(strength=0.0, capacity=6), conditional=True
    ),
    "gpm": MitigationRow(make=lambda: GPM(samples=6), off=lambda: GPM(energy=0.0)),
    "ogd": MitigationRow(make=lambda: OGD(examples=3), off=lambda: OGD(strength=0.0, examples=3)),
    "source_shielding": MitigationRow(
        make=lambda: SourceShielding(samples=3, tokens=8), off=lambda: SourceShielding(ratio=0.0)
    ),
    "migu": MitigationRow(make=MIGU, off=lambda: MIGU(threshold=0.0)),
    "zclip": MitigationRow(
        make=lambda: ZClip(threshold=0.01, warmup=1), off=lambda: ZClip(threshold=math.inf, warmup=1), conditional=True
    ),
    "ewc_sampled": MitigationRow(
        make=lambda: EWC(strength=1e6, fisher="sampled", granularity="token", fisher_samples=4),
        off=lambda: EWC(strength=0.0, fisher="sampled"),
    ),
    "ewc_kfac": MitigationRow(
        make=lambda: KroneckerEWC(strength=1e5, fisher_samples=6), off=lambda: KroneckerEWC(strength=0.0)
    ),
    "l2_sp": MitigationRow(make=lambda: L2SP(alpha=1.0, anchor="previous"), off=lambda: L2SP(alpha=0.0)),
    "l2_sp_decoupled": MitigationRow(
        make=lambda: L2SP(alpha=10.0, anchor="previous", decoupled=True), off=lambda: L2SP(alpha=0.0, decoupled=True)
    ),
    "mas": MitigationRow(
        make=lambda: MAS(strength=10.0, samples=6), off=lambda: MAS(strength=0.0), idle=("trainable_tokens",)
    ),
    "si": MitigationRow(make=lambda: SI(strength=10.0), off=lambda: SI(strength=0.0)),
    "on_policy_distillation": MitigationRow(
        make=lambda: OnPolicyDistillation(fraction=0.5, top_k=8, ema_rate=0.1),
        off=lambda: OnPolicyDistillation(strength=0.0),
    ),
    "sdft": MitigationRow(
        # An untrained model hardly ever ends what it writes: greedy and short, nothing would be accepted.
        make=lambda: SDFT(template="{prompt}={reference}:", temperature=1.0, max_new_tokens=96),
        off=lambda: SDFT(share=0.0),
    ),
    "self_distillation": MitigationRow(
        make=SelfDistillation,
        off=lambda: SelfDistillation(strength=0.0),
        refuses=lambda adapter: "" if adapter.continues else "begins every stage with another function",
    ),
    "self_distillation_base": MitigationRow(
        make=lambda: SelfDistillation(teacher="base"), off=lambda: SelfDistillation(teacher="base", strength=0.0)
    ),
    "self_distillation_cached": MitigationRow(
        make=lambda: SelfDistillation(cache=8), off=lambda: SelfDistillation(cache=8, strength=0.0)
    ),
    "self_distillation_ema": MitigationRow(
        make=lambda: SelfDistillation(teacher="ema", ema_rate=0.1),
        off=lambda: SelfDistillation(teacher="ema", strength=0.0),
    ),
    "fisher_merge": MitigationRow(make=lambda: FisherMerge(fisher_samples=6), off=lambda: FisherMerge(past=0.0)),
    "intruder_reduction": MitigationRow(
        make=lambda: IntruderReduction(scale=0.2, threshold=0.9, first=False), off=lambda: IntruderReduction(scale=1.0)
    ),
    "magmax": MitigationRow(
        make=lambda: MagMax(strength=0.6, into="train"), off=lambda: MagMax(strength=1.0, past=0.0)
    ),
    "slerp": MitigationRow(make=lambda: SLERP(alpha=0.6), off=lambda: SLERP(alpha=1.0)),
    "soup": MitigationRow(make=lambda: Soup(), off=lambda: Soup(last=1)),
    "task_arithmetic": MitigationRow(
        make=lambda: TaskArithmetic(strength=0.4), off=lambda: TaskArithmetic(strength=1.0, last=1)
    ),
    "ties": MitigationRow(make=lambda: TIES(density=0.5), off=lambda: TIES(density=1.0, last=1)),
    "wise_ft": MitigationRow(make=lambda: WiseFT(alpha=0.6, first=False, into="train"), off=lambda: WiseFT(alpha=1.0)),
    "weight_mixing": MitigationRow(make=lambda: WeightMixing(alpha=0.6), off=lambda: WeightMixing(alpha=1.0)),
}

# `make test` pairs these with everything; `make test-pairs` does the rest.
SOME_ADAPTERS = ("lora_dropout",)
SOME_MITIGATIONS = ("ewc", "replay")


# Short answers by an untrained policy, of which hardly any ends by itself.
_WRITES: dict[str, Any] = {"group": 3, "max_new_tokens": 4, "truncated": "as_is", "informative": 0.0}
_FLIPPED = ("cdpo", "robust")

OBJECTIVES: dict[str, ObjectiveRow] = {
    "sft": ObjectiveRow(make=SFT),
    "sft_smoothed": ObjectiveRow(make=lambda: SFT(label_smoothing=0.1)),
    "full_text": ObjectiveRow(make=FullText),
    "dft": ObjectiveRow(make=DFT),
    "asft": ObjectiveRow(make=ASFT),
    "eaft": ObjectiveRow(make=EAFT),
    "talr": ObjectiveRow(make=TALR),
    "flow": ObjectiveRow(make=FLOW),
    "stm": ObjectiveRow(make=lambda: STM(threshold=257.0)),
    **{
        f"preference_{loss}": ObjectiveRow(
            make=partial(Preference, loss=loss, smoothing=0.1 if loss in _FLIPPED else 0.0)
        )
        for loss in PAIR_LOSSES
    },
    "preference_sft": ObjectiveRow(make=lambda: Preference(sft_weight=0.3)),
    "preference_pretrained": ObjectiveRow(make=lambda: Preference(reference="pretrained")),
    "reward_model": ObjectiveRow(make=lambda: RewardModel(centring=0.01, token="~")),
    "kto": ObjectiveRow(make=lambda: KTO(wanted=1.1)),
    "kto_pretrained": ObjectiveRow(make=lambda: KTO(reference="pretrained", wanted=1.1)),
    "apo_zero_unpaired": ObjectiveRow(make=lambda: KTO(baseline="none", wanted=1.1)),
    "rloo": ObjectiveRow(make=lambda: RLOO(reward=Parity(), **_WRITES)),
    "rloo_kl": ObjectiveRow(make=lambda: RLOO(reward=Parity(), beta=0.1, **_WRITES)),
    "grpo": ObjectiveRow(make=lambda: GRPO(reward=Parity(), **_WRITES)),
    "grpo_published": ObjectiveRow(
        make=lambda: GRPO(reward=Parity(), aggregate="sequences", beta=0.1, kl="k3", **_WRITES)
    ),
    "dr_grpo": ObjectiveRow(make=lambda: GRPO(reward=Parity(), scale="none", aggregate="constant", **_WRITES)),
    "dapo": ObjectiveRow(make=lambda: GRPO(reward=Parity(), clip_high=0.28, updates=2, **_WRITES)),
    "grpo_pretrained": ObjectiveRow(
        make=lambda: GRPO(reward=Parity(), beta=0.1, reference="pretrained", temperature=0.7, **_WRITES)
    ),
    "label_policy": ObjectiveRow(make=lambda: LabelPolicy(reward=ExactLabel())),
    "label_policy_drawn": ObjectiveRow(make=lambda: LabelPolicy(reward=ExactLabel(), group=4, beta=0.1)),
}


def _texts(make: Callable[[], Scorer], good: str, bad: str) -> ScorerRow:
    return ScorerRow(make=make, completion=good, good=Answer(text=good), bad=Answer(text=bad))


def _labels(own: float, other: float) -> Answer:
    found = {"the cat sat on the mat": own, "b": other}
    labels = {label: LabelScore(nll=nll, tokens=2, bytes=8) for label, nll in found.items()}
    return Answer(nll=own, tokens=2, best=own < other, labels=labels, text_nll=own, text_bytes=8)


_LABELS: dict[str, Any] = {"good": _labels(1.0, 2.0), "bad": _labels(3.0, 2.0)}
_TABLE = "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1), (2);"
_SCHEMA: dict[str, Any] = {"type": "object", "required": ["a"]}

SCORERS: dict[str, ScorerRow] = {
    "nll": ScorerRow(make=scorers.NLL, best=0.5, **_LABELS),
    "accuracy": ScorerRow(make=scorers.Accuracy, **_LABELS),
    "accuracy_norm": ScorerRow(make=scorers.NormalisedAccuracy, **_LABELS),
    "preference_accuracy": ScorerRow(make=scorers.PreferenceAccuracy, rejected="b", **_LABELS),
    "reward_accuracy": ScorerRow(
        make=scorers.RewardAccuracy,
        rejected="b",
        good=Answer(rewards={None: (1.0, -0.5)}),
        bad=Answer(rewards={None: (0.0, 0.5)}),
    ),
    "bits_per_byte": ScorerRow(make=scorers.BitsPerByte, best=1 / (8 * math.log(2)), **_LABELS),
    "exact_match": ScorerRow(make=scorers.ExactMatch),
    "f1": ScorerRow(make=scorers.F1),
    "rougeL": ScorerRow(make=scorers.Rouge),
    "chrf": ScorerRow(make=scorers.ChrF),
    "bleu": ScorerRow(make=scorers.BLEU),
    "corpus_chrf": ScorerRow(make=scorers.CorpusChrF),
    "corpus_bleu": ScorerRow(make=scorers.CorpusBLEU),
    "edit_similarity": ScorerRow(make=scorers.EditSimilarity),
    "sari": ScorerRow(make=scorers.SARI),
    "numeric": _texts(scorers.Numeric, "it is 4", "42"),
    "choice": _texts(scorers.Choice, "B", "Apple"),
    "regex": _texts(lambda: scorers.Regex(pattern=r"\d+"), "12", "twelve"),
    "json_valid": _texts(scorers.JsonValid, "[1]", "[NaN]"),
    "json_schema": _texts(lambda: scorers.JsonSchema(schema=_SCHEMA), '{"a": 1}', "{}"),
    "sql_valid": _texts(scorers.SqlValid, "SELECT 1", "SELECT"),
    "sql_execution": _texts(lambda: scorers.SqlExecution(schema=_TABLE), "SELECT a FROM t", "SELECT 1"),
    "python_compiles": _texts(scorers.PythonCompiles, "x = 1", "return 1"),
}

# Of a ratio of scores a loss is no score with its sign turned; the others stand beside other models.
_RATIOS = ("plasticity", "stability", "stability_plasticity")
_OTHER_MODELS = {"joint": [84.0, 80.0, 78.0, 89.0], "single": [82.0, 76.0, 80.0, 88.0]}

METRICS: dict[str, MetricRow] = {
    name: MetricRow(
        function=metric.function,
        about=metric.about,
        references={need: _OTHER_MODELS[need] for need in (metric.about.needs,) if need is not None},
        ratio=name in _RATIOS,
    )
    for name, metric in matrix_metrics().items()
}


def _files(reader: type[Domain], kind: str) -> DomainRow:
    def make(folder: Path) -> Domain:
        options = write_domain(folder, "a", kind=kind)["init_args"]
        return reader(**{name: options[name] for name in ("train", "validation", "test", "kind")})

    return DomainRow(make=make)


def _not_fetched() -> str:
    missing = [p.distribution for p in PACKAGES if not package_folder(p.distribution, p.version).exists()]
    return f"run `residency assets` first: {', '.join(missing)} not in the assets cache" if missing else ""


DOMAINS: dict[str, DomainRow] = {
    "jsonl": _files(Jsonl, "generative"),
    "table": _files(Table, "label"),
    "controlled": DomainRow(make=lambda folder: Controlled(facts=8)),
    **{
        name: DomainRow(make=lambda folder, name=name: getattr(packaged, name)(), missing=_not_fetched)
        for name in packaged.__all__
    },
}


def _random_translation(folder: Path) -> augmentation.Augmentation:
    model = write_translator(folder / "t5")
    return augmentation.BackTranslation(forward=str(model), backward=str(model), beams=1)


def _reworded(request: str) -> str:
    """The last paragraph of a request with its end first."""
    head, _, tail = request.rpartition("\n\n")[2].partition(" beside ")
    return f"beside {tail} {head}"


def _new_text(request: str) -> str:
    """Another text for every three rows, and an answer."""
    if not request.startswith("Here are three"):
        return "in winter"
    return f"why do swallows number {sum(request.encode()) % 97} sleep in reeds when it is cold"


AUGMENTATIONS: dict[str, AugmentationRow] = {
    "synonyms": AugmentationRow(
        make=lambda folder: augmentation.Synonyms(wordnet=str(write_wordnet(folder / "wordnet")), share=1.0)
    ),
    "paraphrase": AugmentationRow(make=lambda folder: augmentation.Paraphrase(), answer=_reworded),
    "self_instruct": AugmentationRow(make=lambda folder: augmentation.SelfInstruct(), answer=_new_text),
    "back_translation": AugmentationRow(make=_random_translation, accepted=False),
}
