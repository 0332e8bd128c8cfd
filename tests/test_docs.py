"""The documentation: links lead somewhere, code runs, quoted errors are those of the source, the site builds strictly and asks nothing of a network."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spd_lens
from tests import zoo
from tests.test_readme import blocks, small_model

ROOT = Path(__file__).parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "spd_lens"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if not {"_build", "tutorials"} & set(path.relative_to(DOCS).parts)]


# --- links and code ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page}: {target}"


def small(code):
    code = code.replace('TransformerBridge.boot_transformers("gpt2")', "small_model()")
    return re.sub(r"steps=\d{2,}", "steps=2, batch_size=2, gate_width=2", code)


@pytest.mark.parametrize(
    "page",
    ["start", "howto/sites", "howto/own-model", "howto/report", "howto/share", "howto/padding", "concepts/targeted"],
)
@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokens = small_model(), zoo.tokens(4)
    decomposition = spd_lens.decompose(model, tokens, spd_lens.SPDConfig(steps=1, subcomponents=12, batch_size=2), progress=False)
    scope = {
        "spd_lens": spd_lens,
        "torch": torch,
        "small_model": small_model,
        "model": model,
        "tokens": tokens,
        "decomposition": decomposition,
    }
    scope |= {"prompts": zoo.tokens(2), "other_text": zoo.tokens(4, seed=1), "site": "blocks.0.mlp.W_in"}
    if page == "concepts/targeted":
        short = spd_lens.SPDConfig.targeted(steps=1, subcomponents=4, batch_size=2, gate_width=2)
        monkeypatch.setattr(spd_lens.SPDConfig, "targeted", classmethod(lambda cls: short))
    codes, before = blocks(f"docs/{page}.md"), set(scope)
    for code in codes:
        exec(compile(small(code), page, "exec"), scope)
    assert codes and set(scope) - before - {"__builtins__"}, "the page shows no code that leaves anything behind"


# --- errors ---


def text_of(node):
    """The texts that an expression can become, as regular expressions, each with the number of letters that are fixed."""
    match node:
        case ast.Constant(value=str(text)):
            return [(re.escape(text), len(text))]
        case ast.JoinedStr(values=parts):
            fixed = [part.value for part in parts if isinstance(part, ast.Constant)]
            return [("".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts), sum(map(len, fixed)))]
        case ast.IfExp(body=one, orelse=other):
            return text_of(one) + text_of(other)
    return []


def messages():
    """Of every `SPDError(…)` in the source: its pattern → (fixed letters, file)."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SPDError" and node.args:
                found |= {pattern: (fixed, path.name) for pattern, fixed in text_of(node.args[0])}
    return found


def reasons():
    """Why a matrix is refused: what the functions `refusal` and `flagged` return."""
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in ("refusal", "flagged"):
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        yield from (pattern for pattern, _ in text_of(node.value))


def quoted():
    for page in sorted((DOCS / "errors").glob("*.md")):
        for block in re.findall(r"```none\n(.*?)```", page.read_text(), re.DOTALL):
            yield from ((page.name, line) for line in block.splitlines() if line)


def source_of(line, known):
    """The message that says most of the line word for word."""
    fitting = [pattern for pattern in known if re.fullmatch(pattern, line, re.DOTALL)]
    return max(fitting, key=lambda pattern: known[pattern][0], default=None)


def test_quoted_errors_are_those_of_the_source():
    known, why = messages(), list(reasons())
    assert len(known) > 100 and len(why) > 5
    for page, line in quoted():
        assert source_of(line, known) is not None, f"errors/{page} quotes what the source does not say: {line}"
        if " cannot be decomposed: " in line:
            reason = line.split(" cannot be decomposed: ")[1]
            assert any(re.fullmatch(pattern, reason) for pattern in why), f"errors/{page}: {line}"


def test_every_error_has_a_page():
    known = messages()
    shown = {source_of(line, known) for _, line in quoted()}
    missing = [f"{file}: {pattern}" for pattern, (_, file) in known.items() if pattern not in shown]
    assert not missing, "quote these in docs/errors, with cause and mend:\n" + "\n".join(missing)


# --- notebooks ---


