import pytest
import torch

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.attention import pair_attention
from tests import zoo


@pytest.mark.parametrize("make", [lambda: zoo.native(), lambda: zoo.wrapped("llama")], ids=["native", "llama"])
def test_alone_is_the_pattern_of_a_run_with_one_subcomponent_each(make):
    d = decompose(make(), zoo.tokens(4), SPDConfig(steps=0, subcomponents=40), progress=False)
    tokens = zoo.tokens(1)
    found = pair_attention(d, tokens, 1, pairs=[(2, 3), (0, 1)])
    assert found.full.shape == (4, 11, 11) and found.alone.shape == (2, 11, 11) and found.pairs == ((2, 3), (0, 1))
    masks = {name: torch.zeros(40).index_fill(0, torch.tensor(c), 1.0) for name, c in (("blocks.1.attn.W_Q", 2), ("blocks.1.attn.W_K", 3))}
    _, cache = d.run_with_cache(tokens, masks)
    assert torch.allclose(found.alone[0], cache["blocks.1.attn.hook_pattern"][0, found.heads[0]])
    assert torch.allclose(found.full, d.model.run_with_cache(tokens)[1]["blocks.1.attn.hook_pattern"][0], atol=1e-6)
    assert torch.allclose(found.alone.sum(-1), torch.ones(2, 11), atol=1e-5)


def test_one_pair_that_is_all_of_q_and_k_makes_the_whole_pattern():
    """W_Q and W_K of rank one: their one subcomponent is the matrix."""
    model = zoo.native(n_heads=1, d_head=8)
    with torch.no_grad():
        for part in ("W_Q", "W_K"):
            weight = getattr(model.blocks[0].attn, part)
            weight.copy_(weight[:, :, :1] * weight[:, :1, :])
    d = decompose(model, zoo.tokens(4), SPDConfig(sites="blocks.0.attn.W_[QK]", steps=0, subcomponents=8), progress=False)
    with torch.no_grad():
        for name, site in d.sites.items():
            u, s, v = torch.linalg.svd(site.weight)
            d.components[name].V.zero_()[:, 0] = u[:, 0] * s[0]
            d.components[name].U.zero_()[0] = v[0]
    found = pair_attention(d, zoo.tokens(1), 0, pairs=[(0, 0)])
    assert torch.allclose(found.alone[0], found.full[0], atol=1e-5)


def test_the_active_pairs_are_found(trained, tokens):
    found = pair_attention(trained, tokens[:1], 0)
    active = {part: (trained.importances(tokens[:1])[f"blocks.0.attn.W_{part}"][0] > 0.5).any(0) for part in "QK"}
    assert found.pairs and all(active["Q"][q] and active["K"][k] for q, k in found.pairs)


def test_bad_input(trained, tokens):
    with pytest.raises(SPDError, match="3 prompts were given"):
        pair_attention(trained, tokens, 0)
    with pytest.raises(SPDError, match="not decomposed here"):
        pair_attention(trained, tokens[:1], 7)
    with pytest.raises(SPDError, match="it has 0 …"):
        pair_attention(trained, tokens[:1], 0, pairs=[(0, 99)])
