"""What every test may use: tiny backbones on disk, one thread per process, no network, no W&B."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Ray reads these when it is imported: clusters of tests are closed to others and tell nobody.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # Before anything imports pip: afterwards, on Python 3.11, setuptools cannot be imported any more, which BOFT needs.
    import setuptools  # noqa: F401

    # Nearly all that is imported and collected stays: nobody looks at it for garbage, now or while tests run.
    gc.disable()

# Here, as it searches for who refers to its generators and finds nobody among what is frozen.
import hypothesis  # noqa: F401
import pytest
import torch
from lightning.fabric.utilities import registry
from transformers import MistralConfig, MistralForCausalLM

from residency.testing.tiny_models import write_backbone

torch.set_num_threads(1)
# No test cuts the power, and who else writes waits for the disk as well. Processes of their own sync as they do.
os.fsync = lambda fd: None
# Every Trainer asks all packages whether they bring callbacks.
registry.entry_points = functools.cache(registry.entry_points)


def pytest_configure(config: pytest.Config) -> None:
    """Markers that belong to these tests."""
    config.addinivalue_line("markers", "support.browser: needs chromium and chromedriver; runs in .ci/run")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What there is afterwards is left out of every later search for garbage."""
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow may take long on a busy machine."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test sets is not for the next: on tiny models a second thread costs several times what it computes."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers and 32 dimensions."""
    return write_backbone(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with attention dropout, which draws from the global generator in every step."""
    return write_backbone(tmp_path_factory.mktemp("llama-dropout"), dropout=0.1)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of 2 + 2 layers and 32 dimensions in the form of FLAN-T5."""
    return write_backbone(tmp_path_factory.mktemp("t5"), architecture="t5")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers and 32 dimensions as pretraining leaves it: no pooler, no head of a classifier."""
    return write_backbone(tmp_path_factory.mktemp("bert"), architecture="bert")


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of 2 layers and 32 dimensions."""
    return write_backbone(tmp_path_factory.mktemp("roberta"), architecture="roberta")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2, whose linear layers are stored transposed."""
    return write_backbone(tmp_path_factory.mktemp("gpt2"), architecture="gpt2")


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window that is shorter than the examples."""
    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 257, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    MistralForCausalLM(MistralConfig(sliding_window=5, **sizes, **heads)).save_pretrained(folder)
    return folder
