"""The page as a person meets it: opened from the disk, without a network."""

import time
from dataclasses import replace

import pytest

from spd_lens import cut_costs, describe, labels, name_tokens, write_report
from spd_lens.report import Cards, page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\u202eright",
    "a\nb",
    "",
    "\ufffd",
    " space",
    '"quote"',
    "&amp;",
]
DAMAGED = "\ud83d"  # half of a pair: what a tokenizer of bytes may give


@pytest.fixture(scope="module")
def named(trained):
    """Tokens as bad as they get."""
    many = trained.model.cfg.d_vocab
    name_tokens(trained.model, ([*HOSTILE, DAMAGED] * many)[:many])
    yield
    del labels.NAMES[trained.model]


@pytest.fixture(scope="module")
def report(trained, named, tokens, tmp_path_factory):
    return write_report(trained, tokens, tmp_path_factory.mktemp("report") / "report.html", progress=False)


@pytest.fixture(scope="module")
def names(trained, tokens):
    return [card.short for card in describe(trained, tokens)]


def links(visited):
    return visited.page.eval_on_selector_all("#subcomponents tbody a", "all => all.map(a => a.textContent)")


@pytest.mark.parametrize("width", [1280, 600])
def test_it_opens_whole_and_asks_nobody(report, visit, width):
    seen = visit(report, width, "report")
    assert seen.complaints == [] and seen.foreign() == [] and seen.requests == [seen.own]
    assert seen.unpainted() == [] and seen.page.locator(".plotly-graph-div").count() >= 5
    assert seen.overflow() <= 0
    assert seen.page.locator("h2").first.is_visible() and "Can the count be trusted?" in seen.page.content()


def test_hostile_tokens_are_text(report, visit, names):
    seen = visit(report)
    for name in names:
        seen.page.evaluate("name => { location.hash = encodeURIComponent(name) }", name)
        seen.page.wait_for_function("name => document.getElementById('card-name')?.textContent === name", arg=name)
    assert seen.complaints == [] and seen.page.locator("#subcomponents img, #subcomponents script:not(#cards)").count() == 0
    seen.page.fill("input[type=search]", "onerror=alert(1)")
    assert links(seen) and "<img·src=x·onerror=alert(1)>" in seen.page.locator("#subcomponents").inner_text()


def test_search_and_sort(report, visit, names):
    seen = visit(report)
    assert sorted(links(seen)) == sorted(names)
    seen.page.fill("input[type=search]", names[0])
    assert links(seen) == [names[0]]  # a whole name is that one alone
    assert seen.page.locator("#subcomponents output").inner_text() == f"1 of {len(names)} subcomponents"
    seen.page.fill("input[type=search]", names[0].split(" · ")[0] + " quote")
    assert 0 < len(links(seen)) < len(names) and all(
        name.startswith(names[0].split(" · ")[0]) for name in links(seen) if "quote" not in name
    )
    seen.page.fill("input[type=search]", "there is no such thing")
    assert links(seen) == []
    seen.page.fill("input[type=search]", "")
    seen.page.get_by_role("button", name="mean g").click()
    figures = seen.page.eval_on_selector_all("#subcomponents tbody tr", "all => all.map(row => +row.children[2].textContent)")
    assert figures == sorted(figures, reverse=True) and seen.page.locator("th[aria-sort=descending]").inner_text().startswith("mean g")
    seen.page.get_by_role("button", name="mean g").click()
    assert seen.page.locator("th[aria-sort=ascending]").count() == 1
    seen.page.get_by_role("button", name="subcomponent", exact=True).click()
    assert links(seen) == names  # in the order of the layers


def test_the_keyboard_is_enough(report, visit):
    seen = visit(report)
    seen.page.keyboard.press("/")
    assert seen.page.evaluate("document.activeElement.type") == "search"
    seen.page.locator("#subcomponents tbody a").first.focus()
    seen.page.keyboard.press("ArrowDown")
    second = seen.page.evaluate("document.activeElement.textContent")
    assert second == links(seen)[1]
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_function("document.activeElement.id === 'card-name'")
    assert seen.page.locator("#card-name").inner_text() == second and seen.page.locator("tr.open a").inner_text() == second
    seen.page.keyboard.press("Escape")
    assert not seen.page.locator("#card").is_visible() and seen.page.evaluate("document.activeElement.textContent") == second
    seen.page.keyboard.press("ArrowUp")
    seen.page.keyboard.press("ArrowUp")  # there is nothing above the first
    assert seen.page.evaluate("document.activeElement.textContent") == links(seen)[0]
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_function("document.activeElement.id === 'card-name'")
    seen.page.fill("input[type=search]", "there is no such thing")
    seen.page.get_by_role("button", name="close").focus()
    seen.page.keyboard.press("Enter")
    assert seen.page.evaluate("document.activeElement.type") == "search"  # its row is filtered out


