"""`residency chat RUN`: talk to a saved stage, and to another one with the same words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residency.core.errors import EXIT_DONE, UserError
from residency.core.text import for_terminal

if TYPE_CHECKING:
    from residency.runs.cli import ResidencyCLI

__all__ = ["Conversation", "chat_command", "converse"]

_HELP = """\
/stage K      answer as after stage K (0 = before training); the last prompt is answered again
/stages       the stages that are saved
/domain NAME  use the template of another domain
/new          forget the turns so far
/quit         leave (also: end of input)"""


class Conversation:
    """One run, of which one stage answers, in the form that one domain gives a prompt.

    A domain with a chat template has turns: what was said before is read again. Any other template makes a prompt of
    every text by itself. Answers are greedy: the same words and stage give the same answer.

    Args:
        cli: The run, parsed; nothing is loaded yet.
        stage: 0 = base, 1 ... T; `None` = the last one that is saved.
        domain: Whose template; `None` = that of the stage's domain.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(
        self, cli: ResidencyCLI, *, stage: int | None = None, domain: str | None = None, max_new_tokens: int = 128
    ) -> None:
        self._cli = cli
        self._max_new_tokens = max_new_tokens
        self.turns: list[Mapping[str, str]] = []
        self.switch(stage)
        self.use(domain or cli.datamodule.order[max(0, self.stage - 1)])

    def switch(self, stage: int | None) -> None:
        """Let another stage answer.

        Args:
            stage: 0 = base, 1 ... T; `None` = the last one that is saved.

        Raises:
            UserError: That stage is not saved.
        """
        from residency.runs.saved_stage import load_stage

        module = self._cli.model
        if stage == 0 and hasattr(module, "model"):
            del module.model  # the base is what the files say, not what is left of a stage
        seed = self._cli.settings.seed
        self.stage = load_stage(module, self._cli.datamodule, self._cli.folder, stage=stage, seed=seed)
        module.to(self._cli.trainers.root_device)

    def use(self, domain: str) -> None:
        """Put prompts into the form of a domain; turns so far are forgotten.

        Raises:
            UserError: There is no such domain.
        """
        columns = self._cli.datamodule.columns
        if domain not in columns:
            raise UserError(
                f"domain {domain!r}; there are {', '.join(columns)}",
                why="only a domain or a probe of the run has a template",
                fix="give one of these names",
            )
        self.domain, self.turns = domain, []

    @property
    def saved(self) -> dict[int, str]:
        """{stage: its domain} of every stage that can answer."""
        names = enumerate(self._cli.datamodule.order, 1)
        folder = self._cli.folder
        return {0: "before training"} | {
            k: name for k, name in names if (folder.stage(k, name) / "state.safetensors").is_file()
        }

    def answer(self, text: str) -> str:
        """What the stage writes after a text (and after the turns so far, with a chat template)."""
        from residency.core.types import Row
        from residency.domains.chat import Chat

        module, template = self._cli.model, self._cli.datamodule.columns[self.domain].template
        turns = [*self.turns, {"role": "user", "content": text}]
        messages = tuple(turns) if isinstance(template, Chat) else ()
        row = Row(id="chat", prompt=text, completion="", kind="prompt", messages=messages)
        tokenizer: Any = module.backbone.tokenizer
        example = template.encode(tokenizer, domain=self.domain, row=row, split="test")
        (ids,) = module.backbone.generate(
            module.model.eval(), [example.prompt], max_new_tokens=self._max_new_tokens, layout=module.layout
        )
        written: str = tokenizer.decode(ids, skip_special_tokens=True).strip()
        self.turns = [*turns, {"role": "assistant", "content": written}]
        return written


def converse(conversation: Conversation, lines: Iterable[str]) -> Iterator[str]:
    """What is to be shown for every line of a user: an answer, or what a command did.

    Args:
        conversation: Changed by commands.
        lines: Prompts and commands (`/help`).
    """
    asked = ""
    for line in (line.strip() for line in lines):
        command, _, given = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/stage":
                conversation.switch(_number(given))
                conversation.turns = conversation.turns[:-2]
                yield f"stage {conversation.stage}, {conversation.saved[conversation.stage]}"
                if asked:
                    yield conversation.answer(asked)
            elif command == "/domain":
                conversation.use(given.strip())
                yield f"the template of {conversation.domain}"
            elif command == "/stages":
                yield "\n".join(f"{k}  {name}" for k, name in conversation.saved.items())
            elif command == "/new":
                conversation.turns, asked = [], ""
            elif command.startswith("/"):
                yield _HELP
            elif line:
                asked = line
                yield conversation.answer(line)
        except UserError as error:
            yield str(error)


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"/stage {text}", why="a stage is a number", fix="give 0 (before training), 1, 2, ...")
    return int(text)


def chat_command(words: list[str]) -> int:
    """Read lines from the terminal, or from a pipe, and answer each.

    Args:
        words: What follows `residency chat`.
    """
    parser = argparse.ArgumentParser(
        prog="residency chat",
        description="Talk to a saved stage of a run. /stage K lets another stage answer the same prompt, /help lists "
        "the rest. Lines may come from a pipe.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, for example runs/quickstart")
    parser.add_argument("--stage", type=int, help="0 = before training, 1, 2, ...; default the last that is saved")
    parser.add_argument("--domain", help="whose template; default that of the stage's domain")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer; default 128")
    options = parser.parse_args(words)
    from residency.runs.open_run import open_run

    conversation = Conversation(
        open_run(options.run), stage=options.stage, domain=options.domain, max_new_tokens=options.max_new_tokens
    )
    for shown in converse(conversation, _lines(conversation)):
        print(for_terminal(shown), flush=True)
    return EXIT_DONE


def _lines(conversation: Conversation) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(f"{len(conversation.saved)} stages; /help lists commands")
    while True:
        try:
            yield input(f"{conversation.stage} {for_terminal(conversation.domain)}> ")
        except EOFError:
            print()
            return
