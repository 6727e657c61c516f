"""`tnpeft edit` in a browser: what somebody who writes a spec does, and sees."""

from __future__ import annotations

import asyncio
import http.client
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser, edited, opened, until

import tnpeft
from tnpeft.editing.document import NEW, shipped_text

pytest.importorskip("nicegui")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("editor")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Browser]:
    with edited(folder, "mine.yaml", "--from", "tenvoo_l") as address, opened(address, folder) as browser:
        yield browser


@pytest.fixture(autouse=True)
def begin(request: pytest.FixtureRequest) -> None:
    """Each test of the page begins with the same text."""
    if "page" in request.fixturenames:
        browser: Browser = request.getfixturevalue("page")
        browser.run(
            "const view = getElement(window.tnEditor).editor;"
            "view.dispatch({changes: {from: 0, to: view.state.doc.length, insert: arguments[0]}})",
            shipped_text("tenvoo_l"),
        )
        until(lambda: not browser.all(".tn-mistakes li") and "2,944" in browser.text(".tn-summary"))
        browser.wait_for_picture()


def drawn(text: str, **params: int) -> bytes:
    layer = tnpeft.Layer("Conv3d", 64, 128, (3, 3, 3))
    return tnpeft.draw_network(tnpeft.Spec.from_yaml(text), layer=layer, **params).data()


def test_a_mistake_is_underlined_and_mended(page: Browser):
    from selenium.webdriver.common.keys import Keys

    good = page.picture()
    assert good == drawn(page.yaml())
    page.go_after("kh i j k")
    page.keys("z")
    until(lambda: len(page.all(".tn-mistakes li")) == 2)
    assert [mark.text for mark in until(lambda: page.all(".tn-mistake"))] == ["kz", "k"]
    assert page.all(".tn-mistake")[0].get_attribute("title").startswith("core 'kernel_h', index 'kz' dangles: expected")
    assert page.text(".tn-mistakes li").startswith("23:20 core 'kernel_h', index 'kz' dangles")
    assert page.picture() == good
    assert page.all(".tn-picture.tn-stale")
    page.shot("mistake")
    page.keys(Keys.BACKSPACE)
    until(lambda: not page.all(".tn-mistakes li"))
    page.wait_for_picture()
    assert page.picture() == good
    assert not page.all(".tn-mistake")


def test_a_click_on_a_mistake_goes_to_it(page: Browser):
    page.go_after("kw k l m")
    page.keys("x")
    until(lambda: page.all(".tn-mistakes li"))
    page.go_after("tnpeft: 1")
    page.click(".tn-mistakes li", "mx")
    at = page.run("const s = getElement(window.tnEditor).editor.state; return s.doc.lineAt(s.selection.main.head).text")
    assert at == "  kernel_w: kw k l mx"


def test_the_picture_follows_a_change_of_the_network(page: Browser):
    text = page.yaml()
    changed = text.replace("kw k l m", "kw k l").replace("o3 m n p", "o3 n p")
    page.run(
        "const view = getElement(window.tnEditor).editor;"
        "view.dispatch({changes: {from: 0, to: view.state.doc.length, insert: arguments[0]}})",
        changed,
    )
    until(lambda: page.picture() == drawn(changed))  # at first another placement may stand there


def test_a_slider_tries_a_param(page: Browser):
    from selenium.webdriver.common.keys import Keys

    slider = until(lambda: page.all(".tn-slider-r .q-slider__track-container, .tn-slider-r[tabindex]"))[0]
    slider.send_keys(Keys.ARROW_RIGHT)
    until(lambda: "r=5" in page.text(".tn-attach"))
    page.wait_for_picture()
    until(lambda: page.picture() == drawn(page.yaml(), r=5))
    assert "{r: 4}" in page.yaml()
    assert "5,400" in page.text(".tn-summary")
    page.click(".tn-param button", "file")
    until(lambda: "2,944" in page.text(".tn-summary"))


