"""`spd-lens report`: parse, call, print."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.hub import load_model
from spd_lens.report import REPORT_BYTES, behind, induction_page, write_report
from spd_lens.report.model import MOST
from spd_lens.storage import check_writable, write_text
from spd_lens.tasks import athletes, entangled, facts, fruits, induction
from spd_lens.tasks.language import packed
from spd_lens.tokens import Batch

ABOUT = """One self-contained page about a saved decomposition: whether its count can be trusted, the circuit of a prompt, and every active
subcomponent with a card (what it reads and writes, where, its partners). It opens without a network.

FOLDER is what `spd-lens induction`, `facts` or `entangled` wrote with --out, which holds the model too; or what Decomposition.save wrote, of a model
of the hub: then name it with --model, and give text of the kind that it was learnt on with --text."""


LENGTH, SEQUENCES = 64, 64
TEXT = ("text", "length", "sequences")  # what says which text


def add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="a self-contained page about a saved decomposition", description=ABOUT,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the decomposition")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (FOLDER/report.html; of facts and entangled, whose report.html "
                        "holds their cuts, FOLDER/subcomponents.html)")  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="of the hub, as gpt2")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; documents are parted by empty lines")
    parser.add_argument("--length", type=int, help=f"tokens of a row of the text ({LENGTH})")
    parser.add_argument("--sequences", type=int, help=f"rows of the text that are looked at, at most, from its beginning ({SEQUENCES})")
    parser.add_argument("--prompt", help="whose circuit is drawn (the first row of the text)")
    parser.add_argument("--answer", help="the token whose logit the circuit is of (the model's own first choice)")
    parser.add_argument("--most", type=int, help=f"cards, at most ({MOST})")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(call=_call)


@dataclass(frozen=True)
class _Source:
    """A model and what is to be looked at; arguments of `write_report`."""

    model: Any
    page: str = "report.html"
    looked_at: Callable[[], dict[str, Any]] = field(default=dict)


def _call(options: argparse.Namespace, console: Console) -> None:
    for name, least in (("length", 2), ("sequences", 1), ("most", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise SPDError(f"--{name} was given as {given}; it has to be at least {least}.")
    folder = options.folder = options.folder.resolve()
    if folder.name == "decomposition" and options.model is None and (folder / "decomposition.json").exists():
        folder = options.folder = folder.parent
    place = folder if (folder / "decomposition.json").exists() else folder / "decomposition"
    if not (place / "decomposition.json").exists():
        raise SPDError(f"{folder} holds no decomposition (no decomposition.json there or in decomposition/); give a folder that Decomposition.save or "
                       "spd-lens induction, facts or entangled wrote.")  # fmt: skip
    if options.model is None and (target := _induction_target(folder, place)) is not None:
        _expect_unused(options, ("prompt", "answer", "most", *TEXT), "the page of the induction circuit")
        d = Decomposition.load(place, induction.load_target(target))
        out = options.out or folder / "report.html"
        check_writable(out.parent, REPORT_BYTES)
        write_text(out, induction_page(induction.measure(d, d.config.seed, _seconds(folder))))
    else:
        source = _source(options)
        d = Decomposition.load(place, source.model)
        looked_at = source.looked_at()
        if options.prompt is not None:
            looked_at["prompt"] = options.prompt
            looked_at.pop("answer", None)
        if options.answer is not None:
            looked_at["answer"] = _token(source.model, options.answer)
        out = write_report(d, path=options.out or folder / source.page, most=options.most or MOST, progress=not options.quiet, **looked_at)
    console.print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def _induction_target(folder: Path, place: Path) -> Path | None:
    """Of a run alone, or of one among several, which share the targets of their seeds."""
    found = folder / "target.safetensors"
    if not found.exists():
        try:
            seed = json.loads((place / "decomposition.json").read_text(encoding="utf-8"))["config"]["seed"]
        except (OSError, ValueError, KeyError, TypeError):  # Decomposition.load says what is wrong with it
            return None
        found = folder.parent / f"target-{seed}.safetensors"
    return found if found.exists() else None


def _seconds(folder: Path) -> dict[str, float]:
    """What the run took, where it says so; what is measured anew is timed anew."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["seconds_by_part"]
        return {part: float(seconds) for part, seconds in found.items() if part != "measuring"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _expect_unused(options: argparse.Namespace, names: Sequence[str], of: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise SPDError(f"--{name} was given, and {of} has no use for it; leave it out.")


def _source(options: argparse.Namespace) -> _Source:
    target = options.folder / "target"
    if options.model is not None:
        model = load_model(options.model)
        return _Source(model, looked_at=lambda: {"tokens": _rows(model, options)})
    if not target.exists():
        raise SPDError(
            f"{options.folder} holds no model beside the decomposition; name the one that it is of with --model, and give text with --text."
        )
    _expect_unused(options, TEXT, "a task that has prompts of its own")
    try:
        model, setting = athletes.load_target(target), facts.setting
    except SPDError as error:
        if "holds the target of the task" not in str(error):
            raise
        model, setting = fruits.load_target(target), entangled.setting
    return _Source(model, "subcomponents.html", lambda: _asked(setting(model, 0)))


def _asked(setting: Any) -> dict[str, Any]:
    """The prompts of a task, with the first one's circuit, and more text for contexts."""
    prompts = setting.prompts if isinstance(setting, facts.Setting) else setting.together.tokens
    first = next(iter(setting.asked.values()))
    return {"tokens": prompts, "prompt": first.tokens, "answer": int(first.answers[0]), "contexts": behind(prompts, setting.text)}


def _rows(model: Any, options: argparse.Namespace) -> Batch:
    if options.text is None:
        raise SPDError("no text was given; give a file with text of the kind that the decomposition was learnt on with --text.")
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SPDError(f"{options.text} cannot be read as UTF-8 text ({error}).") from error
    if model.tokenizer is None:
        raise SPDError(f"{options.model} came without a tokenizer, so --text cannot be read; use spd_lens.write_report with token ids.")
    length = min(options.length or LENGTH, model.cfg.n_ctx)
    rows = packed(model.tokenizer, [part for part in text.split("\n\n") if part.strip()], length)
    if not len(rows):
        raise SPDError(f"{options.text} holds fewer than {length} tokens, not one row; give more text, or a smaller --length.")
    return Batch(rows[: options.sequences or SEQUENCES])  # whole rows: none ends with padding


def _token(model: Any, text: str) -> int:
    ids = [] if model.tokenizer is None else model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise SPDError(f"--answer {text!r} is {len(ids)} tokens; give one, mind the space before a word.")
    return ids[0]
