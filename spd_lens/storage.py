"""Folder ↔ decomposition, file ↔ training state. safetensors and JSON only: loading runs no code.

A decomposition's folder holds `decomposition.json` (config, sites, shapes) and `decomposition.safetensors` (every learned
tensor). Everything is written beside its place and renamed, so a reader sees the old or the new, never a half. What is read
may come from anyone: it is held against a schema and against the model, and only then is memory taken for it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_lens.components import Components, check_weight
from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import double, steady
from spd_lens.importance import build_importance
from spd_lens.losses import mean_squared_delta
from spd_lens.schema import LONGEST, Count, Natural, Size, brief, check, parse
from spd_lens.sites import find_sites, is_causal, site_names

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
DESCRIPTION, TENSORS = "decomposition.json", "decomposition.safetensors"
UNFINISHED = ".spd-lens-unfinished"  # ends the name of the folder that a file is written in
SAME_MODEL = 1e-4  # how far the mean squared delta may be off, relative to the mean square of the weights


class SiteEntry(TypedDict):
    subcomponents: Count
    d_in: Count
    d_out: Count
    mean_squared_weight: Size
    mean_squared_delta: Size


class Description(TypedDict):
    """`decomposition.json`, beside its `format`."""

    identity: str
    steps_done: Natural
    context: Count
    config: dict[str, Any]
    sites: dict[str, SiteEntry]
    history: list[dict[str, Any]]


class Belonging(TypedDict):
    """What `decomposition.safetensors` says about itself."""

    identity: str


# --- writing ---


def check_writable(folder: Path, needed: int) -> None:
    """Make `folder` and try to keep `needed` bytes in it, before the work whose result is to go there.

    Raises:
        SPDError: the folder cannot be made, cannot be written to, or has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{UNFINISHED}"):
            with suppress(OSError), _workshop(folder / left.name[1 : -len(UNFINISHED)], wait=False):
                pass  # what a killed process left there goes, and does not take the room
        with tempfile.TemporaryFile(dir=folder) as file:  # nameless: it goes with this process, however that ends
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, needed))
    except OSError as error:
        free = f"; {shutil.disk_usage(folder).free / 1e6:.0f} MB are free" if folder.is_dir() else ""
        raise SPDError(f"{folder} cannot take the {needed / 1e6:.1f} MB that will be written there ({error.strerror}{free}). "
                       "Give another folder, or make room.") from error  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder beside `path`; renamed to `path` when all went well, removed when not.

    Raises:
        SPDError: it could not be written; what `path` was before is untouched.
    """
    try:
        with _workshop(path) as folder:
            beside = folder / path.name
            yield beside
            with beside.open("r+b") as file:  # Windows brings to the disk what is open for writing alone
                os.fsync(file.fileno())
            beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise SPDError(f"{path} could not be written ({error}); what was there before is untouched.") from error


@contextmanager
def _workshop(path: Path, wait: bool = True) -> Iterator[Path]:
    """A folder beside `path` for this process alone, empty at first, gone at the end.

    A killed process leaves it behind, and in it files under names that only safetensors knows; they go when it is entered
    again. The lock ends with its process, and so tells what was left from what is being written: another writer waits, or gets a BlockingIOError.
    """
    folder = path.with_name(f".{path.name}{UNFINISHED}")
    handle = _locked(folder, wait)
    try:
        for left in folder.iterdir():
            left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _locked(folder: Path, wait: bool) -> int | None:
    """The folder, made and held; None on a system without such locks (Windows)."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # no link: files are removed in there
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:  # a file system without locks: two writers end in an error, not in a mixture
            return handle
        with suppress(FileNotFoundError):  # the one before us removes it at its end
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file of tensors and a JSON object about them.

    Raises:
        SPDError: a tensor holds NaN or infinity, which would not be read again; or the file could not be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    _expect_finite(tensors, path)
    text = _dumps(about, path)
    with replacing(path) as beside:
        save_file(tensors, beside, {"spd_lens": text, "crc32": _checksum(text, tensors)})


def _dumps(about: Mapping[str, Any], path: Path, indent: int | None = None) -> str:
    text = json.dumps(about, indent=indent)
    if len(text) > LONGEST:
        raise SPDError(f"{path} would hold {len(text) >> 20} MiB of JSON and could not be read again; shorten the history.")
    return text


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of every bit that is read back: a disk's error shows, where a changed weight would not."""
    crc = zlib.crc32(text.encode())
    for name, value in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


