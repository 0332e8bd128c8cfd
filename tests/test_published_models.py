"""Two published models decompose with the defaults, where somebody has them (they are no part of the project, and half an hour of work).

    SPD_LENS_MODELS=folder pytest -m slow -s tests/test_published_models.py

prints for each, with the default settings and with those of plain SPD: faithfulness, the `verify` table, active subcomponents per token,
task accuracy or loss under hard masks.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from spd_lens import SPDConfig, decompose, masks, verify
from tests import zoo

FOLDER = Path(os.environ.get("SPD_LENS_MODELS", "."))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SPD_LENS_MODELS" not in os.environ, reason="SPD_LENS_MODELS does not name a folder with the models"),
    pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank"),
]
needs_hooked = pytest.mark.skipif(zoo.HookedTransformer is None, reason="needs HookedTransformer (transformer-lens 3.9)")


def hooked(name):
    config = json.loads((FOLDER / name / "config.json").read_text())
    model = zoo.HookedTransformer(zoo.HookedTransformerConfig(**config, device="cpu"))
    model.load_state_dict(load_file(FOLDER / name / "model.safetensors"), strict=False)
    return model.eval()


def bridged(name):
    convert = pytest.importorskip(
        "transformer_lens.utilities.tl_checkpoint_conversion", reason="the converter came with transformer-lens 4"
    )
    config = json.loads((FOLDER / name / "config.json").read_text())
    config = zoo.TransformerBridgeConfig(**{k: v for k, v in config.items()}, architecture="TransformerLensNative")
    model = zoo.TransformerBridge.boot_native(config, device="cpu").eval()
    state = {k: v for k, v in load_file(FOLDER / name / "model.safetensors").items() if "rotary_" not in k}
    state = convert.convert_tl_checkpoint(state, config)
    known = {name: value for name, value in state.items() if value.any()}  # a native gated MLP has no biases, and these are zero
    assert not model.load_state_dict(known, strict=False).unexpected_keys
    return model


def sorted_lists(many, seed=0):
    """10 distinct numbers of 0..50, the separator 51, the same numbers sorted."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(many, 51, generator=generator).argsort(1)[:, :10]
    return torch.cat([numbers, torch.full((many, 1), 51), numbers.sort(1).values], 1)


def show(name, d, tokens, seconds, task):
    found, g = verify(d, tokens, batch_size=32), d.importances(tokens)
    with torch.no_grad():
        logits, hard = d.model(tokens, return_type="logits"), d.run(tokens, masks.hard(g))
    allocated = sum(c.C for c in d.components.values())
    print(f"\n{name}: {d.steps_done} steps in {seconds:.0f} s; {sum(found.l0.values()):.1f} of {allocated} subcomponents active per token")
    print(found)
    print(f"task, original {task(logits):.4f}, with hard masks {task(hard):.4f}")
    assert torch.isfinite(torch.tensor([v for v in found.as_dict().values() if isinstance(v, float)])).all()
    assert found.faithfulness < 0.1  # the paper's sign of failure
    return found


def settings(kind, **given):
    """The defaults, or the paper's settings with as many steps, sequences and subcomponents."""
    plain = dict(sites="*", output_positions="all", subcomponents=64, layerwise_sites=2)
    return SPDConfig(**given) if kind == "defaults" else SPDConfig.paper(**plain, **given)


@needs_hooked
@pytest.mark.parametrize("kind", ["defaults", "plain SPD"])
def test_sorted_list(kind):
    model, start = hooked("sorted_list"), time.perf_counter()
    tokens = sorted_lists(256, seed=1)

    def accuracy(logits):
        return float((logits[:, 10:20].argmax(-1) == tokens[:, 11:]).float().mean())

    with torch.no_grad():
        assert accuracy(model(tokens)) == pytest.approx(0.999, abs=0.003)  # loaded as it was published
    d = decompose(model, sorted_lists(4096), settings(kind, steps=600, batch_size=32), progress=False)
    found = show(f"sorted_list, {kind}", d, tokens, time.perf_counter() - start, accuracy)
    assert found.l0.keys() == d.sites.keys() and len(d.sites) == 4


@pytest.mark.parametrize(
    "kind, load",
    [
        pytest.param("defaults", hooked, marks=needs_hooked),
        ("defaults", bridged),
        ("plain SPD", bridged if zoo.HookedTransformer is None else hooked),
    ],
)
def test_stories260k(kind, load):
    model, start = load("stories260k"), time.perf_counter()
    tokens = load_file(FOLDER / "stories260k" / "samples.safetensors")["tokens"].long()
    held_out = tokens[224:]

    def loss(logits):
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()))

    with torch.no_grad():
        assert loss(model(held_out)) == pytest.approx(1.19, abs=0.01)  # loaded as it was published, by either way
    d = decompose(model, tokens[:224], settings(kind, steps=200, batch_size=8), progress=False)
    show(f"stories260k in a {type(model).__name__}, {kind}", d, held_out, time.perf_counter() - start, loss)
