"""Debian's Chromium, driven without a window."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

__all__ = ["Browser", "edited", "opened", "until"]

T = TypeVar("T")
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars", "force-color-profile=srgb",
)  # fmt: skip
ROOT = Path(__file__).parents[2]
KEYSTROKES = """
const [count, done] = arguments;
const view = getElement(window.tnEditor).editor, image = document.querySelector(".tn-picture img");
const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));
(async () => {
  const times = [];
  for (let number = 0; number < count; number++) {
    const at = view.state.doc.toString().indexOf("{r: ") + 4, before = image.src, start = performance.now();
    view.dispatch({ changes: { from: at, to: at + 1, insert: String(2 + (number % 6)) } });
    while (image.src === before) await sleep(2);
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
    await sleep(400);
  }
  done(times);
})();
"""
SECONDS = 60.0  # on a machine that others use too


def until(found: Callable[[], T], seconds: float = SECONDS) -> T:
    """What `found` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "this did not come about"
        time.sleep(0.05)
    return value


@contextmanager
def edited(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a page that `tnpeft edit` serves."""
    command = [sys.executable, "-m", "tnpeft", "edit", *arguments, "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+/", line)
        assert match, line + process.stdout.read()
        yield match.group()
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=SECONDS)
        assert "Traceback" not in rest, rest
        assert process.returncode == 0


@contextmanager
def opened(address: str, folder: Path, width: int = 1280, height: int = 1000) -> Iterator[Browser]:
    """A browser with a page open; nothing that a page of an earlier one left is there."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver here: `apt-get install chromium chromium-driver`")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser = Browser(driven, folder)
        browser.resize(width, height)
        driven.get(address)
        browser.wait_for_picture()
        yield browser
        assert browser.outside(address) == []
        assert [entry for entry in driven.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driven.quit()


class Browser:
    """One page, asked and typed into."""

    def __init__(self, driven: Any, folder: Path) -> None:
        self.driven = driven
        self.folder = folder

    def run(self, code: str, *arguments: Any) -> Any:
        return self.driven.execute_script(code, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driven.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def click(self, selector: str, label: str = "") -> None:
        def find() -> Any:
            return next((one for one in self.all(selector) if label in one.text and one.is_displayed()), None)

        until(find).click()

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driven.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def shot(self, name: str) -> bytes:
        data = base64.b64decode(self.driven.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
        (self.folder / f"{name}.png").write_bytes(data)
        return data

    def wait_for_picture(self) -> None:
        ready = (
            "return document.body.dataset.ready && document.querySelector('.tn-picture img')?.naturalWidth > 0"
            " && !document.querySelector('.tn-picture.tn-stale')"
        )
        until(lambda: self.run(ready))

    def picture(self) -> bytes:
        source = str(self.run("return document.querySelector('.tn-picture img').src"))
        return base64.b64decode(source.partition(",")[2])

    def yaml(self) -> str:
        return str(self.run("return getElement(window.tnEditor).editor.state.doc.toString()"))

    def go_after(self, words: str) -> None:
        """Put the cursor behind the first place of some words."""
        self.run(
            "const view = getElement(window.tnEditor).editor;"
            "const at = view.state.doc.toString().indexOf(arguments[0]) + arguments[0].length;"
            "view.dispatch({selection: {anchor: at}, scrollIntoView: true}); view.focus()",
            words,
        )

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driven).send_keys(*keys).perform()

    def chord(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driven).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    def keystrokes(self, count: int) -> list[float]:
        """Milliseconds until a picture is painted, for so many changes of a digit of `{r: 4}`."""
        self.driven.set_script_timeout(30 + 10 * count)
        return [float(time) for time in self.driven.execute_async_script(KEYSTROKES, count)]

    def outside(self, address: str) -> list[str]:
        """What was asked for elsewhere than below the page's address."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driven.get_log("performance"))
        urls = [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]
        assert any(url.startswith(address) for url in urls) or not urls
        return [url for url in urls if not url.startswith((address, "data:", "blob:", "about:", "chrome"))]
