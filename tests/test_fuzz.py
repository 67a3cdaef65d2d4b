"""Seeded nonsense in place of configs, studies, rows, command lines and run folders: told, never a traceback.

Every case has an exit code that the design knows, ends within 20 s, and leaves everything outside of the folders that
it names as it was. 500 cases in `make test`; 10,000 in `make test-slow`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.core.errors import UserError
from residency.core.guard import explain_error
from residency.domains.jsonl import Jsonl
from residency.domains.template import Template
from residency.runs.loaded import load_run
from residency.study.planning.study_file import load_study
from support.cli import call, tiny_config, write_yaml

CODES = {0, 2, 3, 4, 75}
SECONDS = 20.0
NASTY: list[Any] = [
    *(None, True, 0, -1, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", " ", "x", "null", "\u2028", "a\x1b[2Jb"),
    *("x" * 5000, "~nouser/x", "../../x", "/dev/null", "[", "*", "a.b", "os.system", "../adapter/lora", "ewc.yaml"),
    *(
        [],
        {},
        [[]],
        [None],
        {"": 1},
        {"class_path": "os.system"},
        {"class_path": None},
        {"init_args": 3},
        {"a": {"b": []}},
    ),
    *({"class_path": "residency.mitigations.EWC"}, {"class_path": ["x"], "init_args": {}}, [{"class_path": "x.Y"}]),
]
SIGNS = "[]{}:,&*!|>%@`'\"#-? \n\t\0\x85\u2028<~a1é"
WORDS = (
    "fit sweep store report sync test predict export ls verify gc --config --study --run_dir --output --help -h --x=1"
)
WORDS += (
    " --unused --max-size --yes --stage --domain --cell --axes.a --dry-run --emit-wandb --allow --print_config -1 nan"
)


class Fuzz:
    """Cases over one folder.

    Args:
        root: Everything lies in it.
        backbone: A tiny model.
        run: A complete run.
    """

    def __init__(self, root: Path, backbone: Path, run: Path) -> None:
        self.home = root / "home"
        self.place = root / "place"
        self.run = run
        self.config = tiny_config(root / "data", backbone)
        self.config["trainer"]["max_steps"] = 1
        write_yaml(root / "base.yaml", self.config)
        mitigation = {"l2": {"model.mitigations.l2": {"class_path": "residency.mitigations.L2SP"}}, "none": {}}
        base = str(root / "base.yaml")
        self.study = {"name": "s", "base": base, "axes": {"mitigation": mitigation}, "seeds": [0, 1], "orders": "given"}
        self.home.mkdir()
        for name in ("notes.txt", "data/rows.csv", "tmp/x.tmp", ".bashrc.tmp", "study.yaml"):
            (self.home / name).parent.mkdir(exist_ok=True)
            (self.home / name).write_text("mine")
        self.kinds: dict[str, Callable[[random.Random], int]] = {
            "config": self.of_config,
            "study": self.of_study,
            "rows": self.of_rows,
            "words": self.of_words,
            "folder": self.of_folder,
            "plan": self.of_plan,
            "use": self.of_use,
        }

    def case(self, number: int, kind: str) -> int:
        """Carry a case out; its exit code."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return self.kinds[kind](random.Random(f"{kind} {number}"))

    def of_config(self, draw: random.Random) -> int:
        file = self.place / "config.yaml"
        if draw.random() < 0.7:
            file.write_text(yaml.safe_dump(mutated(self.config, draw)), encoding="utf-8")
        else:
            file.write_text(scrambled(yaml.safe_dump(self.config), draw), encoding="utf-8")
        return call("fit", "--config", file, "--run_dir", self.place / "run", "--print_config").code

    def of_study(self, draw: random.Random) -> int:
        file = self.place / "study.yaml"
        text = yaml.safe_dump(mutated(self.study, draw))
        file.write_text(text if draw.random() < 0.7 else scrambled(text, draw), encoding="utf-8")
        return told(lambda: load_study(file))

    def of_rows(self, draw: random.Random) -> int:
        paths = {}
        for split in ("train", "validation", "test"):
            paths[split] = str(self.place / f"{split}.jsonl")
            rows = [{"prompt": f"{split} {n}", "completion": "b", "n": [1]} for n in range(draw.randint(1, 4))]
            text = "\n".join(json.dumps(mutated(row, draw) if draw.random() < 0.1 else row) for row in rows)
            text = text if draw.random() < 0.8 else scrambled(text, draw)
            Path(paths[split]).write_text(text, encoding="utf-8", errors="surrogatepass")
        template = Template(prompt="{prompt}", completion="{completion}", max_prompt_tokens=8, max_tokens=16)
        return told(lambda: [Jsonl(**paths, template=template).rows(split) for split in ("train", "test")])

    def of_words(self, draw: random.Random) -> int:
        paths = [
            str(self.home),
            str(self.place / "new"),
            "~nouser",
            "x" * 5000,
            "\x1b[2J",
            str(self.home / "notes.txt"),
        ]
        words = [draw.choice([*WORDS.split(), *paths]) for _ in range(draw.randint(1, 6))]
        # Verbs that would train or fetch something are covered by the other kinds.
        verb = draw.choice(
            ["store ls", "store verify", "store gc", "report", "sweep", "test", "nonsense", "sync --dry-run"]
        )
        return call(*verb.split(), *words).code

    def of_folder(self, draw: random.Random) -> int:
        run = self.damaged(draw)
        return told(lambda: load_run(run))

    def of_plan(self, draw: random.Random) -> int:
        base = self.place / "base.yaml"
        base.write_text(yaml.safe_dump(mutated(self.config, draw)), encoding="utf-8")
        file = write_yaml(self.place / "study.yaml", {**self.study, "base": str(base)})
        return call("sweep", file, "--dry-run", "--study_dir", self.place / "study").code

    def of_use(self, draw: random.Random) -> int:
        run, out = self.damaged(draw), self.place / "out"
        verbs = [["show"], ["gate", "--max", "forgetting=1"], ["compare", self.run], ["ab", self.run], ["rm"]]
        verbs += [["report", "--output", out], ["export", "--output", out], ["predict", "--limit=1"]]
        verbs += [["test", "--stage=1"], ["sync", "--dry-run"], ["fit", "--config", run / "config.yaml", "--run_dir"]]
        verb, *options = draw.choice(verbs)
        return call(verb, *options, run).code if verb == "fit" else call(verb, run, *options).code

    def damaged(self, draw: random.Random) -> Path:
        """A copy of the run in which one to three files are not what they were."""
        run = self.place / "run"
        shutil.copytree(self.run, run)
        files = sorted(
            path for path in run.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".parquet")
        )
        for _ in range(draw.randint(1, 3)):
            file = draw.choice(files)
            content = bytearray(file.read_bytes()) if file.is_file() else bytearray(b"x")
            change = draw.randrange(5)
            if change == 0 and content:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            elif change == 1:
                content = content[: draw.randrange(len(content) + 1)]
            elif change == 2:
                content = bytearray(json.dumps(draw.choice(NASTY)).encode())
            elif change == 3:
                content = bytearray(b"[" * 5000)
            file.unlink(missing_ok=True)
            if change < 4:
                file.write_bytes(content)
            else:
                file.symlink_to(draw.choice(["nowhere", file.name]))
        return run


