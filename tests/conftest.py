import os
import shutil
import subprocess
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

from spd_lens import SPDConfig, decompose
from spd_lens.tasks import athletes, fruits, language, surgery
from tests import zoo

torch.set_num_threads(1)  # two workers share two cores; more threads wait for each other


@pytest.fixture(scope="session")
def model():
    """The model of most tests: attention and MLP, LayerNorm, of whichever class this transformer-lens has."""
    return zoo.hooked(normalization_type="LN") if zoo.HookedTransformer is not None else zoo.native()


@pytest.fixture(scope="session")
def tokens():
    return zoo.tokens()


@pytest.fixture(scope="session")
def untrained(model):
    return decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=40), progress=False)


@pytest.fixture(scope="session")
def trained(model):
    config = SPDConfig(steps=12, subcomponents=12, batch_size=4, gate_width=4)
    with pytest.warns(UserWarning, match="rank"):
        return decompose(model, zoo.tokens(16), config, progress=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


# --- worlds small enough to be learnt in seconds, and models that know them ---


@contextmanager
def small_worlds():
    """Three sports and three colours and fruits; targets of 2 narrow layers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LAYERS": 2, "WIDTH": 64, "HEADS": 2, "BATCH": 16}.items():
            patch.setattr(language, name, value)
        patch.setattr(athletes, "ATHLETES", {sport: athletes.ATHLETES[sport][:3] for sport in ("golf", "basketball", "tennis")})
        for name in ("MEANINGS", "PLACES"):
            patch.setattr(fruits, name, dict(list(getattr(fruits, name).items())[:3]))
        yield


@pytest.fixture(scope="module")
def small():
    with small_worlds():
        yield


@pytest.fixture(scope="session")
def athlete_model():
    with small_worlds():
        return athletes.train_target(0, steps=400, progress=False)


@pytest.fixture(scope="session")
def fruit_model():
    with small_worlds():
        return fruits.train_target(0, steps=600, progress=False)


@pytest.fixture
def quick(monkeypatch):
    """Few things are tried."""
    for name, value in {"POOL": 6, "MOST": 3}.items():
        monkeypatch.setattr(surgery, name, value)
