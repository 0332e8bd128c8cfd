"""Files from strangers: whatever is in them, loading runs nothing, takes no memory for it and ends well or in an SPDError."""

import json
import math
import os
import pickle
import resource
import struct
import sys
import time
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spd_lens import Decomposition, SPDConfig, SPDError, decompose
from spd_lens.schema import LONGEST
from spd_lens.training import Trainer
from tests import zoo

FEW, MANY = 150, 2600  # inputs of each of the four ways below, in the fast run and in the slow one
SPARE = 2 << 30  # bytes of address space that a load may take
SITES = ("blocks.0.attn.W_Q", "blocks.1.mlp.W_in")
CONFIG = SPDConfig(sites=SITES, subcomponents=5, gate_width=3, steps=2, batch_size=2)

NASTY = st.sampled_from(
    [None, True, False, "", "a", "6", "*", "blocks.*", "blocks.0.attn.W_K", "\ud800", "../../etc/passwd", "__import__('os')", [], {}, [[]],
     0, 1, 2, 4, 6, -1, 3.5, 1e300, math.nan, math.inf, -math.inf, 10**6, 10**9, 10**12, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 10**400,
     [0] * 50, {"points": 3}, {"points": [[0, 1]], "shape": []}, [[0, 10**400]], "attention", "scalar", "vector"]
)  # fmt: skip
HEADER = st.sampled_from(
    ["F64", "F16", "BF16", "F32", "I8", "U8", "I64", "BOOL", "F8_E5M2", "F8_E8M0", "F4", "C64", "X", [], [0], [-1], [1], [2**63], [2**32, 2**32],
     [0, 2**62], [0, 4], [4, 0], [0, 2**64 - 1], 0, -1, 2**64, None, "", {}, True, 1.5]
)  # fmt: skip


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """A folder with a small decomposition, and the checkpoint of the run that made it."""
    place = tmp_path_factory.mktemp("untrusted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decompose(model, zoo.tokens(4), CONFIG, progress=False, checkpoint=place / "c.safetensors").save(place / "saved")
        decompose(model, zoo.tokens(4), CONFIG.replace(steps=0), progress=False).save(place / "untrained")
    return place


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """More than `SPARE` is not to be had, so that asking for it shows."""
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10  # noqa: SIM115, PTH123
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def keys(tree):
    return list(tree) if isinstance(tree, dict) else list(range(len(tree)))


def spoilt(data, tree, nasty):
    """The tree with a few of its places replaced, taken out, renamed or given to another."""
    tree = deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        if not tree:
            break
        holder, last = tree, data.draw(st.sampled_from(keys(tree)))
        while isinstance(holder[last], (dict, list)) and holder[last] and data.draw(st.integers(0, 3)):
            holder = holder[last]
            last = data.draw(st.sampled_from(keys(holder)))
        how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add", "swap"]))
        if how == "replace":
            holder[last] = deepcopy(data.draw(nasty))
        elif how == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(deepcopy(data.draw(nasty)))
        elif how == "rename":
            holder[str(data.draw(nasty))] = holder.pop(last)
        elif how == "add":
            holder[str(data.draw(st.one_of(nasty, st.text())))] = deepcopy(data.draw(nasty))
        else:
            holder[last] = deepcopy(holder[data.draw(st.sampled_from(keys(holder)))])
    return tree


def spoilt_bytes(data, raw):
    """A few bytes changed, taken out or put in, mostly near the beginning, where the structure is."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(
            st.one_of(st.integers(0, min(9, len(raw) - 1)), st.integers(0, min(3000, len(raw) - 1)), st.integers(0, len(raw) - 1))
        )
        how = data.draw(st.sampled_from(["change", "flip", "cut", "insert"]))
        if how == "change":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 40))]
        else:
            raw[at:at] = data.draw(st.binary(max_size=9))
        if not raw:
            break
    return bytes(raw)


def opened(raw):
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def closed(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def spoilt_tensors(data, raw, nasty_about):
    """A safetensors file whose header, or whose description in the header, was changed by someone who knows the format."""
    header, tensors = opened(raw)
    if data.draw(st.booleans()):
        return closed(spoilt(data, header, HEADER), tensors)
    about = spoilt(data, json.loads(header["__metadata__"]["spd_lens"]), nasty_about)
    header["__metadata__"] = {"spd_lens": json.dumps(about)}  # without a checksum: it would tell too soon
    return closed(header, tensors)


def load_or_refuse(load):
    """What `load` gives, or None where it gives an SPDError that says something. Anything else is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load()
        except SPDError as error:
            assert str(error).encode("utf-8", "backslashreplace") and len(str(error)) < 5000
            return None


fuzzed = pytest.mark.parametrize("many", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def inputs(many):
    limits = settings(max_examples=many, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    return lambda run: limits(given(st.data())(run))


@pytest.fixture
def whole(place, model):
    state = Decomposition.load(place / "saved", model).state()
    return lambda d: d is None or (d.state().keys() == state.keys() and all(torch.equal(d.state()[n], state[n]) for n in state))


@fuzzed
def test_any_description(place, model, tmp_path, whole, many):
    (tmp_path / "decomposition.safetensors").write_bytes((place / "saved" / "decomposition.safetensors").read_bytes())
    good = (place / "saved" / "decomposition.json").read_text()
    tree, path = json.loads(good), tmp_path / "decomposition.json"

    @inputs(many)
    def run(data):
        if data.draw(st.integers(0, 3)):
            path.write_text(json.dumps(spoilt(data, tree, NASTY)))
        else:
            path.write_bytes(spoilt_bytes(data, good.encode()))
        assert whole(load_or_refuse(lambda: Decomposition.load(tmp_path, model)))

    run()


@fuzzed
def test_any_tensors(place, model, tmp_path, many):
    (tmp_path / "decomposition.json").write_bytes((place / "saved" / "decomposition.json").read_bytes())
    good, path = (place / "saved" / "decomposition.safetensors").read_bytes(), tmp_path / "decomposition.safetensors"

    @inputs(many)
    def run(data):
        path.write_bytes(spoilt_tensors(data, good, NASTY) if data.draw(st.integers(0, 3)) else spoilt_bytes(data, good))
        d = load_or_refuse(lambda: Decomposition.load(tmp_path, model))
        assert d is None or all(torch.isfinite(value).all() for value in d.state().values())

    run()


@fuzzed
def test_any_checkpoint(place, model, tmp_path, many):
    good, path = (place / "c.safetensors").read_bytes(), tmp_path / "c.safetensors"
    d = Decomposition.load(place / "untrained", model)
    d.config = CONFIG

    @inputs(many)
    def run(data):
        path.write_bytes(spoilt_tensors(data, good, NASTY) if data.draw(st.integers(0, 3)) else spoilt_bytes(data, good))
        trainer = Trainer(d)
        load_or_refuse(lambda: trainer.load(path))
        assert 0 <= d.steps_done <= CONFIG.steps and all(torch.isfinite(value).all() for value in d.state().values())

    run()


@fuzzed
def test_any_tensor_in_a_checkpoint(place, model, tmp_path, many):
    """A well-formed file, whose tensors have other names, types, shapes and values."""
    good, path = load_file(place / "c.safetensors"), tmp_path / "c.safetensors"
    about = {"spd_lens": opened((place / "c.safetensors").read_bytes())[0]["__metadata__"]["spd_lens"]}
    d = Decomposition.load(place / "untrained", model)
    d.config = CONFIG
    kinds = st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64])
    names = st.one_of(
        st.text(max_size=20), st.sampled_from(["optimiser.x.step", "optimiser.99.exp_avg", "optimiser.0.other", "optimiser.", "."])
    )

    @inputs(many)
    def run(data):
        tensors = dict(good)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(tensors)))
            how = data.draw(st.sampled_from(["type", "shape", "empty", "value", "remove", "rename"]))
            if how == "type":
                tensors[name] = tensors[name].to(data.draw(kinds))
            elif how == "shape":
                tensors[name] = tensors[name].reshape(-1, 1)[data.draw(st.integers(0, 1)) :].contiguous()
            elif how == "empty":
                tensors[name] = tensors[name].new_empty(data.draw(st.sampled_from([(0,), (0, 0), (0, 1 << 40)])))
            elif how == "value" and tensors[name].numel():
                tensors[name] = tensors[name].clone()
                at = data.draw(st.integers(0, tensors[name].numel() - 1))
                tensors[name].view(-1)[at] = torch.tensor(data.draw(st.integers(0, 255))).to(tensors[name].dtype)
            else:
                value = tensors.pop(name)
                tensors |= {} if how == "remove" else {data.draw(names): value}
        save_file(tensors, path, about)
        trainer = Trainer(d)
        load_or_refuse(lambda: trainer.load(path))

    run()


