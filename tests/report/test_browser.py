"""The page in a real browser, from disk, without a network: it draws, sorts, turns dark, obeys the keyboard."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from residency.report import build
from support.browser import Browser, browser
from support.synthetic_studies import QUICKSTART, write_cell, write_study

pytestmark = pytest.mark.browser

SCRIPT, CLIMB = "<script>alert(1)</script>", "../../x"
TAB, ENTER, DOWN = "\ue004", "\ue007", "\ue015"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small study with five seeds."""
    return build(write_study(tmp_path_factory.mktemp("study") / "s", seeds=range(5)))


def pixels(png: bytes) -> Counter[bytes]:
    """How often each colour occurs in a PNG of 8 bits per channel (a few rows are enough)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    size = {2: 3, 6: 4}[kind]
    assert depth == 8
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = np.frombuffer(zlib.decompress(data), dtype=np.uint8), width * size + 1
    rows = raw.reshape(height, stride)
    # Filtered rows are not colours, but a blank picture is blank whatever the filter.
    return Counter(
        rows[k, 1 + i : 1 + i + size].tobytes() for k in range(0, height, 7) for i in range(0, width * size, size)
    )


def clean(window: Browser) -> None:
    """Nothing was complained about and nothing was asked for."""
    assert window.complaints() == []
    assert window.requests() == []


def text(window: Browser, selector: str) -> list[str]:
    return [
        str(t) for t in window.run(f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent.trim())")
    ]


def test_every_chart_is_drawn_and_nothing_is_asked_for(window: Browser, page: Path) -> None:
    window.open(page)
    for id in window.run("[...document.querySelectorAll('figure')].map((f) => f.closest('section').id)"):
        window.show(id)
    drawn = window.run("[...document.querySelectorAll('figure')].every((f) => f.querySelector('.live svg'))")
    assert drawn
    window.run("scrollTo(0, 0)")
    assert len(pixels(window.picture())) > 50
    clean(window)


def test_the_first_screen_says_what_to_take_and_why(window: Browser, page: Path) -> None:
    window.open(page)
    below = window.run("document.querySelector('.limits').getBoundingClientRect().bottom / innerHeight")
    assert below <= 1.0
    table = window.run("document.querySelector('.scores').getBoundingClientRect().top / innerHeight")
    assert table <= 1.05, "every score by its name begins where the summary ends"
    assert text(window, "h1") == ["Take replay"]
    assert window.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"


def test_sorting_by_mouse_and_by_keyboard(window: Browser, page: Path) -> None:
    window.open(page)
    column = "#table-methods tbody tr > :nth-child(5)"
    window.run("document.querySelector('#methods').scrollIntoView()")
    window.click("#table-methods th:nth-child(5) button")
    numbers = [float(t.split("[")[0]) for t in text(window, column) if t != "-"]
    assert numbers == sorted(numbers)
    assert window.run("document.querySelector('#table-methods th:nth-child(5)').ariaSort") == "ascending"
    window.keys(ENTER)  # the button still has the focus
    numbers = [float(t.split("[")[0]) for t in text(window, column) if t != "-"]
    assert numbers == sorted(numbers, reverse=True)
    assert text(window, column)[-1] == "-", "what is missing comes last, whichever way"
    clean(window)


def test_the_keyboard_reaches_everything(window: Browser, page: Path) -> None:
    window.open(page)
    seen = []
    for _ in range(40):
        window.keys(TAB)
        element = "document.activeElement"
        seen.append(str(window.run(f"{element}.id || {element}.textContent.trim() || {element}.tagName")))
        assert window.run(f"getComputedStyle({element}).outlineStyle") != "none"
    assert seen[0] == "Skip to the table"
    assert {"theme", "method", "Provenance"} <= {*seen}
    window.run("document.getElementById('explore-method').focus()")
    before = text(window, "#explore-matrix td")
    window.keys(DOWN)
    assert text(window, "#explore-matrix td") != before


def test_dark_by_wish_and_by_button(window: Browser, page: Path) -> None:
    window.open(page, dark=True)
    window.wait("document.querySelector('figure').dataset.drawn === 'dark'")
    dark = window.run("getComputedStyle(document.body).backgroundColor")
    ink = window.run("document.querySelector('figure .live svg text').getAttribute('fill')")
    window.click("#theme")
    window.wait("document.querySelector('figure').dataset.drawn === 'light'")
    assert (dark, window.run("getComputedStyle(document.body).backgroundColor")) == (
        "rgb(20, 24, 29)",
        "rgb(255, 255, 255)",
    )
    assert window.run("document.querySelector('figure .live svg text').getAttribute('fill')") != ink
    clean(window)


def test_print_shows_the_pictures_in_light(window: Browser, page: Path) -> None:
    window.open(page, dark=True)
    pdf = window.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(pdf) > 100_000
    window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "[...document.querySelectorAll('figure img')].every((i) => getComputedStyle(i).display !== 'none')"
    assert window.run(shown)
    assert window.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    clean(window)


def test_names_from_hell_harm_nothing(window: Browser, tmp_path: Path) -> None:
    matrices = {"none": QUICKSTART["none"], "replay": QUICKSTART["replay"]}
    study = write_study(tmp_path / "s", matrices, domains=(SCRIPT, CLIMB, '"><img src=x onerror=alert(2)>'))
    window.open(build(study))
    for id in window.run("[...document.querySelectorAll('figure')].map((f) => f.closest('section').id)"):
        window.show(id)
    window.click("#table-methods th:nth-child(2) button")
    assert window.run("document.querySelectorAll('img[src=x], main script:not([type])').length") == 0
    assert SCRIPT in str(window.run("document.body.textContent"))
    clean(window)  # an alert would have raised here


def test_five_hundred_methods_ten_domains_five_seeds(window: Browser, tmp_path: Path) -> None:
    cells, rng = [], np.random.default_rng(0)
    domains = [f"domain {j}" for j in range(10)]
    learned = np.tril(np.ones((11, 10)), k=-1)
    for m in range(50):
        for a in range(10):
            matrix = 5 - learned * (4 - 0.02 * m - 0.01 * a) + 0.1 * rng.random((11, 10))
            for seed in range(5):
                cell, axes = f"{m}-{a}-{seed}", {"mitigation": f"m{m}" if m else "none", "adapter": f"lora-{a}"}
                cells.append({"id": cell, "axes": axes, "seed": seed})
                write_cell(tmp_path / "cells" / cell, cell, matrix.tolist(), axes, seed, domains, rows=0)
    (tmp_path / "plan.json").write_text(json.dumps({"study": {"name": "big"}, "cells": cells}))
    start = time.process_time()
    page = build(tmp_path)
    assert time.process_time() - start < 60, "of one core, whatever else the machine does"
    assert page.stat().st_size < 6_000_000
    start = time.monotonic()
    window.open(page)
    assert time.monotonic() - start < 30
    assert window.run("document.querySelectorAll('*').length") < 25_000
    window.run("document.querySelector('#methods').scrollIntoView()")
    window.driver.find_element("css selector", "#table-methods input").send_keys("m7 lora-3")
    assert text(window, "#table-methods tbody th") == ["m7 · lora-3"]
    window.driver.find_element("css selector", "#table-methods input").clear()
    start = time.monotonic()
    window.click("#table-methods th:nth-child(5) button")
    assert time.monotonic() - start < 4
    for id in ("plane", "stream", "matrices", "explore"):
        window.show(id)
    clean(window)
