"""Programs that tests need and pip does not bring: Debian's packages, in CI always."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


def program(pattern: str, package: str) -> str:
    """The path that fits, the newest version's of several; without one the test is skipped, but in CI it fails."""
    found = sorted(glob.glob(pattern))
    if found:
        return found[-1]
    missing = f"{pattern} is missing: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def chromium() -> Iterator[Chrome]:
    """A headless Chromium in which no page may use the network beyond this machine."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options, driver = ChromeOptions(), program("/usr/bin/chromedriver", "chromium-driver")
    options.binary_location = program("/usr/bin/chromium", "chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "enable-unsafe-swiftshader"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # type: ignore[no-untyped-call]
    browser = Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()
