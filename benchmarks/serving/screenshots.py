"""Pictures of the page of ``ccm serve``, from a real run of the embedded model in a real browser.

    python benchmarks/serving/screenshots.py [--tokens 80] [--out docs/figures]

The first example of the page is played, its last question is compared, and the tab "Inside" shows what the answer
read. Writes server.png (wide), server-dark.png and server-narrow.png. Needs chromium, chromedriver and selenium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WIDE, NARROW = (1360, 860), (412, 860)
#: Seconds that the model may take for all of it.
PATIENCE = 1800


def browser(width: int, height: int) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    resize(driver, width, height)
    return driver


def resize(driver: webdriver.Chrome, width: int, height: int, scheme: str = "light") -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    time.sleep(0.5)  # transitions


def until(driver: webdriver.Chrome, script: str) -> None:
    WebDriverWait(driver, PATIENCE, 0.3).until(lambda _: driver.execute_script(f"return {script}"))


def play(driver: webdriver.Chrome, url: str, tokens: int) -> None:
    """The first example of the page, to the end of its comparison, and the reading of its last answer."""
    driver.get(url)
    until(driver, "document.querySelector('.hello .small') !== null")
    driver.execute_script(f"document.getElementById('tokens').value = {tokens}")
    driver.find_element(By.CSS_SELECTOR, ".examples button").click()
    until(driver, "document.querySelector('.compared') && document.getElementById('stop').hidden")
    driver.find_element(By.ID, "tab-inside").click()
    driver.find_element(By.ID, "read").click()
    until(driver, "document.querySelector('#heat td') !== null")


def shoot(driver: webdriver.Chrome, path: Path) -> None:
    """The end of the conversation in view."""
    driver.execute_script("toEnd(); document.activeElement.blur()")
    time.sleep(0.5)
    driver.save_screenshot(str(path))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--tokens", type=int, default=80, help="of the longest answer")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "figures")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ccm", "serve", "--port", "0", "--store", f"sqlite:///{folder}/m.db"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = next(word for line in server.stdout for word in line.split() if word.startswith("http"))
            driver = browser(*WIDE)
            try:
                play(driver, url, given.tokens)
                shoot(driver, given.out / "server.png")
                resize(driver, *WIDE, scheme="dark")
                driver.find_element(By.ID, "tab-memory").click()
                shoot(driver, given.out / "server-dark.png")
                resize(driver, *NARROW)
                shoot(driver, given.out / "server-narrow.png")
                print(driver.execute_script("return document.getElementById('log').innerText"))
            finally:
                driver.quit()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
