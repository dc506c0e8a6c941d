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
        self.set("tokens", 12)

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

    def texts(self, role=""):
        """What was said, as the page has it: what is shown of an answer is Markdown."""
        return [message.get_attribute("data-text") for message in self.all(f".message{role}")]

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
    made = httpx.post(f"{server.url}/v1/conversations", json={"items": said}, timeout=60).json()["id"]
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


def known(server, name):
    """The texts of a conversation, as the server has them."""
    return [turn["content"] for turn in httpx.get(f"{server.url}/v1/memories/{name}").json()["turns"]]


MARKDOWN = """### A list

1. **first**, *then*
2. `code <b>`
   - inner ~~gone~~

```python
print("<i>")
```

> quoted

| a | b |
|---|---|
| 1 | [site](https://example.org/x) |
"""


def told(server, page, text):
    """A conversation with an answer of this text, opened on the page."""
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    made = httpx.post(f"{server.url}/v1/conversations", json={"items": said}, timeout=60).json()["id"]
    page.driver.refresh()
    page.go_to(made)
    page.until(lambda: len(page.all(".message")) == 2)
    return made


def test_an_answer_is_markdown_and_a_question_is_not(page, server):
    told(server, page, MARKDOWN)
    there = {
        tag: len(page.all(f".assistant .body {tag}"))
        for tag in ("h5", "ol", "ul", "li", "strong", "em", "del")
    }
    assert there == {"h5": 1, "ol": 1, "ul": 1, "li": 3, "strong": 1, "em": 1, "del": 1}
    assert [c.text for c in page.all(".assistant code")] == ["code <b>", 'print("<i>")']
    assert page.all(".assistant blockquote p")[0].text == "quoted" and len(page.all(".assistant td")) == 2
    link = page.all(".assistant a")[0]
    assert link.get_attribute("href") == "https://example.org/x" and link.text == "site"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert not page.all(".user .body *") and page.bodies(".user")[0] == MARKDOWN.strip()


HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "text <svg onload=\"document.title='owned'\"> more",
    "<script>document.title='owned'</script>",
    "<style>* { display: none }</style>",
    "<div><iframe src='https://example.org'></iframe></div>",
    "<details open ontoggle=\"document.title='owned'\">",
    "[x](javascript:document.title='owned')",
    "[x](JaVaScRiPt:document.title='owned') [y](data:text/html,<script>1</script>) [z](vbscript:1) [w](/v1/models)",
    "![x](https://example.org/x.png) ![y](x onerror=alert(1))",
    "[x]: javascript:alert(1)\n\n[x]",
    "<javascript:document.title='owned'>",
    "`<img src=x>` **<img src=x>** [<img src=x>](https://example.org)",
    "| <img src=x> | b |\n|---|---|\n| <form action=/> | <input autofocus onfocus=alert(1)> |",
    "```html\n<script>document.title='owned'</script>\n```",
    "1. <a href=\"javascript:document.title='owned'\">a</a>\n2. <math><mtext></mtext></math>",
    "&lt;img src=x&gt; &#60;img src=x&#62; &Tab;",
    ">" * 5000 + "deep",
    "[" * 3000,
    "*" * 3000 + "a",
]


def test_nothing_that_a_model_says_becomes_markup(page, server):
    """Every node is one of those that markdown.js makes, without attributes of the text but a safe link's."""
    title = page.driver.title
    kind = "P|SPAN|STRONG|EM|DEL|CODE|PRE|BLOCKQUOTE|HR|BR|[UO]L|LI|DIV|A|H[3-6]|TABLE|THEAD|TBODY|T[RHD]"
    script = """
        const made = document.createElement("div");
        document.body.append(made);
        made.append(markdown(arguments[0]));
        const found = [...made.querySelectorAll("*")].map((e) => [
            e.tagName, [...e.attributes].map((a) => `${a.name}=${a.value}`)]);
        const text = made.textContent;
        made.remove();
        return [found, text];"""
    for text in HOSTILE:
        found, shown = page.driver.execute_script(script, text)
        assert found and all(re.fullmatch(kind, tag) for tag, _ in found), text
        for tag, attributes in found:
            names = {one.partition("=")[0] for one in attributes}
            assert names <= ({"href", "target", "rel", "title"} if tag == "A" else {"start"}), (
                text,
                attributes,
            )
            assert tag != "A" or all(
                one.startswith(("href=http://", "href=https://", "href=mailto:"))
                for one in attributes
                if one.startswith("href=")
            ), (text, attributes)
        if "<" in text and "](" not in text:
            for word in re.findall(r"<(\w+)", text):
                assert f"<{word}" in shown, (text, shown)  # it is read, not swallowed
    told(server, page, "\n\n".join(HOSTILE[:16]))
    time.sleep(0.2)
    assert page.driver.title == title and not page.all(
        "#log img, #log script, #log iframe, #log form, #log svg"
    )
    script = "const e = document.createElement('div'); e.innerHTML = arguments[0]; return e.children.length"
    assert page.driver.execute_script(script, "<i>x</i>") == 1  # negative control: what markup would make


