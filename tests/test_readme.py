"""The code of README and docs runs as it stands, on a small model where it names one from the hub."""

import re
from pathlib import Path

import pytest
import torch

import spd_lens
from tests import zoo

ROOT = Path(__file__).parents[1]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def small_model():
    return zoo.reading("right", "<eos>", zoo.wrapped("gpt2"))


@pytest.mark.parametrize("number", range(2))
@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_the_readmes_code(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md")[number]
    code = re.sub(r"(HookedTransformer.from_pretrained|TransformerBridge.boot_transformers)\(\"gpt2\"\)", "small_model()", code)
    if zoo.HookedTransformer is None:
        code = code.replace("from transformer_lens import HookedTransformer\n", "")
    code = re.sub(r"steps=\d+", "steps=2, batch_size=2, gate_width=2", code)
    scope = {"small_model": small_model}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["decomposition"].steps_done == 2
    if number == 0:
        assert scope["decomposition"].batch(scope["tokens"]).lengths is not None, "the first example is of texts of different lengths"


def test_a_loss_of_ones_own_as_the_docs_show_it():
    from spd_lens.losses import LOSSES

    before = dict(LOSSES)
    try:
        scope = {"spd_lens": spd_lens}
        exec(blocks("docs/training.md")[1], scope)
        exec(blocks("docs/training.md")[3], scope)
        config = scope["config"].replace(steps=2, batch_size=2, gate_width=2, subcomponents=33, sites="*.W_Q")
        losses = []
        spd_lens.decompose(zoo.native(), zoo.tokens(4), config, progress=False, callbacks=[lambda r: losses.append(set(r.losses))])
        assert "sparsity" in losses[0]
    finally:
        LOSSES.clear()
        LOSSES.update(before)


@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_the_script_for_several_processes_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/training.md")[4].replace('TransformerBridge.boot_transformers("gpt2")', "small_model()")
    code = code.replace("subcomponents=768, batch_size=64", 'subcomponents=33, batch_size=2, steps=2, gate_width=2, sites="*.W_Q"')
    exec(compile(code, "docs/training.md", "exec"), {"small_model": small_model})
    assert (tmp_path / "run" / "decomposition").is_dir()


def test_links_lead_somewhere():
    for path in ("README.md", *(p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / path).read_text()):
            assert (ROOT / path).parent.joinpath(target).exists(), f"{path}: {target}"


def test_the_diagnosis_as_the_docs_show_it():
    (code,) = blocks("docs/induction.md")
    code = code.replace("train_target(", "build_target(").replace("config()", "config(steps=2, gate_bias=3.0), progress=False")
    scope = {}
    exec(compile(code, "docs/induction.md", "exec"), scope)
    assert "match" in repr(scope["found"]) and len(scope["figure"].data) == 2


@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_the_interventions_as_the_docs_show_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokens = zoo.native(), zoo.tokens()
    decomposition = spd_lens.decompose(model, tokens, spd_lens.SPDConfig(steps=0, subcomponents=12), progress=False)
    scope = {"model": model, "decomposition": decomposition, "tokens": tokens, "clean": tokens, "corrupted": zoo.tokens(seed=1)}
    scope |= {"fresh": zoo.native(), "golf": 3, "basketball": 4, "prompts": tokens}
    for code in blocks("docs/interventions.md"):
        exec(compile(code, "docs/interventions.md", "exec"), scope)
    assert torch.allclose(scope["fresh"](tokens), scope["edited"](tokens))
    assert len(scope["exact"]) == 20
