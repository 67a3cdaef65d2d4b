"""What the server of workers does once is what every task would do, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_sweeps import EWC, write_study

_CODE = """
import json, os, sys, time
from residency.study.executors.forkserver import PRELOAD
from importlib import import_module
for name in PRELOAD:
    import_module(name)
import torch
from residency.runs.code_identity import core_code
from residency.study.executors.warm_up import warm_up
torch.set_num_threads(4)
threads = len(os.listdir("/proc/self/task"))
parts = json.loads(sys.argv[1])
spent = []
for words in parts:
    begin = time.process_time()
    warm_up({"words": words})
    spent.append(time.process_time() - begin)
state = torch.random.get_rng_state().sum().item()
print(json.dumps([threads, len(os.listdir("/proc/self/task")), core_code.cache_info().currsize, spent]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_caches_are_filled_and_no_thread_starts(llama: Path, tmp_path: Path) -> None:
    write_study(tmp_path, llama, axes={"mitigation": {"ewc": EWC(1.0)}})
    words = ["--config", str(tmp_path / "base.yaml")]
    wrong = [*words, "--model.adapter=nonsense", "--run_dir=a\u0000b"]
    command = [sys.executable, "-c", _CODE, json.dumps([wrong, words, words])]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, after, filled, (_, first, again) = json.loads(found.stdout.splitlines()[-1])
    assert (after, filled) == (before, 1)
    assert again < first / 2, "the second task finds all of it done"
