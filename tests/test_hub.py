import pytest

from spd_lens import SPDError
from spd_lens.hub import load_model


def test_a_model_that_is_not_here_is_named_with_what_to_do():
    with pytest.raises(SPDError, match="'gpt2' are missing.*HF_HUB_OFFLINE.*unset; or do without.$"):
        load_model("gpt2", "do without")
    with pytest.raises(SPDError, match="unset.$"):
        load_model("gpt2")