# --- reading ---


class Saved:
    """A file that `write_tensors` wrote, or that pretends to be one: nothing in it is believed before `copy_to` has checked it.

    Attributes:
        about: the JSON object, of the `kind` asked for.
        tensors: by name, on the CPU; their memory is the file's until they are copied.
    """

    def __init__(self, path: Path, kind: Any):
        _expect_file(path)
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
            raise SPDError(f"{path} is no whole file of spd_lens ({error}); it was cut short, or made by another program.") from error
        self._text, self._crc = metadata.get("spd_lens", ""), metadata.get("crc32")
        with reading(path):
            self.about = parse(self._text, "its description")
            check("its description", self.about, kind)

    def expect(self, leaves: Mapping[str, Tensor]) -> None:
        """Exactly these leaves, each of its shape and type.

        Raises:
            SPDError: one is missing, of another shape or type, or belongs to nothing; it is named.
        """
        for name in self.tensors.keys() - leaves.keys():
            raise SPDError(f"{self.path}: {brief(name)} belongs to no part of this; {nearest(name, leaves)}.")
        for name, leaf in leaves.items():
            if name not in self.tensors:
                raise SPDError(f"{self.path}: {name} of shape {list(leaf.shape)} is missing.")
            found = self.tensors[name]
            expect_shape(f"{self.path}: {name}", leaf.shape, found.shape, "the file")
            if found.dtype != leaf.dtype:
                raise SPDError(f"{self.path}: {name} is {found.dtype} in the file; expected {leaf.dtype}.")

    @torch.no_grad()
    def copy_to(self, leaves: Mapping[str, Tensor]) -> None:
        """Copy into exactly these leaves; nothing is copied where `expect`, the checksum or a NaN objects."""
        self.expect(leaves)
        if self._crc not in (None, _checksum(self._text, self.tensors)):
            raise SPDError(f"{self.path} is damaged: its checksum is not that of its contents. Take a copy of it, or make it anew.")
        _expect_finite(self.tensors, self.path)
        for name, leaf in leaves.items():
            leaf.copy_(self.tensors[name])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors about what a file holds, with the file's name."""
    try:
        yield
    except SPDError as error:
        raise SPDError(f"{path} is not as spd_lens writes it: {error}") from error


def _expect_file(path: Path, hint: str = "") -> None:
    """A file of its folder, and no link out of it, pipe or device that pretends to be one."""
    try:
        if not path.exists():
            raise SPDError(f"{path} does not exist{hint}.")
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise SPDError(f"{path} is a link out of its folder, to {path.resolve()}; copy the file itself to where the link is.")
        if not path.is_file():
            raise SPDError(f"{path} is no file.")
    except OSError as error:
        raise SPDError(f"{path} cannot be read ({error}).") from error


def _expect_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SPDError(f"{path}: {name} holds NaN or infinite entries, from a training that went astray.")


def expect_shape(leaf: str, expected: Any, found: Any, where: str) -> None:
    if tuple(expected) != tuple(found):
        raise SPDError(f"{leaf}: expected shape {list(expected)}, found {list(found)} in {where}.")


# --- decompositions ---


def save_decomposition(decomposition: Decomposition, folder: str | Path) -> Path:
    folder = Path(folder)
    sites = {
        name: {"subcomponents": decomposition.components[name].C, "d_in": site.d_in, "d_out": site.d_out,
               "mean_squared_weight": float(double(site.weight).square().mean()),
               "mean_squared_delta": _squared_delta(decomposition, name)}
        for name, site in decomposition.sites.items()
    }  # fmt: skip
    description = {"format": FORMAT, "steps_done": decomposition.steps_done, "context": context(decomposition),
                   "config": decomposition.config.to_json(), "sites": sites, "history": decomposition.history}  # fmt: skip
    identity = _identity(decomposition, description)
    write_tensors(folder / TENSORS, decomposition.state(), {"format": FORMAT, "identity": identity})
    write_text(folder / DESCRIPTION, _dumps({**description, "identity": identity}, folder / DESCRIPTION, indent=1))
    return folder


def _identity(decomposition: Decomposition, description: Mapping[str, Any]) -> str:
    """Both files carry it: a crash between the two renames cannot mix two decompositions. It follows from what is written, since every
    process of a training may save its copy into the same folder."""
    digest = hashlib.blake2b(json.dumps(description).encode(), digest_size=8)
    for value in decomposition.state().values():
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def context(decomposition: Decomposition) -> int:
    """Positions that the learned encodings of attention importance reach."""
    return max((getattr(gate, "context", 1) for gate in decomposition.gates.values()), default=1)


