"""`spd-lens`: parse, call, print."""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from spd_lens.cli_bench import add_bench
from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError
from spd_lens.metrics import CHEAT
from spd_lens.ranks import meet
from spd_lens.report import REPORT_BYTES, induction_page
from spd_lens.storage import check_writable, write_text
from spd_lens.tasks import induction
from spd_lens.training import decompose

WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> None:
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
    toy.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted run in --out")
    toy.add_argument("--quiet", action="store_true", help="no progress bar")
    toy.set_defaults(call=_induction)

    add_bench(commands)
    return parser


def _induction(options: argparse.Namespace, console: Console) -> None:
    started, out = time.perf_counter(), options.out
    changes = {name: getattr(options, name) for name in ("steps", "subcomponents", "importance") if getattr(options, name) is not None}
    config = SPDConfig.paper(**changes, seed=options.seed) if options.paper else induction.config(**changes, seed=options.seed)
    ranks = meet(torch.device("cpu"))
    console.quiet = ranks.rank != 0
    ranks.only_first(lambda: check_writable(out, REPORT_BYTES))
    target, checkpoint = out / "target.safetensors", out / "checkpoint.safetensors"
    if checkpoint.exists() and not options.resume:
        raise SPDError(f"{checkpoint} is left from an interrupted run; go on from it with --resume, delete it, or give another --out.")

    def make_target() -> None:
        if options.resume and target.exists():
            return
        console.print(f"training the target (seed {options.seed}) …")
        induction.save_target(induction.train_target(options.seed), target, options.seed)

    ranks.only_first(make_target)
    model = induction.load_target(target)
    start = time.perf_counter()
    console.print(
        f"target ready after {start - started:.0f} s; decomposing its six Q, K, V matrices, {config.steps} steps of {config.batch_size} …"
    )
    data = induction.batches(config.batch_size, options.seed + 100)
    try:
        decomposition = decompose(model, data, config, progress=not options.quiet, checkpoint=checkpoint, resume=options.resume)
    except KeyboardInterrupt:
        console.print(f"interrupted; the checkpoint is in {checkpoint}. Go on with: spd-lens induction --out {out} --resume")
        raise
    if ranks.rank != 0:  # the first measures and writes
        return
    outcome = induction.measure(decomposition, options.seed, started, time.perf_counter() - start)
    decomposition.save(out / "decomposition")
    write_text(out / "results.json", json.dumps(outcome.results(), indent=1))
    write_text(out / "report.html", induction_page(outcome))
    checkpoint.unlink(missing_ok=True)

    _print(console, outcome.beside_paper(), "Active subcomponents (g > 0.5); in brackets the paper's, arXiv 2511.08854, Table 1")
    _print(console, outcome.verification_table(), "Can the count be trusted? KL in nats, without the delta")
    for edge, value in outcome.attention.items():
        console.print(f"attention {edge}: {value['original']:.3f} in the original, {value['hard']:.3f} with hard masks")
    cut = ", ".join(f"{site} {value:.3f}" for site, value in outcome.ablated.items())
    console.print(f"accuracy {outcome.target_accuracy:.4f}; with the active subcomponents of one site cut out of the original: {cut}")
    if outcome.verification.leans_on_inactive:
        console.print(f"[bold red]warning:[/] {CHEAT}")
    console.print(
        f"{outcome.seconds:.0f} s in all, {outcome.seconds_decomposition:.0f} s of it the decomposition. See {out / 'report.html'}"
    )


def _print(console: Console, frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(str(frame.index.name or ""), no_wrap=True)
    for column in frame.columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    for row, values in frame.iterrows():
        table.add_row(str(row), *map(str, values))
    console.print(table)


if __name__ == "__main__":
    main()
