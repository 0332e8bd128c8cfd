import torch

from spd_lens import masks


def draw(seed=0, **options):
    return masks.Draw(torch.Generator().manual_seed(seed), **options)


def importances(batch=400):
    return {"a": torch.rand(batch, 5, 3), "b": torch.zeros(batch, 5, 2)}


def test_every_sampler_stays_between_the_importance_and_one():
    g = importances()
    d = draw(sources={"a": torch.rand(3), "b": torch.rand(2)})
    for sampler in (masks.uniform, masks.coins, masks.adversarial, masks.soft, masks.ones):
        for name, mask in sampler(g, d).items():
            assert mask.shape == g[name].shape and (mask >= g[name]).all() and (mask <= 1).all(), sampler


def test_uniform_covers_the_interval():
    mask = masks.uniform({"b": torch.zeros(400, 5, 2)}, draw())["b"]
    assert abs(mask.mean() - 0.5) < 0.02 and mask.min() < 0.01 and mask.max() > 0.99


def test_mixed_shares():
    mask = masks.mixed({"a": torch.zeros(4000, 5, 3), "b": torch.zeros(4000, 5, 2)}, draw())
    zero = [(m == 0).flatten(1).all(1) for m in mask.values()]
    coin = (mask["a"].eq(0) | mask["a"].eq(1)).flatten(1).all(1) & ~zero[0]
    assert torch.equal(*zero)  # one kind for all sites of a sequence
    assert abs(zero[0].float().mean() - 0.3) < 0.03 and abs(coin.float().mean() - 0.2) < 0.03


def test_half_an_importance_is_drawn_whole_or_not_at_all_and_keeps_its_gradient():
    g = torch.full((4000, 5, 3), 0.7, requires_grad=True)
    mask = masks.mixed({"a": g}, draw())["a"]
    drawn = (mask < 0.699).flatten(1).any(1)  # r alone never goes below the importance
    assert abs(drawn.float().mean() - 0.3) < 0.03
    values = mask[drawn].detach()
    assert ((values - 0).abs() < 1e-6).logical_or((values - 1).abs() < 1e-6).all() and abs(values.mean() - 0.7) < 0.02
    mask[drawn].sum().backward()
    assert torch.equal(g.grad, drawn[:, None, None].float().expand_as(g))


def test_coins_are_the_same_everywhere():
    mask = masks.coins({"b": torch.zeros(4, 5, 200)}, draw())["b"].expand(4, 5, 200)
    assert torch.equal(mask, mask[:1, :1].expand_as(mask)) and abs(mask.mean() - 0.5) < 0.2 and set(mask.flatten().tolist()) == {0.0, 1.0}


def test_the_alive_are_all_on_and_the_retired_off():
    g = {"a": torch.rand(4, 5, 3), "b": torch.rand(4, 5, 2)}
    mask = masks.alive(g, draw(alive={"a": torch.tensor([1.0, 0.0, 1.0])}))
    assert torch.equal(mask["a"], torch.tensor([1.0, 0.0, 1.0]).expand(4, 5, 3)) and mask["b"].min() == 1


def test_hard_all_and_none():
    g = {"a": torch.tensor([[[0.2, 0.5, 0.51, 1.0]]])}
    assert masks.hard(g)["a"].tolist() == [[[0, 0, 1, 1]]]
    assert masks.ones(g)["a"].min() == 1 and masks.zeros(g)["a"].max() == 0


def test_the_adversary_has_one_value_per_subcomponent():
    g = {"b": torch.zeros(4, 5, 2)}
    mask = masks.adversarial(g, draw(sources={"b": torch.tensor([0.2, 0.9])}))["b"]
    assert torch.equal(mask, torch.tensor([0.2, 0.9]).expand(4, 5, 2))
    after = masks.ascend({"b": torch.tensor([0.2, 0.95])}, {"b": torch.tensor([-3.0, 0.1])}, 0.1)["b"]
    assert torch.allclose(after, torch.tensor([0.1, 1.0]))


def test_routers():
    names = ["a", "b", "c", "d"]
    assert masks.every_site(names, draw()) == [names]
    assert masks.one_at_a_time(names, draw()) == [["a"], ["b"], ["c"], ["d"]]
    some = masks.one_at_a_time(names, draw(layerwise_sites=2))
    assert len(some) == 2 and all(len(s) == 1 for s in some) and some[0] != some[1]
    subsets = [masks.random_subset(names, draw(seed))[0] for seed in range(200)]
    assert all(subset and set(subset) <= set(names) for subset in subsets)
    assert abs(sum(map(len, subsets)) / 200 - 2) < 0.2


def test_the_same_seed_draws_the_same():
    g = importances()
    assert torch.equal(masks.mixed(g, draw(3))["a"], masks.mixed(g, draw(3))["a"])
    assert not torch.equal(masks.mixed(g, draw(3))["a"], masks.mixed(g, draw(4))["a"])