def told(action: Callable[[], object]) -> int:
    """The exit code that the command's guard gives to what happens."""
    try:
        action()
    except Exception as error:
        if explain_error(error) is None:
            raise
        return 2
    return 0


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy in which one to three parts are replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        part = value
        while isinstance(part, dict | list) and part:
            key = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.75:
                part = part[key]
                continue
            change = draw.randrange(4)
            if change == 1:
                del part[key]
            elif change == 2 and isinstance(part, dict):
                part[draw.choice(["x", "", "a b", "class_path", "\x1b", str(key).upper()])] = part.pop(key)
            else:
                part[key] = copy.deepcopy(draw.choice(NASTY))
            break
    return value


def scrambled(text: str, draw: random.Random) -> str:
    """A text with a few characters of the syntax thrown in."""
    signs = list(text)
    for _ in range(draw.randint(1, 6)):
        signs[draw.randrange(len(signs))] = draw.choice(SIGNS)
    return "".join(signs)


def tree_digest(folder: Path) -> str:
    """Of every name and content below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


@pytest.fixture(scope="module")
def fuzz(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    root = tmp_path_factory.mktemp("fuzz")
    config = tiny_config(root / "data", llama)
    config["trainer"]["max_steps"] = 1
    assert call("fit", "--config", write_yaml(root / "run.yaml", config), "--run_dir", root / "run").code == 0
    return Fuzz(root, llama, root / "run")


# A config is parsed in a tenth of a second, planned in half a second; a command on a run takes as long.
FEW = {"config": 20, "study": 80, "rows": 150, "words": 115, "folder": 98, "plan": 12, "use": 25}
MANY = {"config": 600, "study": 2000, "rows": 3000, "words": 1600, "folder": 2400, "plan": 150, "use": 250}


ALL = pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize("counts", [FEW, ALL], ids=["500", "10000"])
def test_nonsense_is_told(counts: dict[str, int], fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(counts.values()) in (500, 10_000)
    monkeypatch.chdir(fuzz.place.parent)
    codes: Counter[tuple[str, int]] = Counter()
    outside = tree_digest(fuzz.home), tree_digest(fuzz.run)
    beside = {path.name for path in fuzz.place.parent.iterdir()}
    for kind, count in counts.items():
        for number in range(count):
            # Processor time: other work on the machine is no hang, and a case that waits for something ends the test.
            start = time.process_time()
            try:
                code = fuzz.case(number, kind)
            except Exception as error:
                raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
            assert code in CODES, f"{kind} {number}: exit code {code}"
            assert time.process_time() - start < SECONDS, f"{kind} {number} takes too long"
            codes[kind, code] += 1
    assert (tree_digest(fuzz.home), tree_digest(fuzz.run)) == outside
    assert {path.name for path in fuzz.place.parent.iterdir()} - beside <= {"place"}
    # It is no fuzz where everything is refused at the door, or nothing is.
    assert {kind for kind, code in codes if code == 2} == counts.keys()
    assert codes["rows", 0]
    assert codes["study", 0]


def test_a_mistake_is_not_a_bug() -> None:
    assert told(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        told(lambda: 1 // 0)

    def mistake() -> None:
        raise UserError("got", why="why", fix="fix")

    assert told(mistake) == 2