# --- by hand ---


@pytest.fixture
def folder(place, tmp_path):
    for name in ("decomposition.json", "decomposition.safetensors"):
        (tmp_path / name).write_bytes((place / "saved" / name).read_bytes())
    return tmp_path


def describe(folder, change):
    path = folder / "decomposition.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["sites"][SITES[0]].update(subcomponents=10**12), r"W_Q.V: expected shape .32, 1000000000000., found .32, 5."),
        (lambda d: [d["sites"][SITES[0]].update(subcomponents=2**53), d["config"].update(gate_width=2**53)], "beyond any memory"),
        (lambda d: d["sites"][SITES[0]].update(subcomponents=10**30), "has to be a whole number of at least 1"),
        (lambda d: d["sites"][SITES[0]].update(subcomponents=True), "subcomponents was given as True"),
        (lambda d: d["sites"][SITES[0]].update(mean_squared_weight=math.inf), "mean_squared_weight was given as inf"),
        (lambda d: d["sites"][SITES[0]].update(mean_squared_delta=-1), "mean_squared_delta was given as -1"),
        (lambda d: d.update(context=10**12), r"importance.relative: expected shape .1000000000000., found .11."),
        (lambda d: d["config"].update(gate_width=10**6), r"W_Q.importance.W_Q: expected shape .32, 1000000., found .32, 3."),
        (lambda d: d["config"].update(weights={"stochastic": {"points": [[0, {"points": 3}]]}}), "a schedule was given"),
        (lambda d: d["config"].update(importance="scalar"), "belongs to no part of this"),
        (lambda d: d.update(sites=3), "sites was given as 3; it has to be a mapping"),
        (lambda d: d.update(sites={}), "no pattern was given"),
        (lambda d: d["sites"].update({"*": d["sites"].pop(SITES[0])}), "no site matches '.' in this model"),
        (lambda d: d["sites"].update({"blocks.0.attn.W_[Q]": d["sites"].pop(SITES[0])}), "no site matches .* nearest: blocks.0.attn.W_Q"),
        (lambda d: d["sites"].update({"../../../etc/passwd": d["sites"].pop(SITES[0])}), "no site matches"),
        (lambda d: d["sites"].update({"\ud800": d["sites"].pop(SITES[0])}), r"no site matches '.ud800'"),
        (lambda d: d["sites"].update({"a" * (1 << 20): d["sites"].pop(SITES[0])}), "no site matches 'aaa"),
        (lambda d: d.update(steps_done="6"), "steps_done was given as '6'"),
        (lambda d: d.update(history={"step": 3}), "history was given as .* a list"),
        (lambda d: d.update(history=[3]), r"history.0. was given as 3"),
    ],
)
def test_a_description_that_lies(folder, model, change, message):
    describe(folder, change)
    with pytest.raises(SPDError, match=message) as caught:
        Decomposition.load(folder, model)
    assert str(folder) in str(caught.value) or "no pattern" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "no whole JSON"),
        ('{"a":' * 100_000, "no whole JSON"),
        ('{"format": 1, "format": 1}', "given twice"),
        ("[" + "1" * 5000 + "]", "no whole JSON"),
        ("\xff", "format 1"),
        ("null", "format 1"),
        ("", "no whole JSON"),
        (" " * (LONGEST + 1), "longer than 32 MiB"),
    ],
)
def test_a_text_that_is_no_description(folder, model, text, message):
    (folder / "decomposition.json").write_bytes(text.encode("latin-1") if text != "\xff" else b'"\xc3\xbf"')
    with pytest.raises(SPDError, match=message):
        Decomposition.load(folder, model)