def test_a_layer_can_be_chosen(page: Browser):
    from selenium.webdriver.common.keys import Keys

    field = page.all("input.tn-field-inputs, .tn-field-inputs input")[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("32")
    until(lambda: "128 x 32 x 3 x 3 x 3" in page.text(".tn-summary"))
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("64")
    until(lambda: "128 x 64 x 3 x 3 x 3" in page.text(".tn-summary"))


def test_keys_and_values_are_completed(page: Browser):
    page.go_after("start: ")
    page.chord(" ")
    labels = until(lambda: [item.text for item in page.all(".cm-tooltip-autocomplete li")])
    assert sorted(labels) == ["frozen_copy", "zero"]
    assert page.all(".cm-completionInfo") or until(lambda: page.all(".cm-completionInfo"))
    page.shot("completion")


def test_what_takes_longer_comes_behind(page: Browser):
    until(lambda: "hybrid" in page.text(".tn-costs"))
    until(lambda: "std T / std W" in page.text(".tn-spread"))
    until(lambda: "of the directions" in page.text(".tn-directions"))
    until(lambda: not page.all(".tn-content.tn-stale"))
    page.run("window.scrollTo(0, 900)")
    page.shot("facts")
    page.run("window.scrollTo(0, 0)")


def test_saving_and_a_change_on_the_disk(page: Browser, folder: Path):
    path = folder / "mine.yaml"
    page.chord("s")
    until(path.exists)
    assert path.read_text() == page.yaml()
    until(lambda: page.text(".tn-file") == "mine.yaml")
    page.go_after("tnpeft: 1")
    page.keys(" # mine")
    until(lambda: page.text(".tn-file") == "mine.yaml (not saved)")
    path.write_text("theirs")
    page.click(".tn-save")
    until(lambda: "changed on the disk" in page.text(".q-dialog"))
    assert path.read_text() == "theirs"
    page.click(".q-dialog button", "Write over it")
    until(lambda: path.read_text() == page.yaml())
    assert sorted(file.name for file in folder.glob("*.yaml")) == ["mine.yaml"]


def test_a_page_that_is_loaded_anew_has_what_was_written(page: Browser):
    page.go_after("tnpeft: 1")
    page.keys(" # kept")
    until(lambda: "not saved" in page.text(".tn-file"))
    page.driven.refresh()
    page.wait_for_picture()
    assert "tnpeft: 1 # kept" in page.yaml()


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_pictures_are_exported(page: Browser, folder: Path, suffix: str):
    into = {"behavior": "allow", "downloadPath": str(folder / suffix)}
    page.driven.execute_cdp_cmd("Browser.setDownloadBehavior", into)
    page.click(".tn-export")
    page.click(".q-menu .q-item", suffix.upper())
    path = folder / suffix / f"tenvoo_l.{suffix}"
    until(path.exists)
    until(lambda: not list(path.parent.glob("*.crdownload")))
    layer = tnpeft.Layer("Conv3d", 64, 128, (3, 3, 3))
    picture = tnpeft.draw_network(tnpeft.Spec.from_yaml(page.yaml()), layer=layer)
    assert path.read_bytes() == picture.data(suffix)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_in_any_width_dark_and_light(page: Browser, width: int, dark: bool):
    page.resize(width, 900)
    until(lambda: page.run("return innerWidth") == width)
    is_dark = "return document.body.classList.contains('body--dark')"
    if page.run(is_dark) != dark:
        page.click(".tn-dark")
    until(lambda: page.run(is_dark) == dark)
    page.wait_for_picture()
    assert page.run("return document.documentElement.scrollWidth") <= width
    beside = page.run(
        "const box = name => document.querySelector(name).getBoundingClientRect();"
        "return box('.tn-picture').left >= box('.tn-editor').right"
    )
    assert beside == (width > 900)
    page.go_after("tnpeft: 1")
    page.keys(" ")  # what comes from the server changes neither
    until(lambda: "not saved" in page.text(".tn-file"))
    page.wait_for_picture()
    assert page.run(is_dark) == dark
    contrast = page.run(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    page.shot(f"page_{width}_{'dark' if dark else 'light'}")
    page.resize(1280, 1000)


# The contrast of texts with what is behind them, by WCAG 2.
CONTRAST = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).map(Number);
  if (parts.length > 3 && parts[3] === 0) return null;
  const [r, g, b] = parts.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const found = light(getComputedStyle(at).backgroundColor);
    if (found !== null) return found;
  }
  return 1;
};
const found = {};
for (const name of [".tn-title", ".tn-file", ".tn-heading", ".tn-content dt", ".tn-content th", ".tn-content td"]) {
  const element = document.querySelector(name);
  const [one, other] = [light(getComputedStyle(element).color), behind(element)].sort((a, b) => b - a);
  found[name] = (one + 0.05) / (other + 0.05);
}
return found;
"""


def test_a_picture_is_there_soon_after_a_keystroke(page: Browser, record_property: Callable[[str, object], None]):
    """Ten cores; the bound leaves room for a busy machine. `benchmarks/editor_latency.py` has those of a quiet one."""
    times = page.keystrokes(12)
    record_property("median_ms", statistics.median(times))
    assert min(times) < 1000


def test_it_begins_with_a_shipped_spec(folder: Path):
    with edited(folder, "another.yaml") as address, opened(address, folder / "another") as browser:
        assert browser.yaml() == NEW
        browser.click(".tn-start")
        browser.keys("loha")
        browser.click(".q-menu .q-item", "loha")
        until(lambda: browser.yaml() == shipped_text("loha"))
        until(lambda: "w1" in browser.text(".tn-cores") or "elements" in browser.text(".tn-cores"))


def test_ctrl_c_ends_it_while_a_page_is_open(folder: Path):
    client = pytest.importorskip("websockets.sync.client")
    with ExitStack() as open_pages:
        with edited(folder, "lora") as address:  # ended by Ctrl-C, exit status 0
            url = address.replace("http:", "ws:") + "_nicegui_ws/socket.io/?EIO=4&transport=websocket"
            origin = address.rpartition("/")[0].rpartition("/")[0]
            connection = open_pages.enter_context(client.connect(url, origin=origin))
            assert connection.recv().startswith("0{")
            began = time.monotonic()
        assert time.monotonic() - began < 30


def test_without_the_token_or_from_elsewhere_nothing_is_served(folder: Path):
    with edited(folder, "lora") as address:
        parts = urlsplit(address)
        host = f"127.0.0.1:{parts.port}"
        assert status(parts.port, parts.path) == 200
        assert status(parts.port, "/") == 404
        assert status(parts.port, "/_nicegui_ws/socket.io/?EIO=4&transport=polling") == 404
        assert status(parts.port, parts.path, {"Host": f"evil.example:{parts.port}"}) == 421
        assert status(parts.port, parts.path, {"Host": host, "Origin": "http://evil.example"}) == 403
        assert status(parts.port, f"{parts.path}assets/../../../../etc/passwd") in (404, 400)
        assert status(parts.port, f"{parts.path}assets/%2e%2e/page.py") == 404
        socket = f"ws://{host}{parts.path}_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        assert asyncio.run(connects(socket, f"http://{host}"))
        assert not asyncio.run(connects(socket, "http://evil.example"))
        assert not asyncio.run(connects(socket.replace(parts.path, "/"), f"http://{host}"))
    assert not (folder / ".nicegui").exists()


def status(port: int | None, path: str, headers: dict[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers or {})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


async def connects(url: str, origin: str) -> bool:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        try:
            async with session.ws_connect(url, headers={"Origin": origin}) as socket:
                return (await socket.receive_str()).startswith("0{")
        except aiohttp.WSServerHandshakeError:
            return False