def notebook():
    """One plotly figure whose labels would end the script or the page, and prose with a link into docs."""
    figure = {
        "data": [{"type": "bar", "x": ["</script><b>", "<!--", "\u2028"], "y": [1, 2, 3]}],
        "layout": {"title": {"text": "</script>"}},
    }
    output = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.plotly.v1+json": figure}}
    html = {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<b id='own'>as it is</b>", "text/plain": "view"}}
    code = {"cell_type": "code", "id": "b", "execution_count": 1, "metadata": {}, "source": "figure", "outputs": [output, html, output]}
    prose = {
        "cell_type": "markdown",
        "id": "a",
        "metadata": {},
        "source": ["# A notebook\n", "\n", "See [the method](../docs/method.md), [the start](../README.md)."],
    }
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
    return {"cells": [prose, code], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


# --- the site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` builds them, and one notebook more."""
    pytest.importorskip("sphinx")
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("_build", "tutorials"))
    shutil.copytree(PACKAGE, root / "spd_lens", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CHANGELOG.md", root)
    (root / "tutorials").mkdir()
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        shutil.copy(path, root / "tutorials")
    (root / "tutorials" / "zz-test.ipynb").write_text(json.dumps(notebook()))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", root / "docs", root / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "out"


ELSEWHERE = r"(?:https?:)?//"
LOADS = [
    rf"<script[^>]*\ssrc=[\"']?{ELSEWHERE}",
    rf"<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*href=[\"']?{ELSEWHERE}",
    rf"<link[^>]*href=[\"']?{ELSEWHERE}[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)",
    rf"<(?:img|iframe|source|video|audio|embed)[^>]*\ssrc=[\"']?{ELSEWHERE}",
    rf"url\([\"']?{ELSEWHERE}",
    rf"@import\s+[\"']?{ELSEWHERE}",
    rf"import\s+[^;\n]{{0,80}}from\s+[\"']{ELSEWHERE}",
]


@pytest.mark.slow
def test_the_site_asks_nothing_of_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for path in [*pages, *site.rglob("*.css")]:
        text = path.read_text()
        for pattern in LOADS:
            assert not (found := re.search(pattern, text)), f"{path.relative_to(site)}: {found[0]}"


@pytest.mark.slow
def test_a_browser_asks_for_files_alone_and_no_page_is_wider_than_a_small_window(site, visit):
    for path in sorted(site.rglob("*.html")):
        if "_modules" in path.parts:
            continue
        seen = visit(path, 600, path.stem if path.parent.name == "tutorials" else None)
        assert seen.complaints == [] and seen.foreign() == [] and seen.overflow() <= 0, path
        if path.parent.name == "tutorials":
            assert seen.page.locator(".plotly-figure").count() == seen.page.locator(".plotly-figure:has(.main-svg)").count(), path
            assert seen.page.locator("[id^=circuitsvis-]").count() == seen.page.locator("[id^=circuitsvis-] > *").count(), path
        seen.close()


@pytest.mark.slow
def test_plotly_is_there_once_and_only_where_it_draws(site):
    assert [path.name for path in site.rglob("*plotly*.js")] == ["plotly.min.js"]
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert ("plotly.min.js" in text) == ("Plotly.newPlot(" in text and "plotly-figure" in text), path


@pytest.mark.slow
def test_a_notebooks_figures_are_drawn_and_its_links_lead_to_pages(site):
    text = (site / "tutorials" / "zz-test.html").read_text()
    assert text.count("Plotly.newPlot(") == 2 and text.count('class="plotly-figure"') == 2
    assert "\\u003c/script>" in text and "</script><b>" not in text
    assert "<b id='own'>as it is</b>" in text and 'href="../method.html"' in text and 'href="../index.html"' in text
    assert "zz-test.html" in (site / "tutorials.html").read_text()


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    names = [f"spd_lens.{name}" for name in spd_lens.__all__ if name != "viz"] + [f"spd_lens.viz.{name}" for name in spd_lens.viz.__all__]
    missing = [name for name in names if f'id="{name}"' not in text]
    assert not missing
    for command in ("induction", "facts", "entangled", "bench step"):
        assert f"usage: spd-lens {command}" in text
