"""The README's pictures, from the report of `make demo`: `make pictures` (needs Chromium). Says how long the page took to open."""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
REPORT = DOCS.parent / "out" / "induction" / "report.html"
CARD = "V0 · 0"  # the flag, "here s was seen": the one whose cut costs most

if not REPORT.exists():
    sys.exit(f"{REPORT} is not there yet; run make demo first.")
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--hide-scrollbars"])
    page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.5)
    start = time.perf_counter()
    page.goto(REPORT.as_uri())
    page.wait_for_selector("#subcomponents tbody tr")
    print(f"{REPORT.name}: {REPORT.stat().st_size / 1e6:.1f} MB, opened in {time.perf_counter() - start:.1f} s")
    page.add_style_tag(content=".modebar { display: none !important }")
    page.wait_for_timeout(500)
    page.locator("section", has=page.get_by_role("heading", name="One sequence's circuit")).screenshot(path=DOCS / "circuit.png")
    page.evaluate("name => { location.hash = encodeURIComponent(name) }", CARD)
    page.wait_for_selector("#card-name")
    page.evaluate("document.activeElement.blur()")
    page.locator("#card").screenshot(path=DOCS / "card.png")
    browser.close()
