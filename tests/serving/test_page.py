"""The web page in a real browser (Debian's chromium), against a real server with a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from services import serving, tiny_service

from ccm.serving.keys import Keys

webdriver = pytest.importorskip("selenium.webdriver")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no browser: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys as Press  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,800",
    )
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    folder = str(tmp_path_factory.mktemp("downloads"))
    options.add_experimental_option("prefs", {"download.default_directory": folder})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.downloads = folder
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture
def page(driver, server):
    driver.get_log("browser"), driver.get_log("performance")
    yield Page(driver, server.url)
    faults = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    assert all("status of 4" in fault for fault in faults), faults  # a refusal is no fault of the page
    for line in driver.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            assert url.startswith(("http://127.0.0.1:", "data:", "blob:")), url


class Page:
    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.until(lambda: self.text("model") or self.driver.find_element(By.ID, "ask").is_displayed())

    def find(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, name):
        return self.find(name).text

    def id(self):
        """Of the conversation that is open; "" before it has begun."""
        return self.find("name").get_attribute("data-id")

    def bodies(self, role=""):
        return [body.text for body in self.all(f".message{role} .body:not(.other)")]

    def tool(self, name, message=-1):
        """Press a button of a message."""
        found = self.all(".message")[message]
        button = next(b for b in found.find_elements(By.CSS_SELECTOR, ".tools button") if b.text == name)
        self.driver.execute_script("arguments[0].click()", button)

    def settled(self, turns):
        """Wait for the end of an answer, and for so many turns."""
        self.until(lambda: not self.all(".running") and not self.all("#send[hidden]"))
        self.until(lambda: len(self.all("#turns li")) == turns)

    def go_to(self, name):
        """Open a conversation from the list, when it is there."""
        css = f'#list [data-id="{name}"]'
        self.until(lambda: self.all(css))
        self.all(css)[0].click()
        self.until(lambda: self.id() == name)

    def set(self, name, value):
        self.driver.execute_script(f"document.getElementById('{name}').value = arguments[0]", value)

    def click(self, name):
        self.find(name).click()

    def until(self, condition):
        return WebDriverWait(self.driver, 30, 0.05).until(lambda _: condition())

    def say(self, text):
        before = len(self.all(".message"))
        self.find("text").send_keys(text, Press.ENTER)
        self.until(lambda: len(self.all(".message")) == before + 2)
        self.until(lambda: not self.all(".running") and not self.all("#send[hidden]"))
        self.until(lambda: len(self.all("#turns li")) >= before + 2)
        return self.bodies(".assistant")[-1]

    def numbers(self):
        return dict(
            zip(
                (e.text for e in self.all("#numbers dt")),
                (e.text for e in self.all("#numbers dd")),
                strict=True,
            )
        )


def test_its_files_are_part_of_the_package_and_name_no_other_place():
    folder = files("ccm.serving") / "page"
    names = {"index.html", "page.css", "page.js", "inside.js", "markdown.js", "marked.js"}
    assert {file.name for file in folder.iterdir()} == names
    for name in names - {"marked.js"}:  # which is somebody else's, and fetches nothing
        text = (folder / name).read_text()
        assert set(re.findall(r"https?://[^\s'\"]*\w", text)) <= {"http://www.w3.org/2000/svg"}
        assert "randomUUID" not in text  # not there for pages without HTTPS
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), name
    marked = (folder / "marked.js").read_text()
    assert "Permission is hereby granted" in marked and "fetch(" not in marked


def test_a_conversation(page, server):
    assert page.text("ratio") == "empty" and not page.all("#turns li")
    first = page.say("my cat is Miso and it sleeps all day")
    assert first
    name = page.id()
    assert name.startswith("my-cat-is-miso-and-it-") and page.text("name") == "My cat is miso and it"
    assert page.text("name") in page.text("list")
    stats = httpx.get(f"{server.url}/v1/memories/{name}").json()["stats"]
    assert page.numbers()["slots"] == str(stats["slots"]) and stats["slots"] > 0
    assert page.numbers()["tokens folded"] == str(stats["tokens_folded"])
    assert page.numbers()["reaches back"] == "to the start" and page.numbers()["when full"].startswith("~")
    assert "×" in page.text("ratio")
    page.say("what is it called?")
    assert page.numbers()["turns"] == "4"
    assert [row.text.split("\n")[0] for row in page.all("#turns li")] == ["you", "model"] * 2
    assert len(page.all("#turns li.folded")) >= 2 and page.all("#turns li.raw")
    page.driver.refresh()
    page.go_to(name)
    page.until(lambda: len(page.all(".message")) == 4)
    assert page.bodies(".assistant")[0] == first


def test_fork_export_import_delete(page, server):
    page.say("remember the number seven")
    name = page.id()
    page.click("fork")
    page.until(lambda: page.id() != name)
    twin = page.id()
    assert twin.startswith("remember-the-number-seven-") and len(twin) == len(name)
    assert len(page.all(".message")) == 2
    page.say("and eight")  # the newest of the list now, and none of the other's business
    first, second = page.all("#list button")[:2]
    assert (first.get_attribute("data-id"), second.get_attribute("data-id")) == (twin, name)
    stats = [httpx.get(f"{server.url}/v1/memories/{n}").json()["stats"]["turns"] for n in (name, twin)]
    assert stats == [2, 4]
    page.click("export")

    def file():
        return next(Path(page.driver.downloads).glob("*.ccm"), None)

    page.until(lambda: file() is not None)
    page.find("import").send_keys(str(file()))
    page.until(lambda: page.id() not in (name, twin))
    assert page.numbers()["turns"] == "4"
    imported = page.id()
    assert imported.startswith("remember-the-number-seven-")
    page.click("delete")
    page.until(lambda: page.find("ask").is_displayed())
    page.click("no")
    assert page.all(f'#list [data-id="{imported}"]')  # a no is a no
    page.click("delete")
    page.until(lambda: page.find("ask").is_displayed())
    page.click("yes")
    page.until(lambda: not page.all(f'#list [data-id="{imported}"]'))
    assert page.all(f'#list [data-id="{name}"]') and page.text("name") == "New conversation"


def test_the_error_of_a_smaller_precision_is_shown(driver, tmp_path):
    with serving(tiny_service(tmp_path, precision="int8")) as running:
        page = Page(driver, running.url)
        page.say("hello")
        error = httpx.get(f"{running.url}/v1/memories/{page.id()}").json()["error"]
        assert page.numbers()["stored as int8"] == f"{100 * max(error.values()):.2f} % off"


def test_stop(page, server, monkeypatch):
    monkeypatch.setattr(server.service.engine, "_ends", set())
    other = replace(server.service.settings, disconnect="finish")  # the page asks for what it tells the user
    monkeypatch.setattr(server.service, "settings", other)
    page.set("tokens", 400)
    page.find("text").send_keys("go on", Press.ENTER)
    page.until(lambda: page.bodies(".assistant") and page.bodies(".assistant")[-1])
    page.click("stop")
    page.until(lambda: "not remembered" in page.text("notice"))
    assert "stopped: this turn is not remembered" in page.all(".message.assistant")[-1].text
    assert page.find("text").get_attribute("value") == "go on"
    assert page.text("name") == "New conversation" and not page.all("#turns li")
    assert len(page.all(".message.unsent")) == 2
    monkeypatch.undo()
    page.set("tokens", 5)
    page.find("text").send_keys(Press.ENTER)
    page.until(lambda: len(page.all("#turns li")) == 2)
    assert len(page.all(".message")) == 2 and not page.all(".unsent")  # what was not sent is gone


def test_texts_are_never_markup(page, server):
    title = page.driver.title
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    said = [{"role": "assistant", "content": bad}, {"role": "user", "content": bad}]
    made = httpx.post(f"{server.url}/v1/conversations", json={"items": said}).json()["id"]
    page.driver.refresh()
    page.go_to(made)
    page.until(lambda: len(page.all(".message")) == 2)
    page.say(bad)
    time.sleep(0.2)
    assert page.driver.title == title and not page.all("#log img, #turns img, #peek img, #strip img")
    assert page.bodies()[:2] == [bad, bad]
    page.driver.execute_script(
        "document.title = 'owned'"
    )  # negative control: that is what it would look like
    assert page.driver.title == "owned"


def test_refusals_are_shown_in_words(page, server, monkeypatch):
    page.say("hello")
    name = page.id()
    httpx.delete(f"{server.url}/v1/memories/{name}")
    page.click("fork")
    page.until(lambda: name in page.text("notice") and "no session" in page.text("notice"))
    page.set("tokens", -1)
    page.find("text").send_keys("again", Press.ENTER)
    page.until(lambda: "max_tokens" in page.text("notice"))
    assert page.find("text").get_attribute("value") == "again"


def test_the_end_stays_in_view_unless_the_reader_looks_back(page):
    page.driver.execute_script("document.getElementById('log').style.flex = '0 0 6rem'")
    place = "const {scrollTop, scrollHeight, clientHeight} = document.getElementById('log');"
    page.say("one")
    page.say("two")
    assert page.driver.execute_script(f"{place} return scrollHeight - scrollTop - clientHeight < 40")
    page.driver.execute_script("document.getElementById('log').scrollTop = 0")
    time.sleep(0.2)  # the event of scrolling
    page.driver.execute_script("document.getElementById('log').style.flex = '0 0 5rem'")
    time.sleep(0.2)
    assert page.driver.execute_script(f"{place} return scrollTop") == 0


def test_import_can_be_reached_by_keyboard(page):
    page.driver.execute_script("document.getElementById('import').focus()")
    assert page.driver.switch_to.active_element.get_attribute("id") == "import"


def test_keys(driver, tmp_path):
    key = Keys.add(tmp_path / "keys.txt", "alice")
    with serving(tiny_service(tmp_path), Keys.read(tmp_path / "keys.txt")) as running:
        page = Page(driver, running.url)
        page.until(lambda: page.find("ask").is_displayed())
        page.find("answer").send_keys("wrong", Press.ENTER)
        page.until(lambda: page.find("ask").is_displayed() and not page.find("answer").get_attribute("value"))
        page.find("answer").send_keys(key, Press.ENTER)
        page.until(lambda: "tiny" in page.text("model") and page.find("text").is_displayed())
        assert page.say("hello")
        assert driver.execute_script("return Object.keys(localStorage).length + document.cookie.length") == 0
        assert key not in driver.page_source
        driver.execute_script("sessionStorage.clear()")


def test_on_a_narrow_screen(page):
    page.driver.set_window_size(400, 800)
    try:
        page.driver.refresh()
        page.until(lambda: page.find("menu").is_displayed())
        assert not page.find("side").is_displayed()
        page.click("menu")
        assert page.find("side").is_displayed() and page.find("menu").get_attribute("aria-expanded") == "true"
        page.click("menu")
        page.say("hello")
        assert page.find("ratio").is_displayed() and not page.find("turns").is_displayed()
        page.click("ratio")
        assert page.find("turns").is_displayed() and page.numbers()["turns"] == "2"
        width = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert width <= 0
    finally:
        page.driver.set_window_size(1200, 800)
