"""Platforms that the tests do not run on, by their rules: Windows' files, Apple's GPUs, which have no float64."""

import errno
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import spd_lens
from spd_lens import Decomposition, SPDConfig, SPDError, cli, decompose
from spd_lens.bench import bench_length
from spd_lens.bench import measure as bench
from spd_lens.guards import back, double
from spd_lens.storage import replacing, write_text
from spd_lens.tasks import induction
from tests import zoo

SHORT = SPDConfig(sites="blocks.*.mlp.*", steps=2, subcomponents=6, batch_size=2, gate_width=2, retire_at=())
pytestmark = pytest.mark.filterwarnings("ignore:.*subcomponents for a matrix of rank")

# --- Windows' files ---


def opened():
    """Files that this process has open or mapped into its memory."""
    handles = {os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()}
    return handles | {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}


@pytest.fixture
def windows(monkeypatch):
    """No locks of folders; `fsync` of what is open for writing alone, and of no folder; nothing is replaced or removed that is open."""
    fcntl = pytest.importorskip("fcntl")
    if not Path("/proc/self/maps").exists():
        pytest.skip("what is open is read from /proc")
    fsync = os.fsync

    def bring_to_disk(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def checked(function):
        def act(*paths, **options):
            for path in paths:
                if isinstance(path, (str, Path)) and os.path.realpath(path) in opened():
                    raise PermissionError(
                        errno.EACCES, "The process cannot access the file because it is being used by another process", str(path)
                    )
            return function(*paths, **options)

        return act

    monkeypatch.setattr(os, "fsync", bring_to_disk)
    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    monkeypatch.setattr("spd_lens.storage.fcntl", None)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    for name in ("O_DIRECTORY", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)


def test_the_rules_hold_here(windows, tmp_path):
    (tmp_path / "a").write_text("a")
    with (tmp_path / "a").open() as file:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fsync(file.fileno())
        with pytest.raises(PermissionError):
            (tmp_path / "b").replace(tmp_path / "a") if (tmp_path / "b").write_text("b") else None
    (tmp_path / "b").replace(tmp_path / "a")


def test_what_was_loaded_is_saved_over_itself(windows, tmp_path, model, tokens):
    d = decompose(model, tokens, SHORT, progress=False)
    d.save(tmp_path)
    for _ in range(2):
        d = Decomposition.load(tmp_path, model)
        d.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decomposition.json", "decomposition.safetensors"]


def test_a_training_goes_on_from_its_checkpoint_and_writes_over_it(windows, tmp_path, model, tokens):
    path = tmp_path / "c.safetensors"

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(model, tokens, SHORT, progress=False, checkpoint=path, checkpoint_every=1, callbacks=[stop])
    d = decompose(model, tokens, SHORT, progress=False, checkpoint=path, checkpoint_every=1, resume=True)
    assert d.steps_done == 2 and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_text_is_written_over_what_is_there_and_stays_where_it_cannot_be(windows, tmp_path):
    path = tmp_path / "ü.html"
    for text in ("eins ↵", "zwei δ"):
        write_text(path, text)
    assert path.read_text(encoding="utf-8") == "zwei δ"
    with path.open("rb"), pytest.raises(SPDError, match="being used by another process.*what was there before is untouched"):
        write_text(path, "drei")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "zwei δ" and len(list(tmp_path.iterdir())) == 1


def test_text_files_name_their_encoding():
    """Windows' own is another one."""
    for path in Path(spd_lens.__file__).parent.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            reads = (".read_text(" in line and "/proc/" not in line) or ".open()" in line or '.open("r")' in line
            assert not reads or "encoding=" in line, f"{path}:{number}"


def test_the_command_line_is_there_and_the_bench_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(bench, "resource", None)
    with pytest.raises(SPDError, match="does not tell how much memory"):
        bench_length(4)
    source = Path(bench.__file__).read_text(encoding="utf-8")
    scope = {"__name__": "again"}
    exec(compile(source, "measure", "exec"), scope)
    assert scope["resource"] is None


def test_a_table_goes_into_a_pipe_of_another_encoding(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    said = SimpleNamespace(call=lambda options, console: console.print("KL(original ‖ masked) δ"))
    monkeypatch.setattr(cli, "_parser", lambda: SimpleNamespace(parse_args=lambda arguments: said))
    monkeypatch.setattr("sys.stdout", out)
    cli.main([])
    out.flush()
    assert out.buffer.getvalue().strip() == b"KL(original ? masked) ?"


# --- Apple's GPUs ---


class AppleGPU(TorchFunctionMode):
    """Every tensor is on a device without float64, but for what `.cpu()` gave: that and what comes of it is on the CPU until `.to` moves it
    away. The two do not mix, single numbers apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [
            t for one in (*args, *kwargs.values()) for t in (one if isinstance(one, (list, tuple)) else [one]) if isinstance(t, Tensor)
        ]
        there = [t for t in given if getattr(t, "on_cpu", False)]
        if name == "double" and not there:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."
            )
        if there and name not in ("to", "copy_", "__get__") and any(t.ndim for t in given if not getattr(t, "on_cpu", False)):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!")
        found = func(*args, **kwargs)
        if name in ("cpu", "to"):
            found = found.view_as(found)  # not the tensor itself, where nothing was to be done
        moved = name == "to" and any(isinstance(one, torch.device) for one in (*args, *kwargs.values()))
        made_there = not given and kwargs.get("dtype") == torch.float64  # of a tensor's type and device, which was float64
        on_cpu = name == "cpu" or made_there or (bool(there) and not moved and name != "copy_")
        for one in found if isinstance(found, tuple) else [found]:
            if isinstance(one, Tensor):
                if one.dtype == torch.float64 and not on_cpu:
                    raise TypeError(f"{name} made a float64 tensor on a device that has none")
                one.on_cpu = on_cpu  # pyright: ignore
        return found


@pytest.fixture(scope="module")
def learnt():
    return decompose(zoo.native(), zoo.tokens(4), SHORT, progress=False)


def test_the_device_is_as_it_is_said():
    with AppleGPU():
        t = torch.ones(2, 2, device="cpu")
        for make in (lambda: t.double(), lambda: t.to(torch.float64), lambda: t + double(t), lambda: t + double(t).float()):
            with pytest.raises((TypeError, RuntimeError)):
                make()
        assert torch.equal(back(double(t) @ double(t), t), t @ t)


@pytest.mark.parametrize("init", ["fisher", "svd", "random"])
def test_decomposing_keeps_to_the_types_of_the_device(init):
    config = SHORT.replace(init=init, sites="blocks.0.mlp.*", subcomponents=32, retire_at=(0.5,))
    model, tokens = zoo.native(), zoo.tokens(4)
    wanted = decompose(model, tokens, config, progress=False).state()
    with AppleGPU():
        found = decompose(model, tokens, config, progress=False).state()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_a_targeted_one_too():
    config = SPDConfig.targeted(sites="blocks.0.mlp.W_in", steps=1, subcomponents=6, batch_size=2, gate_width=2)

    def learnt():
        return decompose(zoo.native(), zoo.tokens(2), config, background=zoo.tokens(4, seed=1), progress=False).state()

    wanted = learnt()
    with AppleGPU():
        found = learnt()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_what_is_done_with_a_decomposition_does(learnt, tmp_path):
    d, tokens, chosen = learnt, zoo.tokens(2), {"blocks.0.mlp.W_in": [1, 2], "blocks.1.mlp.W_out": [0]}

    def everything():
        hooks = {side: d.project_out(chosen, side) for side in ("input", "output")}
        logits = [d.model.run_with_hooks(tokens, fwd_hooks=hooks[side]) for side in hooks]
        logits.append(d.edited_model(chosen, set_output={("blocks.1.mlp.W_out", 1): [0.5] * 32})(tokens))
        again = Decomposition.load(d.save(tmp_path), d.model)
        return [*logits, *again.state().values()]

    wanted = everything()
    with AppleGPU():
        found = everything()
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_induction_circuit_is_diagnosed():
    test = induction.sequences(8, torch.Generator().manual_seed(1))
    d = decompose(induction.build_target(0), test.tokens, induction.config(steps=0), progress=False)

    def diagnosed():
        return repr(spd_lens.diagnose(d, test.tokens, test.positions, test.answers, induction.SPECIAL, draws=1))

    wanted = diagnosed()
    with AppleGPU():
        assert diagnosed() == wanted
