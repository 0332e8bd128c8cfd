import functools
import json
import subprocess
import sys

import pytest
import torch

from spd_lens import Decomposition, cli
from spd_lens.bench import BENCHES
from spd_lens.bench.models import CLASSES
from spd_lens.tasks import induction

QUICK = ["--steps", "3", "--subcomponents", "16", "--quiet"]


@pytest.fixture(autouse=True)
def few_sequences(monkeypatch):
    """What is measured on 2,048 is tested elsewhere; 64 do here."""
    monkeypatch.setattr(induction, "measure", functools.partial(induction.measure, many=64))


@pytest.fixture
def target(tmp_path):
    """An untrained target in the place where `--resume` looks for one: training it is not what is tested here."""
    induction.save_target(induction.build_target(0), tmp_path / "target.safetensors", 0)
    return tmp_path


def test_induction_writes_all_that_it_promises(target, capsys):
    cli.main(["induction", "--out", str(target), "--resume", *QUICK])
    printed = capsys.readouterr().out
    assert "arXiv 2511.08854, Table 1" in printed and "1.000" in printed
    for check in ("hard", "alive-only", "adversarial"):  # beside every count
        assert f"KL, {check}" in printed
    assert sorted(p.name for p in target.iterdir()) == ["decomposition", "report.html", "results.json", "target.safetensors"]
    results = json.loads((target / "results.json").read_text())
    assert results["config"]["steps"] == 3 and results["distinct"]["total"] >= 0
    model = induction.load_target(target / "target.safetensors")
    assert Decomposition.load(target / "decomposition", model).steps_done == 3
    page = (target / "report.html").read_text()
    assert "src=" not in page.split("<body>")[1] and "@import" not in page
    assert page.count('class="plotly-graph-div"') >= 8 and 'id="cards"' in page
    assert "Do they do what the circuit needs?" in printed and "previous token" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["induction", "--out", "/proc/nowhere"], "cannot take"),
        (["induction", "--subcomponents", "0"], "at least 1"),
        (["induction", "--steps", "-1"], "at least 0"),
        (["induction", "--seeds", "0"], "seeds was given as 0"),
        (["induction", "--without", "colour"], "no part 'colour'; allowed: fisher, svd"),
        (["induction", "--vary", "init", "3"], "'init' is neither a setting that is one number nor a loss"),
        (["induction", "--vary", "gate_width", "3.5"], "gate_width was given as '3.5'; it has to be a whole number"),
        (["bench", "step", "--batch", "4", "0"], "batch was given as 0"),
        (["bench", "step", "--layers", "2"], "--model gpt2"),
        (["bench", "step", "--device", "warp"], "allowed: cpu, cuda"),
        (["bench", "forward", "--model", "Transformer"], "TransformerBridge"),
        (["bench", "forward", "--plot", "/proc/nowhere/a.html"], "cannot take"),
        (["bench", "length", "--length", "-1"], "length was given as -1"),
        (["bench", "length", "--plot", "/tmp"], "is a folder"),
        (["bench", "scale", "--d-model", "0"], "d_model was given as 0"),
        (["bench", "scale", "--plot", "/proc/a.html"], "cannot take"),
    ],
)
def test_bad_input_is_one_line_and_found_at_once(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "error:" in printed.err and message in printed.err and printed.out == ""


def test_a_study_makes_a_table_of_its_runs_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    for seed in (3, 4):
        induction.save_target(induction.build_target(seed), tmp_path / f"target-{seed}.safetensors", seed)
    arguments = ["induction", "--out", str(tmp_path), "--seed", "3", "--resume", *QUICK]
    cli.main([*arguments, "--seeds", "2"])
    printed = capsys.readouterr().out
    wanted = ("seed 3", "seed 4", "median", "KL, adversarial", "target: effective rank of V1", "replication")
    assert [words for words in wanted if words not in printed] == []
    assert {"seed-3", "seed-4", "study.json", "study.html"} < {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "study.json").read_text()).keys() == {"seed 3", "seed 4"}

    def none(*_, **__):
        raise AssertionError("what is finished is not done again")

    with monkeypatch.context() as patched:
        patched.setattr(cli, "decompose", none)
        cli.main([*arguments, "--seeds", "2"])
        with pytest.raises(AssertionError):
            cli.main([*arguments, "--seeds", "2", "--importance", "scalar"])  # other settings: not the same run
    capsys.readouterr()
    cli.main([*arguments, "--vary", "gate_bias", "1", "3.5"])
    printed = capsys.readouterr().out
    assert "gate_bias 3.5" in printed and "median" not in printed
    assert (tmp_path / "gate_bias-3.5" / "report.html").exists()


