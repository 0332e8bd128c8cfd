from spd_lens.errors import SPDError, nearest


def test_it_is_a_value_error():
    assert issubclass(SPDError, ValueError)


def test_the_nearest_names_or_all_that_are_allowed():
    assert nearest("blocks.0.attn.W_q", ["blocks.0.attn.W_Q", "embed"]) == "nearest: blocks.0.attn.W_Q"
    assert nearest("zzz", ["svd", "random"]) == "allowed: svd, random"
    assert nearest("zzz", [f"name{i}" for i in range(100)]).endswith("… (100 in all)")
    assert nearest("x", []) == "there is none"
