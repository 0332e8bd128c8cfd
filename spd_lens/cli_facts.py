"""`spd-lens facts` and `spd-lens entangled`: parse, call, print."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.hub import load_model
from spd_lens.report import REPORT_BYTES, cuts_study_page, entangled_page, facts_page
from spd_lens.sites import find_sites
from spd_lens.storage import check_writable, write_text
from spd_lens.tables import print_table
from spd_lens.tasks import athletes, entangled, facts, fruits, study

NUMBERS = 40  # of a subcomponent, for the room that its decomposition takes


def add_facts(commands: Any) -> None:
    parser = _command(commands, "facts", facts.__doc__, "golf and basketball: cut a fact out of a language model, or exchange two")
    parser.add_argument("--prompts", choices=("two", "whole"), default="two",
                        help="decompose on the two sentences of the paper, or on one about every athlete that is not held out (%(default)s)")  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="a model of the hub, as gpt2, instead of a target trained here")
    parser.set_defaults(task=_Task(world=athletes, run=_run_facts, goals=facts.goals, page=facts_page, tell=_tell_facts))
    parser = _command(
        commands, "entangled", entangled.__doc__, '"red apple": a concept spread over several tokens, told from its parts and cut alone'
    )
    parser.set_defaults(
        model=None, task=_Task(world=fruits, run=_run_entangled, goals=entangled.goals, page=entangled_page, tell=_tell_entangled)
    )


def _command(commands: Any, name: str, description: str | None, summary: str) -> argparse.ArgumentParser:
    default = SPDConfig.targeted()
    parser = commands.add_parser(name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out") / name,
                        help="folder for decomposition/, target/, report.html, results.json (%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the target, the held-out half and the decomposition (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="this many seeds from --seed on, a target and a decomposition each; one table"
    )
    parser.add_argument("--steps", type=int, help=f"training steps of the decomposition ({default.steps})")
    parser.add_argument("--subcomponents", type=int, help=f"per matrix ({default.subcomponents})")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of an interrupted run: the target, the checkpoint, the "
                        "decomposition; of several runs, go on with those that are not finished")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(call=_call)
    return parser


@dataclass(frozen=True)
class _Task:
    """What the two commands do not share: a world with its target, the experiment, the page, the tables."""

    world: Any
    run: Callable[..., Any]
    goals: Callable[..., dict[str, tuple[str, str, str]]]
    page: Callable[..., str]
    tell: Callable[[Console, Any], None]


def _call(options: argparse.Namespace, console: Console) -> None:
    changes = {name: getattr(options, name) for name in ("steps", "subcomponents") if getattr(options, name) is not None}
    config, task = SPDConfig.targeted(**changes, seed=options.seed), options.task
    check_writable(options.out, REPORT_BYTES * (1 + (options.seeds or 0)))
    if options.seeds is None:
        outcome = _run(options.out, config, options, console)
        task.tell(console, outcome)
        parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in outcome.seconds.items())
        console.print(f"{sum(outcome.seconds.values()):.0f} s in all ({parts}). See {options.out / 'report.html'}")
        return
    found: dict[str, dict[str, float | int]] = {}
    for name, its_config in study.over_seeds(options.seeds, config).items():
        folder = options.out / name.replace(" ", "-")
        console.print(f"[bold]{name}[/]")
        figures = study.finished(folder / "results.json", its_config) if options.resume else None
        found[name] = figures or _run(folder, its_config, options, console).figures()
    table = study.table(found, task.goals(found))
    write_text(options.out / "study.json", json.dumps(found, indent=1))
    write_text(options.out / "study.html", cuts_study_page(table, found))
    print_table(console, table, "Over seeds; beside them what arXiv 2511.08854 reports, and what we set out to reach")
    console.print(f"See {options.out / 'study.html'}")


def _run(out: Path, config: SPDConfig, options: argparse.Namespace, console: Console) -> Any:
    """Train a target where there is none yet, decompose it, measure, and write it all down."""
    task, checkpoint = options.task, out / "checkpoint.safetensors"
    if checkpoint.exists() and not options.resume:
        raise SPDError(f"{checkpoint} is left from an interrupted run; go on from it with --resume, delete it, or give another --out.")
    start = time.perf_counter()
    if options.model is not None:
        model = load_model(options.model, "leave --model out, and a target is trained here")
    elif options.resume and (out / "target").exists():
        model = task.world.load_target(out / "target")
    else:
        console.print(f"training the target (seed {config.seed}) …")
        model = task.world.train_target(config.seed, progress=not options.quiet)
        (out / "target").mkdir(parents=True, exist_ok=True)
        task.world.save_target(model, out / "target", config.seed)
    target = time.perf_counter() - start
    learnt = _learnt(out / "decomposition", model, config) if options.resume and not checkpoint.exists() else None
    check_writable(out, 12 * NUMBERS * sum(site.d_in + site.d_out for site in find_sites(model).values()))
    try:
        outcome = task.run(options, model, config, {"target": target}, progress=not options.quiet, say=console.print,
                           learnt=learnt, checkpoint=checkpoint, resume=options.resume)  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"interrupted; the checkpoint is in {checkpoint}. Go on with the same command and --resume")
        raise
    if learnt is None:
        outcome.decomposition.save(out / "decomposition")
    write_text(out / "results.json", json.dumps(outcome.results(), indent=1))
    write_text(out / "report.html", task.page(outcome))
    checkpoint.unlink(missing_ok=True)
    return outcome


def _learnt(folder: Path, model: Any, config: SPDConfig) -> Decomposition | None:
    """The decomposition that an earlier run left.

    Raises:
        SPDError: it was learnt otherwise than is asked now.
    """
    if not folder.exists():
        return None
    found = Decomposition.load(folder, model)
    if found.config != config:
        different = [name for name, value in found.config.to_json().items() if value != config.to_json()[name]]
        raise SPDError(f"{folder} was learnt with other {', '.join(different)}; give the same, leave --resume out, or give another --out.")
    return found


def _run_facts(options: argparse.Namespace, *given: Any, **more: Any) -> facts.Outcome:
    return facts.run(*given, whole=options.prompts == "whole", **more)


def _run_entangled(options: argparse.Namespace, *given: Any, **more: Any) -> entangled.Outcome:
    return entangled.run(*given, **more)


def _tell_facts(console: Console, outcome: facts.Outcome) -> None:
    print_table(console, outcome.suppression_table(), "Cut out of the original weights; beside it arXiv 2511.08854 on GPT-2-small")
    print_table(console, outcome.comparison_table(), "The same cut of other things")
    print_table(console, outcome.swap_table(), "Two output directions exchanged at a time: athletes exchange sports")
    print_table(console, outcome.verification_table(), "Can the decomposition be trusted? On the prompts; KL in nats, without the delta")
    for concept, frame in outcome.described.items():
        print_table(console, frame, f"What was cut for {concept}")


def _tell_entangled(console: Console, outcome: entangled.Outcome) -> None:
    print_table(console, outcome.told_apart_table(), "Subcomponents active (g > 0.5) on each prompt")
    print_table(console, outcome.cut_table(), "Cut alone, out of the original weights")
    print_table(console, outcome.cut_list(), "What was cut")
    print_table(console, outcome.verification_table(), "Can the decomposition be trusted? On the prompts; KL in nats, without the delta")
