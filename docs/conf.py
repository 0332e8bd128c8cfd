"""How the pages of this folder become a site that opens from a disk without a network.

1. Formulas become MathML by docutils' own converter: browsers draw it, and no script is fetched.
2. Notebooks hold plotly figures as JSON; each becomes a place on its page and one call of `Plotly.newPlot`. plotly.js is written once, and is
   loaded by the pages that draw something.
3. `spd-lens … --help` is asked of the parsers, and links out of a notebook are turned to where its page is.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.util import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "COLUMNS": "86",
    "NO_COLOR": "1",
}  # argparse takes its width from COLUMNS
log = logging.getLogger(__name__)

project = "spd_lens"
author = "the authors of spd_lens"
project_copyright = "2026, the authors of spd_lens"
release = re.findall(r'__version__ = "(.*)"', (ROOT / "spd_lens" / "__init__.py").read_text())[0]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"spd_lens {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False

nb_execution_mode = "off"  # notebooks are run by their own tests, and come with their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

default_role = "code"  # in docstrings a single backtick is code, as in the rest of the documentation
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# Every reference to something of ours has to be resolved. Types of other projects have no page here, since asking theirs would need a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!spd_lens).*")]


# --- formulas ---


def _mathml(self: Any, node: nodes.Element) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        mathml = latex2mathml.tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        log.warning("formula %r cannot be drawn: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    self.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


# --- notebooks ---

FIGURE = "application/vnd.plotly.v1+json"
DRAW = """<div id="{id}" class="plotly-figure"></div>
<script>document.addEventListener("DOMContentLoaded", () => Plotly.newPlot("{id}", {figure}));</script>
"""


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "reference/cli":
        source[0] = source[0].replace("<!-- commands -->", _commands())
    if docname == "tutorials":
        source[0] = source[0].replace("<!-- notebooks -->", _notebooks())
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        source[0] = json.dumps(drawn(json.loads(source[0]), docname))


def _bring(tutorials: Path, into: Path) -> None:
    """Sphinx reads below its own folder alone; a copy works where a symbolic link would not (Windows, an sdist)."""
    wanted = {path.name: path.read_bytes() for path in sorted(tutorials.glob("*.ipynb"))}
    into.mkdir(exist_ok=True)
    for path in into.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        if not (into / name).exists() or (into / name).read_bytes() != content:
            (into / name).write_bytes(content)


def _notebooks() -> str:
    found = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.ipynb"))
    return (
        "\n".join(["```{toctree}", ":maxdepth: 1", *(f"tutorials/{name}" for name in found), "```"]) if found else "This checkout has none."
    )


def drawn(notebook: dict[str, Any], docname: str) -> dict[str, Any]:
    """A notebook whose plotly outputs are HTML, and whose links lead to pages of the site."""
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\(\.\./docs/", "](../", "".join(cell["source"]))
            cell["source"] = text.replace("](../README.md", "](../index.md")
        for output in cell.get("outputs", []):
            if FIGURE in output.get("data", {}):
                number += 1
                figure = output["data"].pop(FIGURE)
                shown = {"data": figure["data"], "layout": figure.get("layout", {}), "frames": figure.get("frames", [])}
                text = json.dumps({**shown, "config": {"displaylogo": False, "responsive": True}})
                text = text.replace("<", "\\u003c")  # a label must not end the script
                text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
                place = f"{docname.replace('/', '-')}-{number}"
                output["data"] = {"text/html": DRAW.format(id=place, figure=text), "text/plain": output["data"].get("text/plain", "Figure")}
    return notebook


def _with_plotly(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    if doctree is not None and "Plotly.newPlot(" in context.get("body", ""):
        app.add_js_file("plotly.min.js")


def _write_plotly(app: Sphinx) -> None:
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")


# --- the reference ---


def _signature(app: Sphinx, what: str, name: str, it: Any, options: Any, signature: str, returns: str) -> tuple[str, str] | None:
    """A dataclass by the names and defaults of its fields; their types stand beside what they mean."""
    if what != "class" or not dataclasses.is_dataclass(it):
        return None
    fields = [field for field in dataclasses.fields(it) if field.init]
    shown = [field.name if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
             else f"{field.name}=..." if field.default is dataclasses.MISSING
             else f"{field.name}={field.default!r}" for field in fields]  # fmt: skip
    star = ["*"] if fields and all(field.kw_only for field in fields) else []
    return f"({', '.join(star + shown)})", ""


PROPERTIES = ("property", "attribute", "data")
_whole: dict[str, list[str]] = {}  # docstrings of properties, before napoleon took what stands before a colon for a type


def _keep_property(app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    if what in PROPERTIES:
        _whole[name] = list(lines)


def _docstring(app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Docstrings say |x| for an absolute value; reStructuredText would look for a substitution of that name."""
    lines[:] = _whole.pop(name, lines)
    lines[:] = ["`".join(re.sub(r"\|", r"\\|", part) if i % 2 == 0 else part for i, part in enumerate(line.split("`"))) for line in lines]


# --- the command line ---


def _commands() -> str:
    from spd_lens.cli import _parser

    return "\n".join(_help(_parser(), 2))


def _help(parser: argparse.ArgumentParser, level: int) -> list[str]:
    parts = [f"{'#' * level} `{parser.prog}`\n\n```none\n{parser.format_help()}```\n"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [part for name in action.choices for part in _help(action.choices[name], min(level + 1, 4))]
    return parts


def setup(app: Sphinx) -> None:
    _bring(ROOT / "tutorials", ROOT / "docs" / "tutorials")
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    app.connect("builder-inited", _write_plotly)
    app.connect("source-read", _read)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _keep_property, priority=400)
    app.connect("autodoc-process-docstring", _docstring, priority=600)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("html-page-context", _with_plotly)
