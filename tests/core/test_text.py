"""Text from data moves no cursor, sets no title and reads the same from left to right."""

from __future__ import annotations

import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from residency.core.text import for_terminal, printable, safe_name

ATTACK = "\x1b[2J\x1b]0;title\x07 bell \x9b31m \u202eevil\u2028 \x00 \udc80 \r over \u200b"


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    for text in (for_terminal(ATTACK), printable(ATTACK, 400)):
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)
        text.encode()
    assert "\\x1b[2J" in for_terminal(ATTACK)
    assert "\\udc80" in for_terminal(ATTACK)


def test_every_character_is_either_shown_or_written_out() -> None:
    for number in range(sys.maxunicode + 1):
        c = chr(number)
        shown = for_terminal(c)
        assert shown == c or (shown.isprintable() and shown.startswith("\\")), hex(number)


def test_usual_text_is_untouched() -> None:
    text = "Größe 3 µm → 日本語 😀\n\twhy: [bold]\n"
    assert for_terminal(text) == text


@given(st.text())
def test_names_become_file_names(name: str) -> None:
    safe = safe_name(name)
    assert 0 < len(safe) <= 60
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in safe)
    assert safe_name(safe) == safe
