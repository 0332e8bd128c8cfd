import json
import subprocess
from inspect import unwrap
from pathlib import Path

import pytest
import torch

from spd_lens import Decomposition, SPDConfig, SPDError, decompose
from spd_lens.storage import check_writable, load_decomposition
from tests import zoo


@pytest.fixture
def folder(trained, tmp_path):
    return trained.save(tmp_path / "saved")


def test_a_round_trip_is_exact_to_the_bit(trained, tokens, folder):
    again = Decomposition.load(folder, trained.model)
    before, after = trained.observe(tokens), again.observe(tokens)
    assert torch.equal(before.logits, after.logits)
    for name in trained.sites:
        assert torch.equal(before.importances[name], after.importances[name])
        assert torch.equal(before.inner[name], after.inner[name])
    hard = {n: (g > 0.5).float() for n, g in before.importances.items()}
    with torch.no_grad():
        assert torch.equal(trained.run(tokens, hard, delta=0.5), again.run(tokens, hard, delta=0.5))
    assert again.config == trained.config and again.steps_done == trained.steps_done and again.history == trained.history


@pytest.mark.parametrize("importance", ["scalar", "vector"])
def test_the_other_importance_functions_too(model, tokens, tmp_path, importance):
    d = decompose(model, tokens, SPDConfig(steps=0, subcomponents=33, importance=importance), progress=False)
    again = Decomposition.load(d.save(tmp_path), model)
    for name, g in d.importances(tokens).items():
        assert torch.equal(g, again.importances(tokens)[name])


def test_only_two_files_and_nothing_pickled(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["decomposition.json", "decomposition.safetensors"]
    json.loads((folder / "decomposition.json").read_text())


def test_a_model_of_another_shape_names_the_leaf_and_both_shapes(folder):
    other = zoo.native(d_model=16, d_head=4, d_mlp=20)
    with pytest.raises(SPDError, match=r"blocks.0.attn.W_Q: expected shape \[32, 32\], found \[16, 16\] in the model's matrix"):
        Decomposition.load(folder, other)


def test_a_model_without_the_site(folder):
    with pytest.raises(SPDError, match="no site matches"):
        Decomposition.load(folder, zoo.native(attn_only=True))


def test_a_model_of_the_same_shape_with_other_weights(folder, model):
    other = zoo.ALL["HT-standard"]() if "HT-standard" in zoo.ALL else zoo.native()
    with torch.no_grad():
        other.blocks[1].attn.W_O.mul_(1.1) if zoo.HookedTransformer is not None else other.blocks[1].attn.o.original_component.weight.mul_(
            1.1
        )
    with pytest.raises(SPDError, match="other weights: the mean squared delta of blocks.1.attn.W_O"):
        Decomposition.load(folder, other)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_tensors(folder, model, share):
    path = folder / "decomposition.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(SPDError, match=r"decomposition.safetensors is no whole file"):
        Decomposition.load(folder, model)


def edit(folder: Path, change) -> None:
    path = folder / "decomposition.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("sites"), "not as spd_lens writes it"),
        (lambda d: d.update(format=99), "format 1"),
        (lambda d: d["config"].update(colour="red"), "no 'colour'"),
        (lambda d: d["sites"]["blocks.0.attn.W_Q"].update(subcomponents=5), r"blocks.0.attn.W_Q.\w+.*: expected shape .*5.*, found .*12"),
        (lambda d: d.update(identity="other"), "two different decompositions"),
    ],
)
def test_a_description_that_does_not_fit(folder, model, change, message):
    edit(folder, change)
    with pytest.raises(SPDError, match=message):
        Decomposition.load(folder, model)


def test_missing_files_say_which(folder, model, tmp_path):
    with pytest.raises(SPDError, match=r"decomposition.json does not exist; a decomposition is saved with"):
        Decomposition.load(tmp_path / "nowhere", model)
    (folder / "decomposition.safetensors").unlink()
    with pytest.raises(SPDError, match=r"decomposition.safetensors does not exist"):
        Decomposition.load(folder, model)


def test_text_that_is_no_json(folder, model):
    (folder / "decomposition.json").write_text("{")
    with pytest.raises(SPDError, match="no whole JSON file"):
        Decomposition.load(folder, model)


def test_saving_over_an_older_one_replaces_it(trained, untrained, tmp_path):
    untrained.save(tmp_path)
    trained.save(tmp_path)
    assert Decomposition.load(tmp_path, trained.model).steps_done == trained.steps_done


def test_a_folder_without_room_is_found_before(tmp_path):
    with pytest.raises(SPDError, match="cannot take"):
        check_writable(tmp_path, 10**17)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SPDError, match="cannot take"):
        check_writable(tmp_path / "file" / "below", 10)


def test_a_full_disk_keeps_what_was_there(untrained, trained, small_disk, model):
    (small_disk / "decomposition.json").write_text("mine")
    with pytest.raises(SPDError, match=r"could not be written|cannot take"):
        untrained.save(small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["decomposition.json"]
    assert (small_disk / "decomposition.json").read_text() == "mine"


def test_a_read_only_folder(untrained, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SPDError, match="cannot take"):
        check_writable(small_disk, 10)
    with pytest.raises(SPDError, match="could not be written"):
        untrained.save(small_disk)


def test_swapped_arguments_are_told(trained, tmp_path):
    with pytest.raises(SPDError, match=f"given a {type(trained.model).__name__} as the folder and a str as the model; it is load"):
        unwrap(load_decomposition)(trained.model, str(tmp_path))
    with pytest.raises(SPDError, match="given a PosixPath as the folder and a str as the model"):
        Decomposition.load(tmp_path, "gpt2")
