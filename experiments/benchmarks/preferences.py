"""DPO and GRPO beside TRL's trainers, one optimizer step each in turn, on the same rows and from the same values.

    python experiments/benchmarks/preferences.py --objective dpo  [--steps 6] [--batch 8]
    python experiments/benchmarks/preferences.py --objective grpo [--steps 3] [--batch 8]

The packaged model with LoRA on all linear layers, prompts of 200 tokens, float32, two threads; GRPO writes 8 answers of
at most 48 tokens per prompt. Each program is a process that is held after every optimizer step (`gate.py`), and the two
take turns; the first step of each is left out. `--arms residency padded trl` adds this project without the packed
layout, which reads a prompt once per answer as TRL does: the quotient of the first two is the gain of reading prompts
once. Needs the extra `trl`, in this environment or in that of `--trl PYTHON`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep import Arm

HERE = Path(__file__).resolve().parent
PROMPT, GROUP, WRITTEN, RANK = 200, 8, 48, 8


def worth(text: str) -> float:
    """A reward that any text has some of: the share of its characters that are letters."""
    return sum(map(str.isalpha, text)) / max(1, len(text))


def rows(tokenizer: Any, count: int) -> list[dict[str, str]]:
    """Clauses of licences: a prompt of solved questions, its answer, and the answer to another one."""
    from residency.domains.packaged import LicenceClauses

    source = LicenceClauses(max_train=None).rows("train")
    found = []
    for i in range(count):
        text = "\n".join(f"{source[(7 * i + k) % len(source)].prompt}" for k in range(12))
        ids = tokenizer(text, add_special_tokens=False).input_ids[: PROMPT - 1]
        answers = [source[(i + k) % len(source)].completion for k in (0, 1)]
        other = answers[1] if answers[1] != answers[0] else answers[1] + " or not"
        found.append({"prompt": tokenizer.decode(ids) + "\n", "chosen": answers[0], "rejected": other})
    return found


def peft_model(path: str, threads: int) -> Any:
    """The model with LoRA, first values from seed 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def ours(options: argparse.Namespace, given: Sequence[dict[str, str]], *, layout: Any) -> list[dict[str, Any]]:
    """A stage as `residency fit` trains it; the lines of its history."""
    from functools import partial

    import torch

    from residency.adapters.peft import lora
    from residency.backbones import CausalLM
    from residency.core.types import Row, Stage
    from residency.domains.packaged import LicenceClauses
    from residency.domains.stream_data import StreamData
    from residency.domains.template import Template
    from residency.engine.checkpointing import History
    from residency.engine.module import ContinualModule
    from residency.engine.stage import train_stage
    from residency.engine.trainers import Trainers
    from residency.objectives import GRPO, Preference
    from residency.objectives.rewards import Answer, Question, Reward

    class Letters(Reward):
        def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
            return [worth(answer.text) for answer in answers]

    template = Template(prompt="{prompt}", completion="{completion}", tokenise="apart")

    class Given(StreamData):
        def examples(self, stage: Stage, tokenizer: Any) -> Any:
            named = [Row(id=str(i), prompt=r["prompt"], completion=r["chosen"], rejected=r["rejected"], kind="pair")
                     for i, r in enumerate(given)]  # fmt: skip
            return [template.encode(tokenizer, domain=stage.domain, row=row) for row in named]

    written: dict[str, Any] = {"group": GROUP, "max_new_tokens": WRITTEN, "truncated": "as_is", "informative": 0.0}
    objective = Preference() if options.objective == "dpo" else GRPO(reward=Letters(), **written)
    values = {
        n: p.detach() for n, p in peft_model(options.model, options.threads).named_parameters() if p.requires_grad
    }
    module = ContinualModule(
        backbone=CausalLM(path=options.model),
        adapter=lora(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        objective=objective,
        optimizer=partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.0),
        layout=layout,
    )
    module.build(seed=0)
    module.adapter.load_state(module.model, values)
    data = Given(domains={"rows": LicenceClauses()}, batch_size=options.batch)
    stage = Stage(index=0, domain="rows", stages=1, seed=0, steps=options.steps, batch_size=options.batch)
    plain = {"max_steps": options.steps, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    lines: list[dict[str, Any]] = []
    history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: lines.append(dict(line)))
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            module=module,
            data=data,
            trainers=Trainers(lambda: dict(plain)),
            stage=stage,
            folder=Path(folder),
            history=history,
            observers=[],
            checkpoint_every_n_steps=0,
        )
    return lines


