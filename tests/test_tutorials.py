"""The tutorials hold the outputs of a real run, and run again: each of them tests what it claims by intervening, with asserts of its own."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

import spd_lens
from spd_lens import viz
from tests import zoo

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WITHOUT_HOOKED = ("1_induction",)  # those that run where there is no HookedTransformer
PLOTLY = "application/vnd.plotly.v1+json"
SCRIPT = re.compile(r"<script>.*?</script>", re.DOTALL)
MACHINE = re.compile(r"(?<![\w.])/(tmp|home|root|work|Users|usr|var)/|site-packages|ipykernel_")
LARGEST = {"1_induction": 2_000_000, "3_interventions": 2_000_000}  # bytes: CircuitsVis brings a script of 1.3 MB
OTHERS = 500_000

spec = importlib.util.spec_from_file_location("execute_tutorials", FOLDER / "execute.py")
assert spec is not None and spec.loader is not None
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_there_are_five():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


@every_notebook
def test_a_tutorial_holds_the_outputs_of_one_run_from_its_top(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert notebook == execute.settled(read(path)), "run `python tutorials/execute.py`, which takes out what differs between two runs"
    assert path.stat().st_size < LARGEST.get(path.stem, OTHERS)


@every_notebook
def test_nothing_of_the_machine_is_in_a_tutorial(path):
    for cell in read(path).cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [SCRIPT.sub("", str(value)) for value in output.get("data", {}).values()]
        for text in texts:
            assert not MACHINE.search(text), MACHINE.search(text)


@every_notebook
def test_the_only_noise_is_the_librarys_own_warnings(path):
    for output in outputs(read(path)):
        if output.output_type == "stream" and output.name == "stderr":
            assert all(line.startswith("UserWarning: ") for line in output.text.splitlines()), output.text


@every_notebook
def test_a_tutorial_begins_with_its_title_and_leads_on(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(f"# {path.stem[0]}. ")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
                assert (FOLDER / target).exists(), target


@every_notebook
def test_every_figure_is_data_with_a_title(path):
    data = [output.data for output in outputs(read(path)) if "data" in output]
    figures = [one[PLOTLY] for one in data if PLOTLY in one]
    assert figures and all(figure["layout"]["title"]["text"] for figure in figures)
    assert not [one for one in data if "Plotly.newPlot" in one.get("text/html", "")]


@every_notebook
def test_the_names_that_a_tutorial_uses_exist(path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("spd_lens", "viz"):
                assert hasattr({"spd_lens": spd_lens, "viz": viz}[node.value.id], node.attr), node.attr


@every_notebook
def test_a_tutorial_tests_what_it_claims(path):
    """By intervening; and no count of active subcomponents is without what it costs to cut the others."""
    source = "\n".join(cell.source for cell in code_cells(read(path)))
    assert len([node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]) >= 5
    assert "ablate(" in source or ".hard(" in source
    assert ("census(" in source) <= ("verify(" in source)


def test_settling_takes_out_what_differs_between_runs():
    output = nbformat.v4.new_output(
        "stream", name="stderr", text="/a b/c.py:3: UserWarning: C is small.\n  decompose(model)\n/x/y.py:4: no warning\n"
    )
    views = [nbformat.v4.new_output("display_data", {"text/html": f'<div id="circuitsvis-{"ab" * 6}"></div>"circuitsvis-{"ab" * 6}"'})]
    cell = nbformat.v4.new_code_cell("f()", outputs=[output, *views], metadata={"execution": {"iopub.status.busy": "2020"}})
    settled = execute.settled(nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}}))
    assert settled.cells[0].outputs[0].text == "UserWarning: C is small.\n/x/y.py:4: no warning\n"
    assert settled.cells[0].outputs[1].data["text/html"] == '<div id="circuitsvis-1"></div>"circuitsvis-1"'
    assert not settled.cells[0].metadata and "version" not in settled.metadata.language_info


@pytest.mark.slow
@every_notebook
def test_a_tutorial_runs(path):
    """Its own asserts hold: a feature that is broken ends it with an error."""
    if zoo.HookedTransformer is None and path.stem not in WITHOUT_HOOKED:
        pytest.skip("this transformer-lens has no HookedTransformer, which the tutorial uses")
    notebook = execute.executed(path)
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert [output.output_type for output in outputs(notebook)].count("error") == 0
    kinds = [PLOTLY in output.get("data", {}) for output in outputs(notebook)]
    assert sum(kinds) == sum(PLOTLY in output.get("data", {}) for output in outputs(read(path)))