def test_a_text_without_end_is_not_read_to_its_end(folder, model):
    with (folder / "decomposition.json").open("r+b") as file:
        file.truncate(4 << 30)  # a hole: it takes no room on the disk
    start = time.perf_counter()
    with pytest.raises(SPDError, match="longer than"):
        Decomposition.load(folder, model)
    assert time.perf_counter() - start < 5


def test_tensors_without_end_are_not_read_to_their_end(folder, model):
    path = folder / "decomposition.safetensors"
    header, data = opened(path.read_bytes())
    header[f"{SITES[0]}.more"] = {"dtype": "F32", "shape": [1 << 36], "data_offsets": [len(data), len(data) + (1 << 38)]}
    path.write_bytes(closed(header, data))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 38))
    start = time.perf_counter()
    with pytest.raises(SPDError, match=r"decomposition\.safetensors"):
        Decomposition.load(folder, model)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_another_type_of_number_is_named(folder, model, dtype):
    path = folder / "decomposition.safetensors"
    about, tensors = opened(path.read_bytes())[0]["__metadata__"], load_file(path)
    tensors[f"{SITES[0]}.U"] = tensors[f"{SITES[0]}.U"].to(dtype)
    save_file(tensors, path, about)
    with pytest.raises(SPDError, match=rf"blocks.0.attn.W_Q.U is {dtype} in the file; expected torch.float32"):
        Decomposition.load(folder, model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_neither_read_nor_written(folder, model, bad):
    path = folder / "decomposition.safetensors"
    header, tensors = opened(path.read_bytes())[0], load_file(path)
    tensors[f"{SITES[1]}.importance.mlps.b2"][1] = bad
    save_file(tensors, path, {"spd_lens": header["__metadata__"]["spd_lens"]})
    with pytest.raises(SPDError, match="W_in.importance.mlps.b2 holds NaN or infinite"):
        Decomposition.load(folder, model)


@pytest.mark.parametrize("name", ["decomposition.json", "decomposition.safetensors"])
@pytest.mark.parametrize("kind", ["link", "absolute link", "pipe", "folder", "loop"])
def test_what_is_no_file_of_the_folder(folder, model, tmp_path_factory, name, kind):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / name
    (folder / name).rename(elsewhere)
    match kind:
        case "link":
            (folder / name).symlink_to(os.path.relpath(elsewhere, folder))
        case "absolute link":
            (folder / name).symlink_to(elsewhere)
        case "pipe":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
        case "loop":
            (folder / name).symlink_to(name)
    expected = {"link": "out of its folder", "absolute link": "out of its folder", "loop": "does not exist|cannot be read"}
    with pytest.raises(SPDError, match=expected.get(kind, "is no file")):
        Decomposition.load(folder, model)


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, model, tmp_path_factory):
    (folder / "decomposition.json").rename(folder / "v2.json")
    (folder / "decomposition.json").symlink_to("v2.json")
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(folder)
    assert Decomposition.load(link, model).steps_done == 2


