"""A headless browser that reports what a page says on the console and asks of the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "browser"]

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-prefers-reduced-motion",
)


class Browser:
    """One window of Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, dark: bool = False, width: int = 1400, height: int = 900) -> None:
        """Load a page from disk and wait until its first chart is alive."""
        scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        self.driver.set_window_size(width, height)
        self.driver.get(page.resolve().as_uri())
        self.wait("document.querySelector('figure[data-drawn]') || !document.querySelector('figure')")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until an expression is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda driver: driver.execute_script(f"return !!({condition})"))

    def click(self, selector: str) -> None:
        """Press an element."""
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        # Not below the bar that stays at the top.
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def keys(self, *keys: str) -> None:
        """Type, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def show(self, id: str) -> None:
        """Scroll to a part of the page and wait until its chart, if it has one, is alive."""
        self.run(f"document.getElementById('{id}').scrollIntoView()")
        self.wait(f"![...document.querySelectorAll('#{id} figure')].some((f) => !f.dataset.drawn)")

    def complaints(self) -> list[str]:
        """What the page has written to the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for over anything but the disk and the page itself."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = str(message["params"]["request"]["url"])
                if not address.startswith(("file:", "data:", "blob:", "chrome:")):  # chrome: = its own empty tab
                    found.append(address)
        return found

    def picture(self) -> bytes:
        """The window as PNG."""
        png: bytes = self.driver.get_screenshot_as_png()
        return png


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in an empty folder; skips, visibly, where none is installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium and chromedriver on this machine (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (residency[dev])")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=chromedriver))
    try:
        driver.set_page_load_timeout(60)
        yield Browser(driver)
    finally:
        driver.quit()
