"""A page in Debian's Chromium, without a window: what a reader sees of it, and what it asks the network for."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vgrout.types import UserError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root otherwise; it opens pages of our own alone
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 60  # for a page to be ready
READY = """const unpacked = document.documentElement.dataset.explorer === "ready";
    return document.readyState === "complete" && (unpacked || !document.getElementById("x-data"))"""


def missing() -> str:
    """What has to be installed before a page can be opened; empty where nothing is missing."""
    lacks = [f"{path} (Debian: chromium chromium-driver)" for path in (CHROMIUM, DRIVER) if not path.is_file()]
    lacks += [] if find_spec("selenium") else ["selenium (pip install 'vgrout[dev]')"]
    return f"no browser: {', '.join(lacks)} is missing" if lacks else ""


@contextmanager
def chromium() -> Iterator[Chrome]:
    """A browser with an empty profile, which ends with the block. Raises UserError where something is `missing`."""
    if reason := missing():
        raise UserError(reason)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        browser = Chrome(options=options, service=Service(str(DRIVER)))  # a given path: selenium looks for no other
        try:
            yield browser
        finally:
            browser.quit()


def shape(browser: Chrome, width: int, height: int = 900, *, phone: bool = False, dark: bool = False) -> None:
    """Give the window a size in CSS pixels, and the reader a preference of colours."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def visit(browser: Chrome, address: str) -> None:
    """Open an address anew, whatever was open, and wait until its rollouts are unpacked. `asked` and `said` begin with
    it."""
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get("about:blank")  # where only what stands behind # differs, the page would not be loaded again
    asked(browser)
    said(browser)
    browser.get(address)
    WebDriverWait(browser, SECONDS, poll_frequency=0.05).until(lambda b: b.execute_script(READY))


def asked(browser: Chrome) -> list[str]:
    """Every address that was requested since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def said(browser: Chrome) -> list[str]:
    """What stands on the console since the last call."""
    return [f"{entry['level']}: {entry['message']}" for entry in browser.get_log("browser")]


def picture(browser: Chrome, first: str, last: str, most: int, *, scale: float = 1.0) -> bytes:
    """PNG of the window's width of the page, from the element that the selector `first` finds to the end of `last`, and
    no more than `most` CSS pixels high. `scale`: pixels of the picture per CSS pixel."""
    span = """const [a, b] = [...arguments].map((css) => document.querySelector(css).getBoundingClientRect());
        return [a.top + scrollY, b.bottom + scrollY, innerWidth]"""
    top, bottom, width = browser.execute_script(span, first, last)
    margin = 12
    begin = max(0, top - margin)
    clip = {"x": 0, "y": begin, "width": width, "height": min(bottom + margin - begin, most), "scale": scale}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])