def test_an_answer_is_tried_again(page, server, monkeypatch):
    """The memory goes back to before it: it is that of a conversation which never heard the first one."""
    page.set("temperature", 2)
    page.say("hello")
    page.say("go on")
    first = page.texts()[-1]
    name = page.id()
    before = httpx.get(f"{server.url}/v1/memories/{name}").json()["version"]
    page.tool("Try again")
    page.until(lambda: len(page.all(".message")) == 4 and page.texts()[-1] not in (first, ""))
    page.settled(4)
    texts = known(server, name)
    assert page.texts() == texts and texts[2] == "go on" and texts[3] != first
    after = httpx.get(f"{server.url}/v1/memories/{name}").json()
    assert (after["version"], after["stats"]["turns"]) == (before + 1, 4)
    assert after["stats"]["tokens_seen"] == sum(turn["tokens"] for turn in after["turns"])
    page.tool("Try again", 1)  # an older one: what came after goes with it
    page.until(lambda: len(known(server, name)) == 2)
    page.settled(2)
    assert page.texts() == known(server, name) and page.bodies()[0] == "hello"


def test_a_message_is_edited(page, server):
    for text in ("my cat is Miso", "my cat is Miso", "who?"):
        page.say(text)
    name = page.id()
    texts = known(server, name)
    for index, new in ((2, "my dog is Rex"), (0, "good morning")):  # one said twice, and the very first
        page.tool("Edit", index)
        field = page.all(".message textarea")[0]
        field.clear()
        field.send_keys(new, Press.ENTER)
        page.until(lambda index=index: len(known(server, name)) == index + 2)
        page.settled(index + 2)
        now = known(server, name)
        assert now[:index] == texts[:index] and now[index] == new and page.texts() == now
        assert httpx.get(f"{server.url}/v1/memories/{name}").json()["stats"]["turns"] == index + 2
    page.tool("Edit", 0)
    page.all(".message textarea")[0].send_keys(" and more", Press.ESCAPE)
    assert not page.all(".message textarea") and page.bodies()[0] == "good morning"


def test_an_edit_that_is_stopped_changes_nothing(page, server, monkeypatch):
    page.say("hello")
    name, texts = page.id(), page.texts()
    monkeypatch.setattr(server.service.engine, "_ends", set())
    page.set("tokens", 400)
    page.tool("Edit", 0)
    field = page.all(".message textarea")[0]
    field.clear()
    field.send_keys("something else", Press.ENTER)
    page.until(
        lambda: len(page.all(".message")) == 2 and page.bodies(".assistant")[-1] and page.all(".running")
    )
    page.click("stop")
    page.until(lambda: "as it was before" in page.text("notice"))
    assert known(server, name) == page.texts() == texts
    assert (
        page.all(".message textarea")[0].get_attribute("value") == "something else"
    )  # nothing typed is lost


def test_copy(page, server):
    told(server, page, MARKDOWN)
    page.driver.execute_script("""
        window.copied = [];
        Object.defineProperty(navigator, "clipboard", {
            configurable: true, value: { writeText: async (text) => { window.copied.push(text); } } });""")
    page.tool("Copy")
    page.until(lambda: page.driver.execute_script("return window.copied.length"))
    assert (
        page.driver.execute_script("return window.copied[0]") == MARKDOWN
    )  # as it was written, not as it is drawn
    page.driver.execute_script("""
        Object.defineProperty(navigator, "clipboard", { configurable: true, value: undefined });
        document.addEventListener("copy", () => (window.by = document.activeElement.value));""")
    page.tool("Copy", 0)
    page.until(lambda: page.driver.execute_script("return window.by"))
    assert page.driver.execute_script("return window.by") == MARKDOWN


def test_a_title(page, server):
    page.say("the weather is fine")
    name = page.id()
    page.click("rename")
    page.until(lambda: page.find("ask").is_displayed())
    assert page.find("answer").get_attribute("value") == "The weather is fine"
    page.find("answer").send_keys("<b>Oslo</b>", Press.ENTER)
    page.until(lambda: page.text("name") == "<b>Oslo</b>")
    assert "<b>Oslo</b>" in page.text("list")
    assert httpx.get(f"{server.url}/v1/conversations/{name}").json()["metadata"] == {"title": "<b>Oslo</b>"}
    page.say("and tomorrow?")  # a turn keeps it
    page.driver.refresh()
    page.until(lambda: "<b>Oslo</b>" in page.text("list"))
    page.go_to(name)
    page.click("rename")
    page.until(lambda: page.find("ask").is_displayed())
    page.click("no")
    assert page.text("name") == "<b>Oslo</b>"
    page.click("rename")
    page.until(lambda: page.find("ask").is_displayed())
    page.find("answer").clear()
    page.click("yes")
    page.until(lambda: page.text("name") == "The weather is fine")


