"""Two real processes over gloo. Starting them takes seconds, so one launch does everything (`main`) and the tests read what it found."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd_lens import Decomposition, SPDConfig, SPDError, decompose, masks
from spd_lens.guards import frozen
from spd_lens.losses import LOSSES
from spd_lens.ranks import ALONE, Ranks, meet
from spd_lens.sites import find_sites
from spd_lens.tasks import induction
from spd_lens.training import Trainer, initialised
from tests import zoo

ROOT = Path(__file__).parents[1]
QUICK = dict(steps=6, subcomponents=33, batch_size=4, gate_width=4, sites="*.W_[QV]", weights={**SPDConfig().weights, "adversarial": 1.0})
SEVERAL = {**dict.fromkeys(LOSSES, 0.5), "faithfulness": 10.0}
CASES = {**{name: {name: 1.0} for name in LOSSES}, "all of them": SEVERAL}
NOTHING_RANDOM = {
    name: weight for name, weight in SEVERAL.items() if name not in ("stochastic", "layerwise", "partial", "background", "background_price")
}

pytestmark = pytest.mark.xdist_group("ranks")  # with two workers: one launch, not two


# --- what the two processes do ---


def small_model():
    return zoo.hooked(normalization_type="LN") if zoo.HookedTransformer is not None else zoo.native()


class BothRanks(masks.Draw):
    """One process that draws what two would, each for its half of the sequences."""

    def uniform(self, *shape, like):
        half = (shape[0] // 2, *shape[1:])
        streams = [Ranks(rank, 2).stream(self.generator, 0, 0) for rank in (0, 1)] if not hasattr(self, "streams") else self.streams
        self.streams = streams
        return torch.cat([torch.rand(half, generator=stream, dtype=like.dtype, device=like.device) for stream in streams])


def one_step(model, weights, ranks, draw=masks.Draw):
    """Gradients, losses and the adversary's sources after a step on four sequences."""
    config = SPDConfig(subcomponents=20, batch_size=4, gate_width=4, init="random", layerwise_sites=3, weights=weights)
    tokens, other = zoo.tokens(4), zoo.tokens(4, 9, seed=7)
    with frozen(model):
        d = initialised(model, find_sites(model, "*"), tokens, config)
        trainer = Trainer(d, ranks)
        trainer.draw = draw(trainer.shared, trainer.draw.sources, config.masks, config.layerwise_sites)
        result = trainer.step(ranks.share(tokens), ranks.share(other) if config.is_targeted else None)
    gradients = {str(i): p.grad.clone() for i, p in enumerate(d.parameters()) if p.grad is not None}
    return {"gradients": gradients, "losses": result.losses, "active": result.active, "sources": trainer.draw.sources}


def batches(many=20):
    return (zoo.tokens(4, seed=seed) for seed in range(many))


def error_of(call):
    try:
        call()
    except SPDError as error:
        return str(error)


