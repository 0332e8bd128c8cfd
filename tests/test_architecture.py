"""The house: imports point left only, plotting and hooks stay where they belong, importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import spd_lens

PACKAGE = Path(spd_lens.__file__).parent
ORDER = ["errors", "tables", "labels", "schema", "guards", "config", "sites", "visits", "weights", "tokens", "ranks", "components", "importance", "masks", "suffix", "attachment", "decomposition", "interventions", "curvature",
         "losses", "patching", "retirement", "metrics", "recovery", "diagnostics", "advice", "storage", "cards", "attention", "graph", "batches", "training", "tasks", "tasks.induction", "tasks.study", "tasks.language", "tasks.questions", "tasks.surgery", "tasks.athletes", "tasks.fruits", "tasks.facts", "tasks.entangled", "tasks.planted",
          "bench.measure", "bench.models", "bench.step", "bench.forward", "bench.growth", "bench", "bench.__main__",
         "viz.style", "viz.offline", "viz.importance", "viz.attention", "viz.subcomponents", "viz.circuit", "viz.effects", "viz.recovery", "viz.training", "viz.bench", "viz", "report.page", "report.model", "report.tasks", "hub", "report", "cli_bench", "cli_facts", "cli_planted", "cli_report", "cli", "__main__"]  # fmt: skip


def modules():
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else "", path


def imports(path, runtime_only=True):
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_file_has_its_place():
    assert sorted(name for name, _ in modules() if name) == sorted(ORDER)


def test_imports_point_left():
    for name, path in modules():
        if not name:
            continue
        for imported in imports(path):
            target = imported.removeprefix("spd_lens.")
            if (
                imported.startswith("spd_lens.")
                and target in ORDER
                and not (name == "decomposition" and target in ("storage", "interventions"))
            ):
                assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}"


def test_only_viz_and_report_import_plotting_and_only_sites_knows_the_model_classes():
    for name, path in modules():
        found = set(imports(path))
        if name.split(".")[0] not in ("viz", "report"):
            assert not any(i.split(".")[0] in ("plotly", "circuitsvis", "matplotlib") for i in found), name
        if name not in (
            "sites",
            "tasks.induction",
            "tasks.language",
            "tasks.planted",
            "bench.models",
            "hub",
        ):  # all but the first build models
            assert not any(i.endswith(("HookedTransformer", "TransformerBridge")) for i in found), name


def test_importing_prints_creates_and_draws_nothing(tmp_path):
    code = "import sys, spd_lens; sys.exit('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_public_names_are_there():
    for name in spd_lens.__all__:
        assert getattr(spd_lens, name) is not None
