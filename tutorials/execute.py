"""Execute the tutorials and keep their outputs: `python tutorials/execute.py [name …]`.

1. Each notebook runs from its top in a fresh kernel, in an empty folder, without a network. An error ends it, and the file stays as it was.
2. Figures are kept as data (`application/vnd.plotly.v1+json`), not as plotly's own five megabytes.
3. What differs between two equal runs (times, paths in warnings, random ids of views) is taken out, so that a diff shows what changed.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SURROUNDINGS = {
    "PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where ipywidgets is missing; it names a path of this machine
}  # fmt: skip
WARNING = re.compile(r"^/[^\n]*?:\d+: (\w*Warning: .*)\n  .*\n", re.MULTILINE)  # with where it was given, and that line
VIEW = re.compile(r"circuitsvis-[0-9a-f]{12}")


def executed(path: Path, timeout: int = 900) -> Any:
    """The notebook with the outputs of a fresh run."""
    notebook = nbformat.read(path, as_version=4)
    here = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # this checkout's spd_lens
    before = dict(os.environ)
    os.environ.update({**SURROUNDINGS, "PYTHONPATH": here})
    try:
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return settled(notebook)


def settled(notebook: Any) -> Any:
    """Without what differs between two equal runs."""
    views: dict[str, str] = {}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = WARNING.sub(r"\1\n", output.text)
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = VIEW.sub(lambda found: views.setdefault(found[0], f"circuitsvis-{len(views) + 1}"), data["text/html"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(names: list[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not any(name in path.stem for name in names):
            continue
        started = time.perf_counter()
        notebook = executed(path)
        new = path.with_suffix(".new")
        nbformat.write(notebook, new)
        new.replace(path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