def main(folder):
    torch.set_num_threads(1)
    model = small_model()
    ranks = meet(torch.device("cpu"))
    found = {"steps": {case: one_step(model, weights, ranks) for case, weights in CASES.items()}}

    def train(tokens=None, callbacks=(), path=None, **changes):
        config = SPDConfig(**{**QUICK, **changes})
        tokens = zoo.tokens(16) if tokens is None else tokens
        return decompose(model, tokens, config, progress=False, callbacks=callbacks, checkpoint=path, resume=path is not None)

    whole = train()
    whole.save(folder / "saved")
    found["whole"], found["history"] = whole.state(), whole.history
    found["tensor"] = train(weights=NOTHING_RANDOM).history
    found["iterable"] = train(batches(), weights=NOTHING_RANDOM).history

    def interrupt(result):
        if result.step == 2 and ranks.rank == 1:
            signal.raise_signal(signal.SIGINT)

    try:
        train(callbacks=[interrupt], path=folder / "interrupted")
    except KeyboardInterrupt:
        found["interrupted"] = True
    if ranks.rank == 0:
        shutil.copy(folder / "interrupted", folder / "of two")
    found["resumed"] = train(path=folder / "interrupted").state()
    found["from one"] = train(path=folder / "of one").state()

    def spoil(result):
        if result.step == 2 and ranks.rank == 1:
            with torch.no_grad():
                result.decomposition.components["blocks.0.attn.W_V"].U[0, 0] = torch.nan

    found["errors"] = {
        "nan": error_of(lambda: train(callbacks=[spoil])),
        "ended": error_of(lambda: train(batches(3))),
        "batch size": error_of(lambda: train(batch_size=5)),
        "batch": error_of(lambda: train([zoo.tokens(1)])),
        "seed": error_of(lambda: train(seed=ranks.rank)),
        "tokens": error_of(lambda: train(zoo.tokens(16, seed=ranks.rank))),
        "write": error_of(lambda: train(path=folder / "saved" / "decomposition.json" / "no folder")),
    }
    torch.save(found, folder / f"{ranks.rank}.pt")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(folder):
    """Two of this file, as a launcher starts them."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_ranks", str(folder)]
    both = [subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    try:
        errors = [process.communicate(timeout=200)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


# --- what they found ---


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder):
    def stop(result):
        if result.step == 3:
            raise Enough

    with pytest.raises(Enough):  # a run of one process, for the two to go on from
        decompose(small_model(), zoo.tokens(16), SPDConfig(**QUICK), progress=False, checkpoint=folder / "of one", checkpoint_every=3,
                  callbacks=[stop])  # fmt: skip
    return launched(folder)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(both, case, record_property):
    alone = one_step(small_model(), CASES[case], ALONE, BothRanks)
    for found in both:
        together = found["steps"][case]
        assert together["gradients"].keys() == alone["gradients"].keys() and together["losses"].keys() == CASES[case].keys()
        errors = {k: float((g - alone["gradients"][k]).abs().max()) for k, g in together["gradients"].items()}
        record_property("largest difference", max(errors.values()))
        for k, error in errors.items():
            assert error <= 1e-6 * max(1.0, float(alone["gradients"][k].abs().max())), k
        for name, loss in alone["losses"].items():
            assert torch.allclose(together["losses"][name], loss, rtol=1e-5, atol=1e-7), name
        assert all(torch.allclose(together["active"][name], active) for name, active in alone["active"].items())
        assert same(together["sources"], alone["sources"])  # signs: equal where the averaged gradients are


def test_both_have_the_same_bits(both):
    first, second = both
    assert same(first["whole"], second["whole"]) and first["history"] == second["history"]
    for case in CASES:
        for part in ("gradients", "losses", "active", "sources"):
            assert same(first["steps"][case][part], second["steps"][case][part]), (case, part)


@pytest.mark.parametrize("kind", ["tensor", "iterable"])
def test_without_random_masks_two_train_as_one_does(both, kind):
    tokens = zoo.tokens(16) if kind == "tensor" else batches()
    alone = decompose(small_model(), tokens, SPDConfig(**{**QUICK, "weights": NOTHING_RANDOM}), progress=False).history
    for line, ours in zip(both[0][kind], alone):
        assert line["total"] == pytest.approx(ours["total"], rel=1e-4), line["step"]
    assert len(both[0][kind]) == len(alone) == QUICK["steps"]


def test_ctrl_c_in_one_stops_both_and_resuming_gives_the_same_bits(both):
    assert all(found["interrupted"] and same(found["resumed"], found["whole"]) for found in both)


def test_another_number_of_processes_goes_on(both, folder):
    assert same(both[0]["from one"], both[1]["from one"])
    alone = decompose(small_model(), zoo.tokens(16), SPDConfig(**QUICK), progress=False, checkpoint=folder / "of two", resume=True)
    assert alone.steps_done == QUICK["steps"]
    assert [line["step"] for line in alone.history] == [1, 2, 3, 4, 5, 6] and alone.history[:2] == both[0]["history"][:2]


def test_both_save_into_one_folder(both, folder):
    loaded = Decomposition.load(folder / "saved", small_model())
    assert same(loaded.state(), both[0]["whole"])


@pytest.mark.parametrize(
    "case, message",
    [
        ("nan", "step 3: the stochastic loss is nan"),
        ("ended", "there are 3 batches for 6 steps"),
        ("batch size", "a batch of 5 sequences cannot be shared equally by 2 processes; give 4 or 6"),
        ("batch", "a batch of 1 sequences cannot be shared equally by 2 processes; give 2 "),
        ("seed", "rank 1 was given another config than rank 0"),
        ("tokens", "rank 1 was given another tokens than rank 0"),
        ("write", "cannot take"),
    ],
)
def test_what_stops_one_stops_both_with_the_same_error(both, case, message):
    first, second = (found["errors"][case] for found in both)
    assert first == second and message in first


# --- without other processes ---


def test_ranks_draw_from_different_streams_which_a_restart_finds_again():
    shared = torch.Generator()

    def drawn(rank, step, seed=0):
        return torch.rand(50, generator=Ranks(rank, 2).stream(shared, seed, step))

    streams = [drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(1, 1), drawn(0, 0, seed=1), drawn(0, 0, seed=-1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(streams) for b in streams[:i])
    assert torch.equal(drawn(1, 7), drawn(1, 7))
    assert ALONE.stream(shared, 0, 0) is shared


def test_one_process_starts_no_group(model):
    decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=33), progress=False)
    assert not torch.distributed.is_initialized()


def test_a_launcher_that_says_too_little(model, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SPDError, match="did not meet .*MASTER_ADDR.* unset WORLD_SIZE"):
        decompose(model, zoo.tokens(8), SPDConfig(steps=0, subcomponents=33), progress=False)


# --- with the real launchers ---

SCRIPT = """
import sys, torch, spd_lens
from tests.test_ranks import QUICK, small_model
from tests import zoo

def fail(result):
    if "fail" in sys.argv and torch.distributed.get_rank() == 1:
        raise RuntimeError("this rank dies")

decomposition = spd_lens.decompose(small_model(), zoo.tokens(16), spd_lens.SPDConfig(**QUICK), callbacks=[fail])
assert torch.distributed.get_world_size() == 2
decomposition.save(sys.argv[1])
"""
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port"]  # fmt: skip


def run(launcher, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *launcher, free_port(), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.terminate()  # the launcher ends its own
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_script_runs_unchanged(launcher, both, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(launcher, tmp_path / "script.py", tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" 0/6 ") == 1  # one bar
    assert same(Decomposition.load(tmp_path / "saved", small_model()).state(), both[0]["whole"])


@pytest.mark.slow
def test_where_one_process_dies_the_others_do_not_wait(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(TORCHRUN, tmp_path / "script.py", tmp_path / "saved", "fail")
    assert done.returncode != 0 and "this rank dies" in done.stderr and not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_the_induction_command_in_two_processes(tmp_path):
    induction.save_target(induction.build_target(0), tmp_path / "target.safetensors", 0)
    done = run(TORCHRUN, "-m", "spd_lens", "induction", "--out", tmp_path, "--resume", "--steps", "3", "--subcomponents", "16", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("arXiv 2511.08854, Table 1") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decomposition", "report.html", "results.json", "target.safetensors"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
