"""A training that is killed, has no room or loses its folder: it goes on from the last whole step as if nothing had happened."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from spd_lens import SPDConfig, SPDError, decompose
from spd_lens.storage import UNFINISHED, Saved, check_writable, replacing, write_text
from spd_lens.training import Progress, Trainer
from tests import zoo

KILLS = 60
CONFIG = SPDConfig(sites="blocks.*.attn.W_Q", steps=40, subcomponents=33, batch_size=4, gate_width=4)

# Imports once, and then forks one training per line of its input: "folder seconds"; killed after so many seconds, unless done.
NURSERY = """
import os, signal, sys, time, torch
from tests import zoo
from tests.test_interruptions import CONFIG, train
torch.set_num_threads(1)
model = zoo.native()
print("ready", flush=True)
for line in sys.stdin:
    folder, seconds = line.split()
    child = os.fork()
    if not child:
        train(model, folder).save(f"{folder}/saved")
        os._exit(0)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def train(model, folder, config=CONFIG, every=1, **options):
    path = f"{folder}/c.safetensors"
    return decompose(model, zoo.tokens(16), config, progress=False, checkpoint=path, checkpoint_every=every, resume=True, **options)


def steps_done(folder):
    """As the checkpoint says, which has to be a whole one at any moment."""
    path = folder / "c.safetensors"
    return Saved(path, Progress).about["steps_done"] if path.exists() else 0


