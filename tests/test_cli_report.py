import functools
import re
from types import SimpleNamespace

import pytest
import torch

from spd_lens import SPDConfig, cli, cli_report, decompose, token_labels
from spd_lens.tasks import athletes, entangled, facts, fruits, induction
from tests import zoo

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.xdist_group("worlds")]  # one worker trains the small targets


def said(capsys, *arguments):
    with pytest.raises(SystemExit):
        cli.main(["report", *map(str, arguments)])
    return capsys.readouterr().err


def untrained(model, tokens, folder, **settings):
    decompose(model, tokens, SPDConfig(steps=0, **settings), progress=False).save(folder)


@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_of_an_induction_run_and_of_one_among_several_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(induction, "measure", functools.partial(induction.measure, many=64))
    model, run = induction.build_target(0), tmp_path / "price-x0.5"  # as --vary names it
    untrained(
        model,
        induction.sequences(8, torch.Generator().manual_seed(0)).tokens,
        run / "decomposition",
        sites=induction.SITES,
        subcomponents=16,
    )
    induction.save_target(model, tmp_path / "target-0.safetensors", 0)
    cli.main(["report", str(run)])
    assert "The circuit" in (run / "report.html").read_text() and "report.html (" in capsys.readouterr().out
    (tmp_path / "target-0.safetensors").rename(run / "target.safetensors")
    (run / "results.json").write_text('{"seconds_by_part": {"target": 1000, "measuring": 9000}}')
    monkeypatch.chdir(run / "decomposition")
    cli.main(["report", ".", "--out", str(run / "again.html")])
    assert re.search(r"; 10\d\d s in all", (run / "again.html").read_text())
    assert "--prompt was given, and the page of the induction circuit" in said(capsys, run, "--prompt", "x")
    assert (run / "again.html").stat().st_size < 7e6  # all 96 are active here; of a finished run 16


@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
@pytest.mark.parametrize("world, trained", [(athletes, "athlete_model"), (fruits, "fruit_model")])
def test_of_facts_and_entangled_with_their_prompts(world, trained, tmp_path, monkeypatch, request):
    for name, value in {"BACKGROUND": 60, "TEXT": 8, "UNRELATED": 8}.items():
        monkeypatch.setattr(facts, name, value)
    model = request.getfixturevalue(trained)
    (tmp_path / "target").mkdir()
    world.save_target(model, tmp_path / "target", 0)
    untrained(
        model,
        model.to_tokens("One day a dog went to the garden."),
        tmp_path / "decomposition",
        subcomponents=4,
        sites="*.W_out",
        output_positions="last",
    )
    cli.main(["report", str(tmp_path), "--quiet"])
    page = (tmp_path / "subcomponents.html").read_text()
    asked = (facts if world is athletes else entangled).setting(model, 0).asked
    answer = token_labels(model, next(iter(asked.values())).answers)[0]
    assert 'id="cards"' in page and f"for the answer “{answer}”" in page and "of more text" in page


@pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")
def test_of_a_model_of_the_hub_with_text(athlete_model, tmp_path, monkeypatch, capsys):
    untrained(
        athlete_model, athlete_model.to_tokens("The capital of France is Paris."), tmp_path / "saved", subcomponents=4, sites="*.W_out"
    )
    monkeypatch.setattr(cli_report, "load_model", lambda name: athlete_model)
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris.\n\nTiger Woods plays the sport of golf.\n\n" * 3)
    given = ["--model", "some/name", "--text", text, "--length", 8, "--quiet"]
    cli.main(
        [
            "report",
            str(tmp_path / "saved"),
            *map(str, given),
            "--prompt",
            "Tiger Woods plays the sport of",
            "--answer",
            " golf",
            "--most",
            "3",
        ]
    )
    page = (tmp_path / "saved" / "report.html").read_text()
    assert "for the answer “·golf”" in page and "The 3 of" in page
    assert "is 3 tokens" in said(capsys, tmp_path / "saved", *given, "--answer", " golf golf golf")
    text.write_text("Tiger")
    assert "fewer than 64 tokens" in said(capsys, tmp_path / "saved", *given[:4], "--length", "64")
    assert "no text was given" in said(capsys, tmp_path / "saved", "--model", "x")
    text.write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read as UTF-8" in said(capsys, tmp_path / "saved", *given)


def test_what_is_missing_is_named(tmp_path, capsys):
    assert "holds no decomposition" in said(capsys, tmp_path)
    untrained(zoo.native(), zoo.tokens(), tmp_path, subcomponents=40, sites="*.W_Q")
    assert "name the one that it is of with --model" in said(capsys, tmp_path)
    assert "--most was given as 0" in said(capsys, tmp_path, "--most", 0)
    assert "--length was given as 1" in said(capsys, tmp_path, "--length", 1)


def test_an_answer_is_one_token():
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(range(len(text.split()))))
    assert cli_report._token(SimpleNamespace(tokenizer=tokenizer), "golf") == 0
