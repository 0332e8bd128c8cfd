"""Every architecture that can be made small in memory: what docs/architectures.md says of it is so."""

import re

import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose
from tests import architectures, zoo
from tests.architectures import bridged, edited


def decomposed(model):
    return decompose(model, zoo.tokens(2, 8), SPDConfig(steps=0, subcomponents=6, init="random", gate_width=2), progress=False)


class Clinging:
    """A forward pass that goes on computing with the module it was made for, in a copy too, and that nobody can look into."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return torch.nn.functional.linear(x, self.module.weight, self.module.bias)

    def __deepcopy__(self, memo):
        return self


def test_functions_of_the_originals_modules_become_functions_of_the_copys():
    """TransformerLens gives Falcon's linear layers a forward pass that closes over each of them."""
    d, tokens = decomposed(bridged("FalconForCausalLM")), zoo.tokens(2, 8)
    with torch.no_grad():
        assert edited(d, tokens) == "equal the hooks"
        copy = d.edited_model(remove={"blocks.0.mlp.W_in": [0]})
        before = copy(tokens)
        for parameter in d.model.parameters():
            parameter.mul_(2)
        assert torch.equal(copy(tokens), before)


@pytest.mark.parametrize("site", ["blocks.1.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.attn.W_Q"])
def test_a_copy_that_computes_with_the_original_is_refused(site):
    model = zoo.wrapped("llama")
    _, layer, part, kind = site.split(".")
    child = {"W_O": "o", "W_in": "in", "W_Q": "q"}[kind]
    linear = getattr(model.blocks[int(layer)], part)._modules[child]._modules["_original_component"]
    linear.forward = Clinging(linear)
    d = decomposed(model)
    with torch.no_grad():
        d.components[site].U[0] *= 1e-6  # what is taken out is too little for the logits to tell
        clean = model(zoo.tokens())
        with pytest.raises(SPDError, match=f"{site} of the copy is not what the copy computes with"):
            d.edited_model(remove={site: [0]})
        assert torch.equal(model(zoo.tokens()), clean)
        d.edited_model(remove={"blocks.1.mlp.W_out": [0]})


def test_a_model_with_dropout_is_no_base_for_an_edit():
    d = decomposed(zoo.wrapped("gpt2"))
    d.model.train()
    with pytest.raises(SPDError, match=r"call model.eval\(\)"):
        d.edited_model(remove={"blocks.0.mlp.W_in": [0]})


@pytest.mark.slow
def test_the_page_says_what_is_so():
    """About five minutes."""
    found = architectures.everywhere()
    served = {name: one for name, one in found.items() if one.sites}
    assert len(served) > 60
    for name, one in served.items():
        assert one.identity < architectures.IDENTITY, name
        assert one.edits == "equal the hooks" or one.edits.startswith("refused"), name
    page = architectures.PAGE.read_text()
    if architectures.versions() not in page:
        pytest.skip("the page was written with other versions")
    assert page == architectures.page(found), "python -m tests.architectures writes it anew"


def test_the_page_is_of_the_pinned_versions():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (architectures.PAGE.parents[1] / "constraints.txt").read_text(), re.MULTILINE))
    wanted = f"transformer-lens {pinned['transformer-lens']} and transformers {pinned['transformers']}"
    assert wanted in architectures.PAGE.read_text()
