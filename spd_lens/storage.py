"""Folder ↔ decomposition, file ↔ training state. safetensors and JSON only: loading runs no code.

A decomposition's folder holds `decomposition.json` (config, sites, shapes) and `decomposition.safetensors` (every learned
tensor). Everything is written beside its place and renamed, so a reader sees the old or the new, never a half.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spd_lens.components import Components
from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.importance import build_importance
from spd_lens.losses import mean_squared_delta
from spd_lens.sites import find_sites, is_causal

FORMAT = 1
DESCRIPTION, TENSORS = "decomposition.json", "decomposition.safetensors"
SAME_MODEL = 1e-4  # how far the mean squared delta may be off, relative to the mean square of the weights


def check_writable(folder: Path, needed: int) -> None:
    """Make `folder` and try to keep `needed` bytes in it, before the work whose result is to go there.

    Raises:
        SPDError: the folder cannot be made, cannot be written to, or has no room.
    """
    probe = folder / f".spd-lens-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, needed))
    except OSError as error:
        free = f"; {shutil.disk_usage(folder).free / 1e6:.0f} MB are free" if folder.is_dir() else ""
        raise SPDError(f"{folder} cannot take the {needed / 1e6:.1f} MB that will be written there ({error.strerror}{free}). "
                       "Give another folder, or make room.") from error  # fmt: skip
    finally:
        with suppress(OSError):  # where the probe could not be made there is none
            probe.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` when all went well, removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise SPDError(f"{path} could not be written ({error}); what was there before is untouched.") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, {"spd_lens": json.dumps(about)})


def read_tensors(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["spd_lens"])
            if not isinstance(about, dict):
                raise ValueError("its description is no JSON object")
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise SPDError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise SPDError(f"{path} is no whole file of spd_lens ({error}); it was cut short, or made by another program.") from error


def save_decomposition(decomposition: Decomposition, folder: str | Path) -> Path:
    folder = Path(folder)
    sites = {
        name: {"subcomponents": decomposition.components[name].C, "d_in": site.d_in, "d_out": site.d_out,
               "mean_squared_weight": float(site.weight.double().square().mean()),
               "mean_squared_delta": _squared_delta(decomposition, name)}
        for name, site in decomposition.sites.items()
    }  # fmt: skip
    description = {"format": FORMAT, "steps_done": decomposition.steps_done, "context": context(decomposition),
                   "config": decomposition.config.to_json(), "sites": sites, "history": decomposition.history}  # fmt: skip
    identity = _identity(decomposition, description)
    write_tensors(folder / TENSORS, decomposition.state(), {"format": FORMAT, "identity": identity})
    write_text(folder / DESCRIPTION, json.dumps({**description, "identity": identity}, indent=1))
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


def load_decomposition(folder: str | Path, model: Any) -> Decomposition:
    """Read a saved decomposition of `model`.

    Raises:
        SPDError: a file is missing, cut short or not ours; the model lacks a site or has another shape (the leaf, the
            expected and the found shape are named); the folder was made from a model with other weights.
    """
    folder = Path(folder)
    description = _read_description(folder / DESCRIPTION)
    try:
        config = SPDConfig.from_json(description["config"])
        described, reach, identity = description["sites"], int(description["context"]), description["identity"]
        counts = {name: int(entry["subcomponents"]) for name, entry in described.items()}
        steps_done, history = int(description["steps_done"]), list(description["history"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SPDError(f"{folder / DESCRIPTION} is not as spd_lens writes it ({error!r}).") from error
    sites = find_sites(model, list(counts))
    for name, site in sites.items():
        _expect(f"{folder}: {name}", (described[name]["d_in"], described[name]["d_out"]), (site.d_in, site.d_out), "the model's matrix")
    device = next(iter(sites.values())).weight.device
    state, about = read_tensors(folder / TENSORS, device)
    if about.get("identity") != identity:
        raise SPDError(f"{folder}: {DESCRIPTION} and {TENSORS} belong to two different decompositions; save it again.")
    decomposition = _skeleton(model, sites, counts, config, reach)
    fill(decomposition, state, str(folder / TENSORS))
    decomposition.steps_done, decomposition.history = steps_done, history
    _expect_same_model(decomposition, described, folder)
    return decomposition


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SPDError(f"{path} does not exist; a decomposition is saved with decomposition.save(folder).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SPDError(f"{path} is no whole JSON file ({error}).") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise SPDError(f"{path} is not a decomposition of format {FORMAT}.")
    return description


def _skeleton(model: Any, sites: dict, counts: Mapping[str, int], config: SPDConfig, reach: int) -> Decomposition:
    """The modules of a decomposition, waiting for their numbers."""
    components, gates = {}, {}
    for name, site in sites.items():
        like = dict(dtype=site.weight.dtype, device=site.weight.device)
        C = counts[name]
        components[name] = Components(torch.zeros(site.d_in, C, **like), torch.zeros(C, site.d_out, **like))
        x, inner = torch.ones(1, 1, site.d_in, **like), torch.ones(1, 1, C, **like)
        generator = torch.Generator(site.weight.device)
        gates[name] = build_importance(
            config.importance, x, inner, config.gate_width, 0.0, 0.0, reach, is_causal(model), generator
        )  # fmt: skip
    return Decomposition(model, sites, components, gates, config)


def fill(decomposition: Decomposition, state: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors read from `source` into a decomposition: exactly its leaves, each of its shape, or an error that names one."""
    own = decomposition.state()
    for name in state.keys() - own.keys():
        raise SPDError(f"{source}: {name} belongs to no part of this decomposition.")
    for name, leaf in own.items():
        if name not in state:
            raise SPDError(f"{source}: {name} of shape {list(leaf.shape)} is missing.")
        _expect(f"{source}: {name}", leaf.shape, state[name].shape, "the file")
    for name, leaf in own.items():
        leaf.copy_(state[name])


def _expect(leaf: str, expected: Any, found: Any, where: str) -> None:
    if tuple(expected) != tuple(found):
        raise SPDError(f"{leaf}: expected shape {list(expected)}, found {list(found)} in {where}.")


def _expect_same_model(decomposition: Decomposition, described: Mapping[str, Any], folder: Path) -> None:
    for name in decomposition.sites:
        was = float(described[name]["mean_squared_delta"])
        now = _squared_delta(decomposition, name)
        size = float(described[name]["mean_squared_weight"])
        if not abs(now - was) <= SAME_MODEL * size:
            raise SPDError(
                f"{folder} was made from a model with other weights: the mean squared delta of {name} was {was:.2e} and is {now:.2e} "
                "here. Load the model that was decomposed (the same checkpoint, folded or unfolded as then)."
            )  # fmt: skip


def _squared_delta(decomposition: Decomposition, name: str) -> float:
    return float(mean_squared_delta({name: decomposition.sites[name]}, decomposition.components).detach())