def test_a_planted_link_does_not_lead_a_write_out_of_the_folder(place, model, tmp_path):
    """Where a write puts its unfinished file, what is there is removed first: not through a link."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("")
    (tmp_path / "saved" / ".decomposition.json.spd-lens-unfinished").symlink_to(tmp_path / "mine")
    with pytest.raises(SPDError, match="could not be written"):
        Decomposition.load(place / "saved", model).save(tmp_path / "saved")
    assert (tmp_path / "mine" / "precious").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/spd-lens-was-here",)


seen: list[tuple[str, str]] = []  # what the interpreter did while `watching`
watching = [False]


def hook(event, arguments):
    if watching[0]:
        seen.append((event, str(arguments[0]) if arguments else ""))


def test_loading_runs_nothing_and_opens_nothing_else(folder, model):
    sys.addaudithook(hook)  # stays for the life of the process, hence the switch
    Decomposition.load(folder, model)  # what torch imports on first use, it has imported now
    watching[0] = True
    try:
        Decomposition.load(folder, model)
    finally:
        watching[0] = False
    assert {name for event, name in seen if event == "open"} == {str(folder / "decomposition.json")}  # safetensors opens its own
    assert not [
        event for event, _ in seen if event.split(".")[0] in ("exec", "compile", "import", "pickle", "subprocess", "socket", "ctypes")
    ]
    for bomb in (pickle.dumps(Evil()), pickle.dumps({f"{SITES[0]}.V": Evil()})):
        (folder / "decomposition.safetensors").write_bytes(bomb)
        with pytest.raises(SPDError, match="no whole file"):
            Decomposition.load(folder, model)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps_done=-1), "steps_done was given as -1"),
        (dict(steps_done=3), "is of step 3, of 2 in all"),
        (dict(steps_done="2"), "steps_done was given as '2'"),
        (dict(config=3), "config was given as 3"),
        (dict(config={}), "another config"),
        (dict(history=None), "history was given as None"),
        (dict(format=2), "format was given as 2; it has to be 1"),
    ],
)
def test_a_checkpoint_that_lies_about_itself(place, model, tmp_path, change, message):
    header, data = opened((place / "c.safetensors").read_bytes())
    header["__metadata__"] = {"spd_lens": json.dumps({**json.loads(header["__metadata__"]["spd_lens"]), **change})}
    (tmp_path / "c.safetensors").write_bytes(closed(header, data))
    with pytest.raises(SPDError, match=message):
        resumed(model, tmp_path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("generator.state", lambda t: t[:-1], r"generator.state: expected shape"),
        ("generator.state", lambda t: t.to(torch.int16), "generator.state is torch.int16"),
        ("generator.state", lambda t: torch.full_like(t, 7), "generator.state is no state of a generator"),
        ("generator.state", None, "generator.state of shape .* is missing"),
        ("optimiser.0.step", lambda t: t[None].clone(), r"optimiser.0.step: expected shape .., found .1."),
        ("optimiser.0.exp_avg", None, "optimiser.0.exp_avg of shape .* is missing"),
        ("optimiser.x.step", lambda t: torch.zeros(()), "'optimiser.x.step' belongs to no part of this; nearest: optimiser"),
        ("optimiser.999.step", lambda t: torch.zeros(()), "'optimiser.999.step' belongs to no part"),
        (f"adversary.{SITES[0]}", lambda t: t[:2].clone(), r"adversary.blocks.0.attn.W_Q: expected shape .5., found .2."),
        (f"adversary.{SITES[0]}", lambda t: t * math.nan, "adversary.blocks.0.attn.W_Q holds NaN"),
    ],
)
def test_a_checkpoint_with_another_tensor(place, model, tmp_path, name, change, message):
    good = place / "c.safetensors"
    tensors = load_file(good)
    value = tensors.pop(name, None)
    tensors |= {} if change is None else {name: change(value)}
    save_file(tensors, tmp_path / "c.safetensors", {"spd_lens": opened(good.read_bytes())[0]["__metadata__"]["spd_lens"]})
    with pytest.raises(SPDError, match=message):
        resumed(model, tmp_path)


def resumed(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decompose(model, zoo.tokens(4), CONFIG, progress=False, checkpoint=folder / "c.safetensors", resume=True)