@steady()
def load_decomposition(folder: str | Path, model: Any) -> Decomposition:
    """Read a saved decomposition of `model`.

    Raises:
        SPDError: a file is missing, cut short or not ours; the model lacks a site or has another shape (the leaf, the
            expected and the found shape are named); the folder was made from a model with other weights.
    """
    if not isinstance(folder, (str, os.PathLike)) or isinstance(model, (str, os.PathLike)):
        raise SPDError(
            f"load was given a {type(folder).__name__} as the folder and a {type(model).__name__} as the model; it is load(folder, model)."
        )
    folder = Path(folder)
    description = _read_description(folder / DESCRIPTION)
    described, available = description["sites"], site_names(model)
    with reading(folder / DESCRIPTION):
        config = SPDConfig.from_json(description["config"])
    for name in described:  # which find_sites would take for a pattern
        if name not in available:
            raise SPDError(f"{folder}: no site matches {brief(name)} in this model; {nearest(name, available)}.")
    sites = find_sites(model, list(described))
    for name, site in sites.items():
        check_weight(site)
        was = described[name]
        expect_shape(f"{folder}: {name}", (was["d_in"], was["d_out"]), (site.d_in, site.d_out), "the model's matrix")
    saved = Saved(folder / TENSORS, Belonging)
    if saved.about["identity"] != description["identity"]:
        raise SPDError(f"{folder}: {DESCRIPTION} and {TENSORS} belong to two different decompositions; save it again.")
    counts = {name: entry["subcomponents"] for name, entry in described.items()}
    with reading(folder / DESCRIPTION):
        decomposition = _skeleton(model, sites, counts, config, description["context"])
    saved.expect(decomposition.state())
    for name, site in sites.items():
        decomposition.components[name].to_empty(device=site.weight.device)
        decomposition.gates[name].to_empty(device=site.weight.device)
    saved.copy_to(decomposition.state())
    decomposition.steps_done, decomposition.history = description["steps_done"], description["history"]
    _expect_same_model(decomposition, described, folder)
    return decomposition


def _read_description(path: Path) -> Description:
    _expect_file(path, "; a decomposition is saved with decomposition.save(folder)")
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise SPDError(f"{path} cannot be read ({error}).") from error
    description = parse(text, str(path))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise SPDError(f"{path} is not a decomposition of format {FORMAT}.")
    with reading(path):
        check("the description", description, Description)
    return description  # pyright: ignore


def _skeleton(model: Any, sites: dict, counts: Mapping[str, int], config: SPDConfig, reach: int) -> Decomposition:
    """The modules of a decomposition, with shapes and no memory: the sizes are a stranger's until a file has been held against them."""
    components, gates = {}, {}
    for name, site in sites.items():
        C = counts[name]
        like: dict[str, Any] = dict(dtype=site.weight.dtype, device="meta")
        try:
            components[name] = Components(torch.empty(site.d_in, C, **like), torch.empty(C, site.d_out, **like))
            x, inner = torch.empty(1, 1, site.d_in, **like), torch.empty(1, 1, C, **like)
            gates[name] = build_importance(
                config.importance, x, inner, config.gate_width, 0.0, 0.0, reach, is_causal(model), torch.Generator()
            )  # fmt: skip
        except RuntimeError as error:
            raise SPDError(
                f"{name}: {C} subcomponents, gate_width {config.gate_width} and context {reach} are beyond any memory."
            ) from error
    return Decomposition(model, sites, components, gates, config)


def _expect_same_model(decomposition: Decomposition, described: Mapping[str, Any], folder: Path) -> None:
    for name in decomposition.sites:
        was, size = described[name]["mean_squared_delta"], described[name]["mean_squared_weight"]
        now = _squared_delta(decomposition, name)
        if not abs(now - was) <= SAME_MODEL * size:
            raise SPDError(
                f"{folder} was made from a model with other weights: the mean squared delta of {name} was {was:.2e} and is {now:.2e} "
                "here. Load the model that was decomposed (the same checkpoint, folded or unfolded as then)."
            )  # fmt: skip


def _squared_delta(decomposition: Decomposition, name: str) -> float:
    return float(mean_squared_delta({name: decomposition.sites[name]}, decomposition.components).detach())