def unfinished(folder):
    return {(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob(f".*{UNFINISHED}")}


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, capsys):
    """SIGKILL at random moments, again and again until the training is through; and that again, until there were enough kills."""
    nursery = subprocess.Popen([sys.executable, "-W", "ignore", "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert nursery.stdin and nursery.stdout and nursery.stdout.readline() == "ready\n"

    def run(folder, seconds):
        print(folder, seconds, file=nursery.stdin, flush=True)
        return int(nursery.stdout.readline())

    start = time.monotonic()
    assert run(tmp_path / "whole", 1000) == 0
    undisturbed = time.monotonic() - start
    expected = load_file(tmp_path / "whole" / "saved" / "decomposition.safetensors")

    draw, landed, histories = random.Random(0), Counter(), 0

    def enough():  # which moments chance hits depends on the machine: more kills until each kind was hit
        return (
            landed["kills"] >= KILLS and landed["in training"] >= KILLS / 3 and min(landed["while writing"], landed["while resuming"]) >= 3
        )

    while not enough() and landed["kills"] < 10 * KILLS:
        folder = tmp_path / str(histories)
        folder.mkdir()
        for attempt in itertools.count():
            before, left = steps_done(folder), unfinished(folder)
            longest = undisturbed / (2 if attempt else 20)  # the first before there is anything
            status = run(folder, draw.uniform(0, longest))
            after = steps_done(folder)
            assert before <= after <= CONFIG.steps and len(unfinished(folder)) <= 2  # of the checkpoint and of a saved file
            if status == 0:
                break
            assert status == signal.SIGKILL
            landed["kills"] += 1
            landed["while writing"] += bool(unfinished(folder) - left)
            landed["before the first step"] += after == 0
            landed["while resuming"] += 0 < before == after < CONFIG.steps
            landed["in training"] += before < after < CONFIG.steps
            landed["after the last step"] += after == CONFIG.steps
        histories += 1
        assert sorted(p.name for p in folder.iterdir()) == ["c.safetensors", "saved"]
        assert sorted(p.name for p in (folder / "saved").iterdir()) == ["decomposition.json", "decomposition.safetensors"]
        found = load_file(folder / "saved" / "decomposition.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    nursery.stdin.close()
    nursery.wait(10)
    with capsys.disabled():
        print(f"\n{dict(landed)} in {histories} histories, {time.monotonic() - start:.0f} s; undisturbed {undisturbed:.1f} s")
    assert enough()
    assert landed["before the first step"] >= 1


TINY = SPDConfig(sites="blocks.0.attn.W_Q", steps=6, subcomponents=4, batch_size=2, gate_width=1, importance="scalar", init="random")


@pytest.fixture(scope="module")
def never_stopped(model, tmp_path_factory):
    return train(model, tmp_path_factory.mktemp("whole"), TINY).state()


def same(d, state):
    return d.state().keys() == state.keys() and all(torch.equal(d.state()[name], state[name]) for name in state)


def at_step(step, act):
    return lambda result: act() if result.step == step else None


def fill_up(folder):
    with open(folder / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):  # noqa: PTH123
        while True:
            file.write(bytes(1024))


def test_a_disk_that_fills_up_in_training_keeps_the_last_checkpoint(model, small_disk, never_stopped):
    with pytest.raises(SPDError, match=rf"step 4: .*c.safetensors could not be written \(.*No space left on device.*\).* The checkpoint of step 2 "
                                       rf"is kept in {small_disk}/c.safetensors; mend this, and go on with resume=True"):  # fmt: skip
        train(model, small_disk, TINY, every=2, callbacks=[at_step(3, lambda: fill_up(small_disk))])
    assert sorted(p.name for p in small_disk.iterdir()) == ["c.safetensors", "filler"] and steps_done(small_disk) == 2
    with pytest.raises(SPDError, match=r"cannot take the .* MB .*No space left on device; 0 MB are free"):
        train(model, small_disk, TINY)
    (small_disk / "filler").unlink()
    assert same(train(model, small_disk, TINY), never_stopped)


def test_a_folder_that_becomes_read_only_in_training(model, small_disk, never_stopped):
    def lock(how):
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    with pytest.raises(SPDError, match=r"step 4: .*Read-only file system.*The checkpoint of step 2 is kept"):
        train(model, small_disk, TINY, every=2, callbacks=[at_step(3, lambda: lock("ro"))])
    lock("rw")
    assert steps_done(small_disk) == 2
    assert same(train(model, small_disk, TINY), never_stopped)


def test_a_folder_that_vanishes_in_training_is_made_again(model, tmp_path, never_stopped):
    folder = tmp_path / "gone"
    d = train(model, folder, TINY, every=2, callbacks=[at_step(3, lambda: shutil.rmtree(folder))])
    assert same(d, never_stopped) and steps_done(folder) == 6


def test_a_folder_that_turns_into_a_file_in_training(model, tmp_path):
    folder = tmp_path / "gone"

    def swap():
        shutil.rmtree(folder)
        folder.write_text("")

    with pytest.raises(SPDError, match=r"step 4: .*could not be written.* There is no earlier checkpoint"):
        train(model, folder, TINY, every=2, callbacks=[at_step(3, swap)])


def test_a_state_that_went_astray_does_not_replace_a_good_checkpoint(model, tmp_path):
    d = train(model, tmp_path, TINY.replace(steps=0))
    trainer, path = Trainer(d), tmp_path / "c.safetensors"
    trainer.save(path)
    with torch.no_grad():
        d.components["blocks.0.attn.W_Q"].U[0, 0] = torch.nan
    d.steps_done = 1
    with pytest.raises(SPDError, match=r"step 1: .*W_Q.U holds NaN.*The checkpoint of step 0 is kept"):
        trainer.save(path)
    assert steps_done(tmp_path) == 0


def killed_while_writing(path):
    """A process of its own that dies with its write half done."""
    child = os.fork()
    if not child:
        with replacing(path) as beside:
            beside.write_text("half")
            (beside.parent / ".tmpOfSafetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    for _ in range(3):
        killed_while_writing(path)
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_write_left_goes_before_room_is_looked_for(tmp_path):
    killed_while_writing(tmp_path / "a.json")
    check_writable(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_write_at_work_is_left_alone_and_waited_for(tmp_path):
    path = tmp_path / "a.json"
    second = threading.Thread(target=write_text, args=(path, "second"))
    with replacing(path) as beside:
        beside.write_text("first")
        check_writable(tmp_path, 10)
        second.start()
        second.join(0.2)
        assert second.is_alive() and beside.read_text() == "first"
    second.join(10)
    assert path.read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_checkpoint_cut_at_any_byte_is_refused(model, tmp_path):
    train(model, tmp_path, TINY)
    path = tmp_path / "c.safetensors"
    raw = path.read_bytes()
    for length in range(len(raw)):
        os.truncate(path, len(raw) - 1 - length)
        with pytest.raises(SPDError, match="no whole file"):
            Saved(path, Progress)
    with pytest.raises(SPDError, match="no whole file"):
        train(model, tmp_path, TINY)
    assert path.stat().st_size == 0  # for its owner to look at


@pytest.mark.parametrize("many", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_flipped_bit_changes_nothing_or_is_refused(model, tmp_path, many):
    train(model, tmp_path, TINY)
    path = tmp_path / "c.safetensors"
    raw = path.read_bytes()
    good = Saved(path, Progress)
    refused = Counter()

    @settings(max_examples=many, deadline=None, database=None, derandomize=True)
    @given(st.one_of(st.integers(0, 8 * len(raw) - 1), st.integers(0, 8 * 2000)))
    def run(bit):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        leaves = {name: torch.empty_like(value) for name, value in good.tensors.items()}
        try:
            saved = Saved(path, Progress)
            saved.copy_to(leaves)
        except SPDError as error:
            refused["checksum" if "checksum" in str(error) else "other"] += 1
            return
        assert saved.about == good.about and all(torch.equal(leaves[name], value) for name, value in good.tensors.items())

    run()
    assert refused["checksum"] > many / 4