def test_a_checkpoint_of_an_interrupted_run_is_not_lost(target, capsys):
    (target / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit):
        cli.main(["induction", "--out", str(target), *QUICK])
    assert "--resume" in capsys.readouterr().err and (target / "checkpoint.safetensors").exists()


def test_bench_step_prints_one_line_of_json_per_configuration(capsys):
    threads = torch.get_num_threads()
    cli.main(["bench", "step", "--batch", "4", "--subcomponents", "16", "--steps", "1"])
    line = json.loads(capsys.readouterr().out)
    assert {k: line[k] for k in ("batch", "subcomponents", "importance", "threads", "device")} == {
        "batch": 4, "subcomponents": 16, "importance": "attention", "threads": 1, "device": "cpu",
    }  # fmt: skip
    assert line["steps_per_s"] > 0 and line["cpu_s_per_step"] > 0 and line["peak_rss_mb"] >= line["idle_rss_mb"] > 0
    assert set(line["shares"]) == {"importance", "reconstruction", "losses", "optimiser"}
    assert sum(line["shares"].values()) == pytest.approx(1, abs=0.01)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_several_configurations_run_in_processes_of_their_own():
    command = [sys.executable, "-m", "spd_lens", "bench", "step", "--batch", "2", "4", "--subcomponents", "16", "--steps", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [json.loads(line)["batch"] for line in lines] == [2, 4]


TINY = ["--batch", "2", "--subcomponents", "4", "--length", "6", "--layers", "1", "--width", "16", "--vocabulary", "20"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["step", "--model", "gpt2", "--steps", "1", *TINY],
        ["forward", "--model", CLASSES[0], "--rounds", "1", *TINY],
        ["length", "--length", "8", "--subcomponents", "4", "--steps", "1"],
    ],
)
def test_bench_prints_json_and_draws_a_page_that_needs_no_other(arguments, capsys, tmp_path):
    threads = torch.get_num_threads()
    cli.main(["bench", *arguments, "--plot", str(tmp_path / "new" / "bench.html")])
    torch.set_num_threads(threads)
    line = json.loads(capsys.readouterr().out)
    assert line["roofline_share"] > 0 and line["device"] == "cpu"
    page = (tmp_path / "new" / "bench.html").read_text()
    assert "src=" not in page.split("<body>")[1] and page.count('class="plotly-graph-div"') == 1 and "roofline_share" in page


@pytest.mark.slow
def test_bench_scale_prints_a_line_per_axis(capsys, tmp_path):
    base = ["--d-model", "16", "--subcomponents", "4", "--layers", "1", "--batch", "2", "--length", "6", "--steps", "1"]
    cli.main(["bench", "scale", "--axes", "batch", "layers", "--largest", "2", *base, "--plot", str(tmp_path / "scale.html")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["axis"], line["from"], line["to"], len(line["points"])) for line in lines] == [("batch", 2, 4, 2), ("layers", 1, 2, 2)]
    assert "exponent_time" in lines[0] and lines[0]["base"]["layers"] == 1 and (tmp_path / "scale.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["induction", "--help"], ["bench", "--help"], *(["bench", kind, "--help"] for kind in BENCHES)],
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0 and "usage: spd-lens" in capsys.readouterr().out
