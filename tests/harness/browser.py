"""A real Chromium, headless, that reaches loopback only; driven by selenium, watched by its own log."""

import base64
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from harness.needs import program

_INSIDE = ("chrome://", "data:")
_FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run
--no-proxy-server --disable-background-networking --disable-component-update --disable-sync
--disable-default-apps --disable-extensions --hide-scrollbars --force-color-profile=srgb"""
"""No sandbox: the tests may run as root."""


class Browser:
    """One window. What it asked for and complained of is read once: each call tells what is new."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        """The value of a function's body in the page."""
        return self.driver.execute_script(script, *arguments)

    def look(self, *, width: int = 1280, height: int = 900, theme: str = "light", motion: str = "") -> None:
        """Another window and other preferences of its user."""
        wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self._tell("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._tell("Emulation.setDeviceMetricsOverride", **size)

    def press_tab(self) -> None:
        self.driver.switch_to.active_element.send_keys(Keys.TAB)

    def allow_scripts(self, *, allowed: bool) -> None:
        self._tell("Emulation.setScriptExecutionDisabled", value=not allowed)

    def requests(self) -> list[str]:
        """URLs that were asked for, but for what never leaves the browser."""
        events = [json.loads(row["message"])["message"] for row in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for params in sent if not (url := params["request"]["url"]).startswith(_INSIDE)]

    def complaints(self) -> list[str]:
        """What stands in the console: errors, and what the page's policy kept it from."""
        rows = self.driver.get_log("browser")
        return [row["message"] for row in rows if row["source"] != "rendering"]  # advice to who reads pixels

    def picture(self, file: Path, *, height: int | None = None) -> None:
        """The page as PNG, from its top, whole or so many pixels of it."""
        clip = {"x": 0, "y": 0, "scale": 1, "width": self.run("return innerWidth")}
        clip["height"] = height or self.run("return document.body.scrollHeight")
        shot = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _tell(self, command: str, **parameters: object) -> dict[str, Any]:
        found: dict[str, Any] = self.driver.execute_cdp_cmd(command, parameters)
        return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A new browser with nothing in it; ended with the block."""
    options, driver = Options(), program("chromedriver")
    options.binary_location = program("chromium")
    for flag in _FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="gup-chromium-", ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options=options, service=Service(driver))
        try:
            driver.set_page_load_timeout(30)
            driver.set_script_timeout(15)
            yield Browser(driver)
        finally:
            driver.quit()