def theirs(options: argparse.Namespace, given: Sequence[dict[str, str]], folder: Path) -> list[dict[str, Any]]:
    """The trainer of TRL, as close to its defaults as a CPU allows: no bf16, no checkpointing."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = peft_model(options.model, options.threads)
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "learning_rate": options.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if options.objective == "dpo":
        settings = trl.DPOConfig(
            **common, per_device_train_batch_size=options.batch, train_sampling_strategy="sequential"
        )
        rows = Dataset.from_list(list(given))
        trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    else:
        settings = trl.GRPOConfig(
            **common,
            per_device_train_batch_size=options.batch * GROUP,
            num_generations=GROUP,
            max_completion_length=WRITTEN,
            shuffle_dataset=False,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            args=settings,
            reward_funcs=lambda completions, **columns: [worth(text) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in given]),
            processing_class=tokenizer,
        )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


SHOWN = {
    "dpo": {"loss": ("loss/task", "loss"), "margin": ("rewards/margins", "rewards/margins")},
    "grpo": {"reward": ("reward", "reward"), "length": ("rollouts/length", "completions/mean_length")},
}


def arm(options: argparse.Namespace) -> None:
    """One program; its figures per step as a JSON line."""
    given = json.loads(Path(options.rows).read_text(encoding="utf-8"))
    if options.arm == "trl":
        with tempfile.TemporaryDirectory() as folder:
            lines, side = theirs(options, given, Path(folder)), 1
    else:
        lines, side = ours(options, given, layout="padded" if options.arm == "padded" else "packed"), 0
    shown = SHOWN[options.objective]
    print(json.dumps({name: [line.get(keys[side]) for line in lines] for name, keys in shown.items()}), flush=True)


def main() -> None:
    """Measure, print a line per program and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("dpo", "grpo"), default="dpo")
    parser.add_argument("--arms", nargs="+", default=["residency", "trl"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="")
    parser.add_argument("--trl", default=sys.executable, help="python of an environment that has trl")
    parser.add_argument("--arm", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm(options)
        return
    from residency.backbones import CausalLM

    backbone = CausalLM() if not options.model else CausalLM(path=options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.json"
        path.write_text(json.dumps(rows(backbone.tokenizer, options.steps * options.batch)), encoding="utf-8")
        words = ["--objective", options.objective, "--model", str(backbone.folder), "--rows", str(path)]
        words += [f"--{key}={getattr(options, key)}" for key in ("steps", "batch", "lr", "threads")]
        python = {"trl": options.trl}
        gate, me = str(HERE / "gate.py"), str(HERE / "preferences.py")
        started = {
            one: Arm(one, [python.get(one, sys.executable), gate, me, *words, "--arm", one], folder / f"{one}.log")
            for one in options.arms
        }
        seconds = {one: [arm.wait()] for one, arm in started.items()}
        for step in range(1, options.steps):
            for one in options.arms if step % 2 else options.arms[::-1]:
                started[one].go()
                seconds[one].append(started[one].wait())
        ends = {one: arm.finish() for one, arm in started.items()}
    counted = {one: sum(values[1:]) for one, values in seconds.items()}
    last = options.arms[-1]
    for one in options.arms:
        facts = ", ".join(f"{k} {[round(v, 4) for v in values]}" for k, values in ends[one].items())
        print(
            f"{one}: {counted[one]:.2f} s for {options.steps - 1} steps, {counted[last] / counted[one]:.2f} x; {facts}"
        )
    print(json.dumps({"objective": options.objective, "step_seconds": seconds, "figures": ends}))


if __name__ == "__main__":
    main()