def test_a_card_says_what_it_says_in_python_and_leads_to_its_partners(report, named, visit, trained, tokens):
    card = next(card for card in describe(trained, tokens) if card.later or card.earlier)
    seen = visit(report)
    seen.page.fill("input[type=search]", card.short)
    seen.page.get_by_role("link", name=card.short, exact=True).first.click()
    text = seen.page.locator("#card").inner_text()
    assert card.site in text and f"{float(f'{100 * card.share_active:.3g}'):g} %" in text
    assert f"costs {float(f'{cut_costs(trained, tokens, {card.site: [card.index]})[card.key]:.3g}'):g} nats" in text
    panels = seen.page.locator("#card .panels > div")
    for number, pairs in enumerate((card.reads, card.writes)):
        assert panels.nth(number).locator(".bar bdi").all_text_contents() == [label for label, _ in pairs]
    named = {name for partners in (card.earlier, card.later, card.matched) for name in partners}
    assert seen.page.locator("#card .partners a").count() == len(card.earlier) + len(card.later) + len(card.matched) and named
    assert seen.page.locator("#card .contexts li").count() == len(card.contexts)
    assert seen.page.locator("#card .contexts bdi.here").count() == len(card.contexts)
    assert "v·x" in seen.page.locator("#card .contexts bdi").first.get_attribute("title")
    partner = seen.page.locator("#card .partners a").first
    wanted = partner.inner_text()
    partner.click()
    seen.page.wait_for_function("name => document.getElementById('card-name').textContent === name", arg=wanted)
    seen.page.go_back()  # the address of a page with a card leads to the card
    seen.page.wait_for_function("name => document.getElementById('card-name').textContent === name", arg=card.short)
    seen.page.evaluate("location.hash = '%'")
    seen.page.go_back()
    seen.page.go_back()
    seen.page.wait_for_function("document.getElementById('card').hidden")
    assert seen.complaints == []


def test_hover_tells_figures(report, visit):
    seen = visit(report)
    figure = seen.page.locator(".plotly-graph-div").filter(has_text="Active subcomponents by matrix and token").first
    figure.scroll_into_view_if_needed()
    box = figure.locator(".nsewdrag").first.bounding_box()
    for step in range(3):  # plotly listens to movement
        seen.page.mouse.move(box["x"] + box["width"] / 2 + step, box["y"] + box["height"] / 2)
    seen.page.wait_for_selector(".hoverlayer .hovertext")
    assert "active" in figure.locator(".hoverlayer").text_content()


def test_it_prints_without_what_only_a_screen_needs(report, visit):
    seen = visit(report)
    seen.page.emulate_media(media="print")
    assert not seen.page.locator(".tools").is_visible() and seen.page.locator(".index table").is_visible()
    assert len(seen.page.pdf()) > 50_000


@pytest.mark.slow
def test_five_hundred_subcomponents(trained, tokens, visit, tmp_path):
    cards = describe(trained, tokens)
    many = [replace(cards[i % len(cards)], index=i, short=f"{cards[i % len(cards)].short} · {i}") for i in range(500)]
    path = tmp_path / "many.html"
    html = page("Many", "", [("Subcomponents", "", Cards(many, {card.key: 0.1 for card in cards + many}))])
    path.write_text(html)
    assert len(html.encode()) <= 25e6
    start = time.perf_counter()
    seen = visit(path)
    seen.page.wait_for_selector("#subcomponents tbody tr")
    print(f"500 subcomponents: {len(html.encode()) / 1e6:.1f} MB, opened in {time.perf_counter() - start:.2f} s")
    assert len(links(seen)) == 500 and seen.complaints == []
