"""`spd-lens`: parse, call, print."""

import argparse
import io
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from spd_lens.cli_bench import add_bench
from spd_lens.cli_facts import add_facts
from spd_lens.cli_planted import add_planted
from spd_lens.cli_report import add_report
from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError
from spd_lens.metrics import CHEAT
from spd_lens.ranks import Ranks, meet
from spd_lens.report import REPORT_BYTES, induction_page, study_page
from spd_lens.storage import check_writable, write_text
from spd_lens.tables import print_table
from spd_lens.tasks import induction, study
from spd_lens.training import decompose

WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Windows' own encodings lack ‖ and →: a mark in a table is not worth the run
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a log file has room for a table
        console.width = max(console.width, WIDTH)
    warnings.filterwarnings("ignore", module="transformer_lens")  # HookedTransformer's deprecation notice is not the reader's business
    try:
        options.call(options, console)
    except SPDError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {error}", markup=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spd-lens", description="Which piece of which weight does this?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    default = SPDConfig()

    toy = commands.add_parser("induction", help="take a transformer's induction circuit apart", description=induction.__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    toy.add_argument(
        "--out", type=Path, default=Path("out/induction"), help="folder for decomposition/, report.html, results.json (%(default)s)"
    )
    toy.add_argument("--seed", type=int, default=0, help="of the target and of the decomposition (%(default)s)")
    toy.add_argument("--steps", type=int, help=f"training steps ({default.steps}; the paper's: 100000)")
    toy.add_argument("--subcomponents", type=int, help=f"per matrix ({induction.WIDTH}; the paper's: 100)")
    toy.add_argument("--importance", choices=("attention", "vector", "scalar"), help="how causal importance is predicted (attention)")
    toy.add_argument("--paper", action="store_true", help="the settings of arXiv 2511.08854 to the letter (days on a CPU; mind --steps)")
    several = toy.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds", type=int, metavar="N", help="this many seeds from --seed on, a target and a decomposition each; one table"
    )
    several.add_argument("--without", nargs="*", metavar="PART",
                         help=f"the recipe whole, and without each of these parts (all of them): {', '.join(study.PARTS)}")  # fmt: skip
    several.add_argument("--vary", nargs="+", metavar=("SETTING", "VALUE"),
                         help="one number of SPDConfig at several values, or a loss at several times its weight")  # fmt: skip
    toy.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run in --out; of several runs, with "
                     "those that are not finished")  # fmt: skip
    toy.add_argument("--quiet", action="store_true", help="no progress bar")
    toy.set_defaults(call=_induction)

    add_facts(commands)
    add_planted(commands)
    add_report(commands)
    add_bench(commands)
    return parser


def _induction(options: argparse.Namespace, console: Console) -> None:
    changes = {name: getattr(options, name) for name in ("steps", "subcomponents", "importance") if getattr(options, name) is not None}
    config = SPDConfig.paper(**changes, seed=options.seed) if options.paper else induction.config(**changes, seed=options.seed)
    if options.seeds is not None:
        runs = study.over_seeds(options.seeds, config)
    elif options.without is not None:
        runs = study.without(options.without, config)
    elif options.vary is not None:
        runs = study.varied(options.vary[0], options.vary[1:], config)
    else:
        runs = {}
    ranks = meet(torch.device("cpu"))
    console.quiet = ranks.rank != 0
    ranks.only_first(lambda: check_writable(options.out, REPORT_BYTES * (1 + len(runs))))
    run = _Run(console, ranks, options.resume, not options.quiet)
    if not runs:
        if (outcome := run(options.out, options.out / "target.safetensors", config)) is not None:
            _tell(console, outcome, options.out)
        return
    found: dict[str, dict[str, float | int]] = {}
    for name, its_config in runs.items():
        folder = options.out / name.replace(" × ", "-x").replace(" ", "-")
        console.print(f"[bold]{name}[/]")
        figures = study.finished(folder / "results.json", its_config) if options.resume else None
        if figures is None and (outcome := run(folder, options.out / f"target-{its_config.seed}.safetensors", its_config)) is not None:
            figures = outcome.figures()
            console.print(f"{outcome.distinct['total']} distinct subcomponents; {outcome.verification.beside_a_count}")
        found[name] = figures or {}
    if ranks.rank == 0:
        table = study.table(found)
        write_text(options.out / "study.json", json.dumps(found, indent=1))
        write_text(options.out / "study.html", study_page(table, found))
        print_table(console, table, f"{len(found)} runs; KL in nats")
        console.print(f"See {options.out / 'study.html'}")


@dataclass
class _Run:
    """Train a target where there is none yet, decompose it, measure, and write it all down."""

    console: Console
    ranks: Ranks
    resume: bool
    progress: bool
    seconds_target: dict[Path, float] = field(default_factory=dict)  # of those made by this command

    def __call__(self, out: Path, target: Path, config: SPDConfig) -> induction.Outcome | None:
        """None on all ranks but the first, which alone measures and writes."""
        checkpoint = out / "checkpoint.safetensors"
        if checkpoint.exists() and not self.resume:
            raise SPDError(f"{checkpoint} is left from an interrupted run; go on from it with --resume, delete it, or give another --out.")
        self.ranks.only_first(lambda: self._make(target, config.seed))
        model, start = induction.load_target(target), time.perf_counter()
        self.console.print(f"decomposing its six Q, K, V matrices, {config.steps} steps of {config.batch_size} …")
        data = induction.batches(config.batch_size, config.seed + 100)
        try:
            decomposition = decompose(model, data, config, progress=self.progress, checkpoint=checkpoint, resume=self.resume)
        except KeyboardInterrupt:
            self.console.print(f"interrupted; the checkpoint is in {checkpoint}. Go on with the same command and --resume")
            raise
        if self.ranks.rank != 0:
            return None
        seconds = {"target": self.seconds_target.get(target, 0.0), "decomposition": time.perf_counter() - start}
        outcome = induction.measure(decomposition, config.seed, seconds)
        decomposition.save(out / "decomposition")
        write_text(out / "results.json", json.dumps(outcome.results(), indent=1))
        write_text(out / "report.html", induction_page(outcome))
        checkpoint.unlink(missing_ok=True)
        return outcome

    def _make(self, target: Path, seed: int) -> None:
        if target in self.seconds_target or (self.resume and target.exists()):
            return
        start = time.perf_counter()
        self.console.print(f"training the target (seed {seed}) …")
        induction.save_target(induction.train_target(seed), target, seed)
        self.seconds_target[target] = time.perf_counter() - start
        self.console.print(f"target ready after {self.seconds_target[target]:.0f} s")


def _tell(console: Console, outcome: induction.Outcome, out: Path) -> None:
    print_table(console, outcome.beside_paper(), "Active subcomponents (g > 0.5); in brackets the paper's, arXiv 2511.08854, Table 1")
    print_table(console, outcome.verification_table(), "Can the count be trusted? KL in nats, without the delta")
    print_table(console, outcome.diagnosis_table(), "Do they do what the circuit needs?")
    print_table(console, outcome.interventions_table().drop(columns="note"), "Proof: cut out of the original model; accuracy without …")
    if outcome.verification.leans_on_inactive:
        console.print(f"[bold red]warning:[/] {CHEAT}")
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in outcome.seconds.items())
    console.print(f"{sum(outcome.seconds.values()):.0f} s in all ({parts}). See {out / 'report.html'}")


if __name__ == "__main__":
    main()
