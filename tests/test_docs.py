"""The reading pages and the notebooks: fresh, whole, and readable without a network.

    python -m pytest tests/test_docs.py                a few seconds
    python -m pytest -m long tests/test_docs.py        runs the notebooks, and opens every page in Chromium
"""
import collections
import functools
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from urllib.parse import unquote

import pytest

from conftest import FOLDERS, REPO, load

build = load("docs/build.py")
PAGES = sorted((REPO / "docs" / "pages").glob("*.html"))
NOTEBOOKS = sorted((REPO / "docs" / "notebooks").glob("*.ipynb"))
TRAINERS = sorted(path for folder in FOLDERS for path in (REPO / folder).glob("train_*.py"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
per_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
per_trainer = pytest.mark.parametrize("trainer", TRAINERS, ids=lambda path: path.stem)
per_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


class Page(html.parser.HTMLParser):
    """What the tests ask about a page: its tags with their attributes, its addresses, and the text inside each kind of tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], collections.defaultdict(str)
        self.feed(path.read_text("utf8"))
        self.ids = [dict(attributes)["id"] for _, attributes in self.tags if "id" in dict(attributes)]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        if tag not in ("meta", "link", "img", "br", "hr", "input", "mspace"):
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-3:]}"
        if self.open.pop() == ("div", "code"):
            self.text["code"] += "\n"

    def handle_data(self, data):
        in_code = any(tag in ("code", "pre") for tag, _ in self.open)
        for tag, kind in self.open:
            self.text[kind or f"<{tag}>"] += data
            self.text["prose"] += "" if in_code or tag != "body" else data


parsed = functools.cache(Page)


# ---- the pages --------------------------------------------------------------------------------------------------------

def test_pages_and_notebooks_are_fresh():
    """Built once more, they are the same bytes; and no other file lies beside them."""
    files = {path: text.encode() for path, text in build.build().items()}
    stale = [path.name for path, text in files.items() if not path.exists() or path.read_bytes() != text]
    assert not stale, "run python docs/build.py"
    assert {path for path in files} == {*PAGES, *NOTEBOOKS}


def test_check_writes_nothing_and_names_what_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "build", lambda: {tmp_path / "pages" / "new.html": "x"})
    monkeypatch.setattr(build, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(build, "REPO", tmp_path)
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build.main() == 1 and capsys.readouterr().out == "stale: pages/new.html\n" and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.main() == 0 and (tmp_path / "pages" / "new.html").read_text() == "x"
    (tmp_path / "pages" / "old.html").write_text("of a lesson that has gone")
    assert build.main() == 0 and not (tmp_path / "pages" / "old.html").exists()
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build.main() == 0


def test_pages_are_small():
    assert max(path.stat().st_size for path in PAGES) < 300_000
    assert sum(path.stat().st_size for path in [*PAGES, *NOTEBOOKS]) < 3_000_000


@per_page
def test_nothing_comes_from_the_network(page):
    """Links to other sites are allowed; style, pictures and programs are not."""
    for tag, attributes in parsed(page).tags:
        assert tag not in ("script", "iframe", "object", "video", "audio", "base", "style"), tag
        for name, value in attributes:
            if name == "src" or name == "href" and tag != "a":
                assert not re.match(r"https?:|//", value), value
    assert "@import" not in (REPO / "docs" / "style.css").read_text() and "url(" not in (REPO / "docs" / "style.css").read_text()


@per_page
def test_links_and_pictures_lead_somewhere(page):
    assert not parsed(page).open, "every tag is closed"
    assert len(set(parsed(page).ids)) == len(parsed(page).ids), "an address occurs twice"
    for tag, attributes in parsed(page).tags:
        attributes = dict(attributes)
        if tag == "img":
            assert len(attributes["alt"].split()) >= 4 and attributes["loading"] == "lazy"
        for link in filter(None, (attributes.get("href"), attributes.get("src"))):
            if re.match(r"https?:|data:,", link):
                continue
            path, _, anchor = link.partition("#")
            target = Path(os.path.normpath(page.parent / path)) if path else page
            assert target.exists() and target.is_relative_to(REPO), link
            assert not anchor or target.suffix != ".html" or unquote(anchor) in parsed(target).ids, link
            assert target.suffix != ".md" or target not in build.NAMES, f"{link} has a page"


@per_page
def test_every_formula_is_drawn(page):
    """No dollar signs are left, no TeX, and nothing that browsers do not draw."""
    text = page.read_text("utf8")
    source = {build.PAGES / name: path for path, name in build.NAMES.items()}.get(page)
    if source and source.suffix == ".md":
        wanted = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", source.read_text("utf8"), flags=re.S))
        wanted = len(re.findall(r"\$\$.+?\$\$|(?<!\$)\$(?!\$)[^$\n]+\$", wanted, re.S))
        contents = text.partition("</nav>\n")[2]
        titles = len(re.findall("<math", "".join(re.findall(r'<nav class="toc".*?</nav>', contents, re.S))))
        assert text.partition("<footer>")[0].count("<math") - titles == wanted
    words = parsed(page).text["card" if page.stem.startswith("train_") else "prose"]
    assert "$" not in words and not re.search(r"\\[a-z]", words)
    assert not re.search(r'mathvariant="(?!normal)|thinmathspace|<merror', text)
    children = dict(msub=2, msup=2, mfrac=2, mover=2, munder=2, msubsup=3, munderover=3)
    for formula in re.findall(r"<math.*?</math>", text, re.S):
        for node in xml.etree.ElementTree.fromstring(formula).iter():
            assert len(node) == children.get(node.tag, len(node)), formula


def code_of_first_reading(trainer):
    """Lines of code before the mark, without docstrings, blank lines and comments that have a line of their own."""
    tests = load("tests/test_house.py")
    lines = trainer.read_text("utf8").split("\n")
    mark = next(number for number, line in enumerate(lines, 1) if "The first reading ends here" in line)
    return [lines[number - 1] for number in sorted(tests.kinds_of_lines("\n".join(lines))[0]) if number < mark]


@per_trainer
def test_the_page_has_the_whole_trainer(trainer):
    """Every line of code of the first reading, in order; every function is in the contents; each equation of the script is drawn."""
    page = parsed(build.PAGES / f"{trainer.stem}.html")
    shown = iter(line for line in page.text["code"].split("\n"))
    for line in code_of_first_reading(trainer):
        assert any(line == other for other in shown), f"missing, or not in order: {line}"
    first = page.tags.index(("details", [("id", "the-rest")]))
    functions = re.findall(r"^(?:def|class) (\w+)", trainer.read_text("utf8").partition("The first reading ends here")[0], re.M)
    before = {dict(attributes).get("id") for _, attributes in page.tags[:first]}
    assert set(functions) <= before
    links = {dict(attributes).get("href") for _, attributes in page.tags}
    assert {f"#{name}" for name in functions} <= links
    tags = set(re.findall(r"# Eq\. (\d+)", trainer.read_text("utf8")))
    assert {f"eq-{number}" for number in tags} <= before


@per_trainer
def test_words_leave_the_code_and_stand_beside_it(trainer):
    page = parsed(build.PAGES / f"{trainer.stem}.html")
    own = [line.strip() for line in trainer.read_text("utf8").split("\n") if re.match(r" *# (?!///|dependencies|requires| +\")", line)]
    code = {line.strip() for line in page.text["code"].split("\n")}
    assert own and not code & set(own)
    said = re.sub(r"\s+", "", page.text["words"] + page.text["<h2>"] + page.text["<summary>"])
    for line in own:
        words = re.sub(r"[\s`]+", "", line.strip("# -="))
        assert words.lower() in said.lower(), line


# ---- colours ----------------------------------------------------------------------------------------------------------

def contrast(one, other):
    """Contrast of two colours #rrggbb, from 1 to 21, as WCAG 2 defines it."""
    def luminance(colour):
        parts = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible():
    """At least 4.5 : 1 for all text, on each ground that it stands on, in the light and in the dark."""
    css = (REPO / "docs" / "style.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    assert len(themes) == 3                       # light, dark, paper
    for theme in themes[:2]:
        for ground in ("ground", "panel", "card", "mark"):
            for ink in ("ink", "quiet", "link", "keyword", "string", "comment", "number", "name", "builtin"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, contrast(theme[ink], theme[ground]))


# ---- the notebooks ----------------------------------------------------------------------------------------------------

@per_notebook
def test_a_notebook_has_the_first_reading_and_no_outputs(notebook):
    import nbformat
    cells = json.loads(notebook.read_text("utf8"))["cells"]
    nbformat.validate(nbformat.read(notebook, as_version=4))
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "\n".join(code)
    trainer = next(path for path in TRAINERS if f'sys.argv = ["{path.name}"' in text)
    lines = iter(text.split("\n"))
    for line in code_of_first_reading(trainer):
        assert any(line == other for other in lines), f"missing, or not in order: {line}"
    words = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "<img" not in words and "![" not in words, "a picture would be missing where the notebook stands alone"
    for path in re.findall(r"\]\((?!https?:)([^)#\s]+)", words):
        assert (notebook.parent / path).exists(), path


@pytest.mark.long
@per_notebook
def test_a_notebook_runs_alone(notebook, tmp_path):
    """From top to bottom in an empty directory, with one thread; it installs nothing, and its last cell draws."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    content, start = nbformat.read(notebook, as_version=4), time.time()
    nbclient.NotebookClient(content, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not any(output.get("name") == "stdout" and "pip" in output["text"] for output in content.cells[1].outputs)
    assert any("image/png" in output.get("data", {}) for output in content.cells[-1].outputs)
    assert not list(tmp_path.iterdir()), "a notebook wrote into the reader's directory"
    print(f"{notebook.name}: {time.time() - start:.1f} s")


# ---- in a browser -----------------------------------------------------------------------------------------------------

class Browser:
    """Chromium without a window, told what to do in its DevTools protocol: JSON through two pipes, each message ends with a 0."""

    def __init__(self, profile):
        theirs, self.out = os.pipe()
        self.into, mine = os.pipe()
        command = f'exec "$0" --headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir="$1" 3<&{theirs} 4>&{mine}'
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM, str(profile)], pass_fds=(theirs, mine), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(mine)
        self.number, self.session, self.events, self.rest = 0, {}, [], b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(sessionId=self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def message(self):
        while b"\0" not in self.rest:
            more = os.read(self.into, 2**20)
            assert more, "Chromium has ended"
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def call(self, method, **params):
        self.number += 1
        os.write(self.out, json.dumps(dict(id=self.number, method=method, params=params) | self.session).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, url, width):
        """Loads a page. Returns (addresses asked for, complaints)."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        asked = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return asked, [event for event in self.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                                                                             "Network.loadingFailed")]

    def value(self, javascript):
        return self.call("Runtime.evaluate", expression=javascript, returnByValue=True, awaitPromise=True)["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


@pytest.mark.long
@per_page
def test_a_browser_shows_the_page_without_a_network(browser, page):
    """No error, no request outside the repository, no picture missing, and nothing wider than the window, also on a telephone."""
    for width in (1280, 390):
        asked, complaints = browser.open(page.as_uri(), width)
        assert not complaints, complaints
        assert asked and all(url.startswith(REPO.as_uri()) or url == "data:," for url in asked), asked
        assert browser.value("document.documentElement.scrollWidth") <= width
    missing = browser.value("Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().then(() => '', () => i.src) }))"
                            ".then(all => all.join(' ').trim())")
    assert missing == ""
