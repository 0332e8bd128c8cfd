import json

import pytest

from spd_lens import Decomposition, cli
from spd_lens.tasks import athletes, facts, fruits

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.xdist_group("worlds")]  # one worker trains the small targets

QUICK = ["--steps", "4", "--subcomponents", "4", "--quiet"]


@pytest.fixture(autouse=True)
def small_texts(monkeypatch, quick):
    for name, value in {"BACKGROUND": 60, "TEXT": 8, "UNRELATED": 8, "RANDOM_DRAWS": 2}.items():
        monkeypatch.setattr(facts, name, value)
    monkeypatch.setattr(facts, "baselines", lambda *_: {})


def test_facts_writes_all_that_it_promises_and_a_study_goes_on(athlete_model, tmp_path, capsys):
    athletes.save_target(athlete_model, _made(tmp_path / "seed-0" / "target"), 0)
    cli.main(["facts", "--out", str(tmp_path), "--seeds", "1", "--resume", *QUICK])
    folder = tmp_path / "seed-0"
    assert sorted(p.name for p in folder.iterdir()) == ["decomposition", "report.html", "results.json", "target"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed-0", "study.html", "study.json"]
    assert json.loads((folder / "results.json").read_text())["config"]["steps"] == 4
    assert Decomposition.load(folder / "decomposition", athletes.load_target(folder / "target")).steps_done == 4
    printed = capsys.readouterr().out
    assert "golf: fall" in printed and "≥ 0.9" in printed and "KL, adversarial" in printed
    cli.main(["facts", "--out", str(tmp_path), "--seeds", "1", "--resume", *QUICK])
    assert "decomposing" not in capsys.readouterr().out
    learnt = (folder / "decomposition" / "decomposition.safetensors").read_bytes()
    (folder / "results.json").unlink()
    cli.main(["facts", "--out", str(folder), "--resume", *QUICK])
    assert (folder / "results.json").exists() and (folder / "decomposition" / "decomposition.safetensors").read_bytes() == learnt
    printed = capsys.readouterr().out
    for words in ("Cut out of the original weights", "athletes exchange sports", "KL, hard", "KL, alive-only", "KL, adversarial"):
        assert words in printed
    assert "decomposing" not in printed
    with pytest.raises(SystemExit):
        cli.main(["facts", "--out", str(folder), "--resume", *QUICK, "--steps", "5"])
    assert "was learnt with other steps" in capsys.readouterr().err


def test_entangled_writes_all_that_it_promises(fruit_model, tmp_path, capsys):
    fruits.save_target(fruit_model, _made(tmp_path / "target"), 0)
    cli.main(["entangled", "--out", str(tmp_path), "--resume", *QUICK])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decomposition", "report.html", "results.json", "target"]
    assert "Cut alone" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_named_with_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["facts", "--out", str(tmp_path), "--model", "gpt2", *QUICK])
    said = capsys.readouterr().err
    assert "'gpt2' are missing" in said and "HF_HUB_OFFLINE" in said and "leave --model out" in said


def test_a_checkpoint_of_an_interrupted_run_is_not_lost(tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit):
        cli.main(["facts", "--out", str(tmp_path), *QUICK])
    assert "--resume" in capsys.readouterr().err


def _made(folder):
    folder.mkdir(parents=True)
    return folder