def test_branches_of_other_programs_are_not_listed(page, server):
    body = {"model": "ccm", "input": "hello there", "max_output_tokens": 3}
    made = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).json()
    name = made["id"].removeprefix("resp_").rpartition(".")[0]
    assert name.startswith("mem_") and httpx.get(f"{server.url}/v1/memories/{name}").status_code == 200
    page.say("hello")
    page.driver.refresh()
    page.until(lambda: page.all("#list button"))
    assert not page.all('#list [data-id^="mem_"]')


def test_a_system_message(page, server):
    page.click("settings")
    page.find("system").send_keys("You are a pirate.")
    page.find("text").send_keys("hello", Press.ENTER)
    page.settled(3)
    assert known(server, page.id())[0] == "You are a pirate." and page.bodies()[0] == "You are a pirate."
    assert not page.find("system").is_enabled()  # it was told at the beginning
    page.say("and more")
    assert [turn for turn in known(server, page.id()) if turn == "You are a pirate."] == ["You are a pirate."]
    page.tool("Edit", 1)
    page.all(".message textarea")[0].send_keys("!", Press.ENTER)
    page.until(lambda: len(known(server, page.id())) == 3)
    page.settled(3)
    assert known(server, page.id())[:2] == ["You are a pirate.", "hello!"]
    page.click("new")
    assert page.find("system").is_enabled()
    page.set("system", "")


def test_an_answer_that_the_limit_cut_says_so(page, server, monkeypatch):
    monkeypatch.setattr(server.service.engine, "_ends", set())
    page.set("tokens", 4)
    page.say("hello")
    name, cut = page.id(), "cut here, at 4 tokens (Settings: longest answer)"

    def marks():
        return [
            [mark.text for mark in m.find_elements(By.CSS_SELECTOR, ".mark")] for m in page.all(".message")
        ]

    assert marks() == [[], [cut]]
    body = {
        "model": "ccm",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": 300,
        "stream": True,
    }
    headers = {"X-Session-Id": name, "X-CCM-On-Disconnect": "keep"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as stream:
        next(stream.iter_lines())  # a client that goes away in the middle
    page.until(lambda: len(known(server, name)) == 4)
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    httpx.post(f"{server.url}/v1/conversations/{name}/items", json={"items": said}, timeout=60)
    page.driver.refresh()
    page.go_to(name)
    page.until(lambda: len(page.all(".message")) == 6)
    turns = httpx.get(f"{server.url}/v1/memories/{name}").json()["turns"]
    assert [turn["cut"] and turn["cut"]["by"] for turn in turns] == [
        None,
        "length",
        None,
        "stopped",
        None,
        None,
    ]
    count = turns[3]["cut"]["tokens"]
    assert 0 <= count < 300
    stopped = f"stopped here, after {count} token{'s' * (count != 1)}"
    assert marks() == [[], [cut], [], [stopped], [], []]  # as they were before the page was loaded again


def test_comparison_with_full_context_and_nothing(page, server):
    """The model itself answers from the same words, and from the question alone."""
    page.set("temperature", 0)
    page.set("tokens", 10)
    page.say("my cat is Miso")
    said = page.bodies()
    page.click("compare")
    own = page.say("what is it?")
    page.until(lambda: not page.all("#send[hidden]"))
    columns = page.all(".compared section")
    assert [c.find_element(By.CSS_SELECTOR, "h3").text.split("\n")[0] for c in columns] == [
        "memory",
        "full context",
        "nothing",
    ]
    texts = [c.find_element(By.CSS_SELECTOR, ".body").text for c in columns]

    def alone(messages):
        body = {"model": "ccm", "messages": messages, "temperature": 0, "max_tokens": 10}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()

    question = {"role": "user", "content": "what is it?"}
    history = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]
    full, nothing = alone([*history, question]), alone([question])
    want = [a["choices"][0]["message"]["content"] for a in (full, nothing)]
    assert [t.split() for t in texts] == [t.split() for t in (own, *want)]
    stats = httpx.get(f"{server.url}/v1/memories/{page.id()}").json()["stats"]
    per_token = httpx.get(f"{server.url}/v1/models").json()["data"][0]["kv_bytes_per_token"]
    figures = [c.find_element(By.CSS_SELECTOR, "h3 span").text for c in columns]
    script = "return arguments[0].map(bytes)"
    held = [stats["nbytes"], *(a["usage"]["total_tokens"] * per_token for a in (full, nothing))]
    assert figures == page.driver.execute_script(script, held)
    assert stats["turns"] == 4  # what was compared is no part of the conversation


