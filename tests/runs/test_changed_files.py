"""A run goes on with the files it began with, or says what changed; what diverges or cannot be shown is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from residency.backbones import CausalLM
from residency.runs.views.base import View
from residency.runs.views.guarded import GuardedView
from residency.testing.tiny_models import write_backbone, write_tokenizer
from support.cli import call, tiny_config, write_yaml


def _vocabulary(folder: Path, token: str) -> None:
    tokenizer = write_tokenizer(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)


def _weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t + (n == "model.norm.weight") * 1e-3 for n, t in tensors.items()}, path, metadata={"format": "pt"})


def _edit(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"prompt": row["prompt"] + "q"}) + "\n" for row in rows))


FILES: dict[str, Callable[[Path], object]] = {
    "weights": _weights,
    "tokenizer": lambda f: _vocabulary(f, "<other>"),
    "a template of chats": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "settings of generation": lambda f: (f / "generation_config.json").write_text('{"temperature": 2.0}'),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_loaded_is_in_the_fingerprint(name: str, tmp_path: Path) -> None:
    """Also a tokenizer of equal size with another added token."""
    write_backbone(tmp_path)
    _vocabulary(tmp_path, "<added>")
    before = CausalLM(path=str(tmp_path)).fingerprint()
    assert CausalLM(path=str(tmp_path)).fingerprint() == before
    (tmp_path / "README.md").write_text("words")
    assert CausalLM(path=str(tmp_path)).fingerprint() == before
    FILES[name](tmp_path)
    after = CausalLM(path=str(tmp_path)).fingerprint()
    changed = {part for part in before if before[part] != after[part]}
    assert changed == ({"weights"} if name in ("weights", "settings of generation") else {"tokenizer"})


@pytest.mark.parametrize("what", ["rows", "tokenizer", "nothing"])
def test_a_run_goes_on_with_the_files_it_began_with(what: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", write_backbone(tmp_path / "model"))
    path, run = write_yaml(tmp_path / "tiny.yaml", config), tmp_path / "run"
    assert call("fit", "--config", path, "--run_dir", run).code == 0
    record = json.loads((run / "results.json").read_text())
    # As after a kill before the last stage was complete.
    (run / "results.json").unlink()
    (run / "stages" / "2-b" / "stage.json").unlink()
    if what == "rows":
        test = Path(config["data"]["domains"]["b"]["init_args"]["test"])
        _edit(test)
    if what == "tokenizer":
        (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    result = call("fit", "--config", path, "--run_dir", run)
    if what == "nothing":
        assert result.code == 0, result.err
        assert json.loads((run / "results.json").read_text())["scores"] == record["scores"]
        return
    assert result.code == 2
    named = {"rows": "rows or template of b", "tokenizer": "tokenizer of the model"}[what]
    assert f"changed since: {named}\n" in result.err
    assert not (run / "results.json").exists()


def test_a_complete_run_of_other_rows_is_not_taken_for_this_one(llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", llama)
    path, run = write_yaml(tmp_path / "tiny.yaml", config), tmp_path / "run"
    assert call("fit", "--config", path, "--run_dir", run).code == 0
    again = call("fit", "--config", path, "--run_dir", run)
    assert (again.code, again.err) == (0, "")
    test = Path(config["data"]["domains"]["b"]["init_args"]["test"])
    kept = test.read_text()
    _edit(test)
    refused = call("fit", "--config", path, "--run_dir", run)
    assert refused.code == 2
    assert "changed since: rows or template of b\n" in refused.err
    test.unlink()
    gone = call("fit", "--config", path, "--run_dir", run)
    assert gone.code == 0, "a record may be kept longer than its data"
    assert "cannot be read any more" in gone.err
    test.write_text(kept)
    assert call("fit", "--config", path, "--run_dir", run).code == 0


@pytest.mark.parametrize("lr", ["1e38", "1e30"])
def test_divergence_at_the_last_step_is_told_and_what_was_complete_is_kept(lr: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", write_backbone(tmp_path / "model"))
    config["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": float(lr)}}
    config["trainer"] |= {"max_steps": 1, "gradient_clip_val": None}
    run = tmp_path / "run"
    result = call("fit", "--config", write_yaml(tmp_path / "tiny.yaml", config), "--run_dir", run)
    assert result.code == 2, result.err
    assert "diverged" in result.err
    assert "learning rate" in result.err
    assert "Traceback" not in result.err
    assert json.loads((run / "stages" / "0-base" / "stage.json").read_text())["means"]["nll"]
    assert not (run / "results.json").exists()


class _Broken(View):
    """Fails wherever it can."""

    def start(self, *arguments: Any) -> None:
        raise BrokenPipeError("gone")

    def callbacks(self, *arguments: Any) -> Any:
        raise RuntimeError("no terminal")

    def step(self, line: Mapping[str, Any]) -> None:
        raise UnicodeEncodeError("ascii", "→", 0, 1, "no glyph")

    @contextmanager
    def evaluating(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        raise OSError("no width")
        yield

    def row(self, *arguments: Any) -> None:
        raise ValueError("closed file")

    def finish(self, record: Mapping[str, Any]) -> None:
        raise ConnectionError("tracker")


@pytest.mark.parametrize("method", ["start", "callbacks", "step", "evaluating", "row", "finish"])
def test_a_view_that_fails_fails_nothing(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    view = GuardedView(_Broken())
    if method == "evaluating":
        with view.evaluating("x", 3) as advance:
            advance("a", 1)
    else:
        count = {"start": 3, "callbacks": 2, "row": 2}.get(method, 1)
        getattr(view, method)(*[None] * count)
    told = capsys.readouterr().err
    assert told.count("_Broken failed") == 1
    view.step({})
    assert not capsys.readouterr().err, "it is told once"


def test_a_run_whose_console_fails_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from residency.runs.views.console import ConsoleView

    def closed(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    for name in ("start", "finish", "callbacks"):
        monkeypatch.setattr(ConsoleView, name, closed)
    config = tiny_config(tmp_path / "data", write_backbone(tmp_path / "model"))
    result = call("fit", "--config", write_yaml(tmp_path / "tiny.yaml", config), "--run_dir", tmp_path / "run")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "done"
    assert "ConsoleView failed" in result.err
