import os
import shutil
import subprocess
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

from spd_lens import SPDConfig, decompose
from spd_lens.tasks import athletes, fruits, language, surgery
from tests import zoo

torch.set_num_threads(1)  # two workers share two cores; more threads wait for each other


@pytest.fixture(scope="session")
def model():
    """The model of most tests: attention and MLP, LayerNorm, of whichever class this transformer-lens has."""
    return zoo.hooked(normalization_type="LN") if zoo.HookedTransformer is not None else zoo.native()


@pytest.fixture(scope="session")
def tokens():
    return zoo.tokens()


@pytest.fixture(scope="session")
def untrained(model):
    return decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=40), progress=False)


@pytest.fixture(scope="session")
def trained(model):
    config = SPDConfig(steps=12, subcomponents=12, batch_size=4, gate_width=4)
    with pytest.warns(UserWarning, match="rank"):
        return decompose(model, zoo.tokens(16), config, progress=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


# --- worlds small enough to be learnt in seconds, and models that know them ---


@contextmanager
def small_worlds():
    """Three sports and three colours and fruits; targets of 2 narrow layers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LAYERS": 2, "WIDTH": 64, "HEADS": 2, "BATCH": 16}.items():
            patch.setattr(language, name, value)
        patch.setattr(athletes, "ATHLETES", {sport: athletes.ATHLETES[sport][:3] for sport in ("golf", "basketball", "tennis")})
        for name in ("MEANINGS", "PLACES"):
            patch.setattr(fruits, name, dict(list(getattr(fruits, name).items())[:3]))
        yield


@pytest.fixture(scope="module")
def small():
    with small_worlds():
        yield


@pytest.fixture(scope="session")
def athlete_model():
    with small_worlds():
        return athletes.train_target(0, steps=400, progress=False)


@pytest.fixture(scope="session")
def fruit_model():
    with small_worlds():
        return fruits.train_target(0, steps=600, progress=False)


@pytest.fixture
def quick(monkeypatch):
    """Few things are tried."""
    for name, value in {"POOL": 6, "MOST": 3}.items():
        monkeypatch.setattr(surgery, name, value)


# --- a browser ---


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium without a network; where there is none the test is skipped, unless SPD_LENS_BROWSER=required (as in CI).

    Of one file, since no other event loop runs beside Playwright's.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert os.environ.get("SPD_LENS_BROWSER") != "required", "no Chromium is installed, and SPD_LENS_BROWSER says that it is required"
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield opened
        opened.close()


class Visit:
    """An open page, with all that it asked for and complained of."""

    def __init__(self, browser, path, width):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.on("requestfailed", lambda request: self.complaints.append(f"missing: {request.url}"))
        self.page.goto(path.resolve().as_uri())
        self.own = self.page.url
        self.close = self.context.close

    def foreign(self):
        """What was asked for besides the page and what lies inside it."""
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]

    def overflow(self):
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def unpainted(self):
        """Plotly figures without anything drawn in them."""
        script = """() => [...document.querySelectorAll('.plotly-graph-div')].filter(figure => {
            const box = figure.getBoundingClientRect();
            return box.width < 50 || box.height < 50 || figure.querySelectorAll('.main-svg path, .main-svg image, .main-svg rect').length < 3;
        }).map(figure => figure.id)"""
        return self.page.evaluate(script)


@pytest.fixture
def visit(browser):
    """Open a file at a width in pixels; closed afterwards. SPD_LENS_SCREENSHOTS names a folder for what was seen."""
    opened = []

    def open_at(path, width=1280, name=None):
        opened.append(Visit(browser, path, width))
        folder = os.environ.get("SPD_LENS_SCREENSHOTS")
        if folder and name:
            opened[-1].page.wait_for_timeout(500)
            opened[-1].page.screenshot(path=f"{folder}/{name}-{width}.png", full_page=True)
        return opened[-1]

    yield open_at
    for one in opened:
        one.close()