def test_what_does_not_fit_the_context_is_said(page, server):
    page.set("tokens", 10)
    for _ in range(4):
        page.say("x" * 120)
    page.click("compare")
    page.say("and now?")
    page.until(lambda: not page.all("#send[hidden]"))
    refused = page.all(".compared .whole .refused")
    assert refused and "context is 512" in refused[0].text
    assert page.all(".compared .nothing .body")[0].text


def test_examples_for_an_empty_conversation(page, server):
    small = page.all(".hello .small")[0].text
    assert "LlamaForCausalLM is a small model of 0 million" in small and "ccm serve --model" in small
    page.set("tokens", 8)
    example = page.all(".hello .examples button")[0]
    said = example.find_element(By.CSS_SELECTOR, "small").text.split("  →  ")
    count = page.driver.execute_script("return EXAMPLES[0].said.length")
    example.click()
    page.until(lambda: len(page.all("#turns li")) == 2 * count and not page.all("#send[hidden]"))
    assert page.bodies(".user") == page.driver.execute_script("return EXAMPLES[0].said")
    assert len(page.all(".compared")) == 1 and not page.all(".hello") and said
    page.click("new")
    assert page.all(".hello .examples button")


def test_pointing_at_a_turn_shows_its_text_and_its_slots(page, server):
    page.say("my cat is Miso and it sleeps on the old blue sofa all day long")
    page.say("hello")
    found = httpx.get(f"{server.url}/v1/memories/{page.id()}/inside").json()
    own = [line for line in found["lines"] if line["turns"][0] == 0 and line["kind"] == "slots"]
    first, last = own[0]["entries"]
    page.driver.execute_script("document.querySelector('#turns li').focus()")
    page.until(lambda: page.find("peek").is_displayed())
    text = page.text("peek")
    assert (
        "old blue sofa all day long" in text
        and f"slots {first}–{last - 1} (folded)" in text
        and "turn 1, you" in text
    )
    assert "lit" in page.all(".message")[0].get_attribute("class")  # where it was said
    lit = page.all("#strip button.lit")
    assert lit and len(lit) < len(page.all("#strip button"))
    page.driver.execute_script("document.activeElement.blur()")
    assert not page.find("peek").is_displayed() and not page.all(".lit")
    box = "const {left, right, top, bottom} = document.getElementById('peek').getBoundingClientRect();"
    page.driver.execute_script("[...document.querySelectorAll('#turns li')].at(-1).focus()")
    page.until(lambda: page.find("peek").is_displayed())
    assert page.driver.execute_script(
        f"{box} return left >= 0 && top >= 0 && right <= innerWidth && bottom <= innerHeight"
    )


def test_the_tab_inside_shows_what_the_answer_read(page, server):
    page.say("my cat is Miso and it sleeps on the old blue sofa all day long")
    page.say("what is it called?")
    assert not page.find("pane-inside").is_displayed()
    page.click("tab-inside")
    assert page.find("pane-inside").is_displayed() and not page.find("pane-memory").is_displayed()
    assert page.find("tab-inside").get_attribute("aria-selected") == "true"
    found = httpx.get(f"{server.url}/v1/memories/{page.id()}/inside").json()
    assert len(page.all("#strip button")) == len(found["lines"])
    assert "slots" in page.text("legend") and "window" in page.text("legend")
    page.click("read")
    page.until(lambda: page.all("#heat td"))
    read = httpx.post(f"{server.url}/v1/memories/{page.id()}/reading", timeout=60).json()
    shown = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td")] for row in page.all("#heat tbody tr")
    ]
    assert shown == [[f"{100 * share:.1f}" for share in line["read"]] for line in read["lines"]]
    assert len(page.all("#heat thead th")) == 1 + len(read["layers"])
    assert page.all("#heat blockquote")[0].text.split() == read["answer"].split()
    page.say("and more")  # the picture of an older answer goes
    assert not page.all("#heat td")
    page.click("tab-memory")


def test_dark_and_light_differ(page):
    colours = []
    for scheme in ("light", "dark"):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        colours.append(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(set(colours)) == 2


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
        wide = "return document.documentElement.scrollWidth - innerWidth"
        assert page.driver.execute_script(wide) <= 0
        page.click("tab-inside")
        assert page.find("strip").is_displayed() and page.driver.execute_script(wide) <= 0
        page.click("ratio")
        page.click("compare")
        page.say("and now?")
        columns = [section.rect for section in page.all(".compared section")]
        assert len({rect["x"] for rect in columns}) < 3 and page.driver.execute_script(wide) <= 0
    finally:
        page.driver.set_window_size(1200, 800)
