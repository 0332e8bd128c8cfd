"""`spd-lens planted`: parse, call, print."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from spd_lens.errors import SPDError
from spd_lens.report import REPORT_BYTES, planted_page
from spd_lens.storage import check_writable, write_text
from spd_lens.tables import print_table
from spd_lens.tasks import planted


def add_planted(commands: Any) -> None:
    parser = commands.add_parser("planted", help="known pieces, put into models by hand: does a decomposition find them?", description=planted.__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/planted"), help="folder for report.html and results.json (%(default)s)")
    parser.add_argument("--cases", metavar="A,B", help=f"some of: {', '.join(planted.CASES)} (all)")
    parser.add_argument("--seed", type=int, default=0, help="the first: of the model and of its decomposition (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="this many seeds from --seed on (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (the recipe's)")
    parser.add_argument("--baselines", nargs="*", choices=planted.METHODS, default=list(planted.METHODS), metavar="METHOD",
                        help=f"what stands beside it, with the first seed: {', '.join(planted.METHODS)} (all)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(call=_planted)


def _planted(options: argparse.Namespace, console: Console) -> None:
    cases = planted.chosen(options.cases)
    if options.seeds < 1:
        raise SPDError(f"seeds was given as {options.seeds}; it has to be at least 1.")
    changes = {} if options.steps is None else {"steps": options.steps}
    planted.configs(planted.plant(cases[0], 0), options.seed, changes)  # refuses what is wrong with them before any work
    check_writable(options.out, REPORT_BYTES)
    results: dict[str, Any] = {}
    last = None
    for case in cases:
        runs = [(f"seed {seed}", seed, "pieces") for seed in range(options.seed, options.seed + options.seeds)]
        runs += [(method, options.seed, method) for method in options.baselines]
        results[case] = {"about": (planted.CASES[case].__doc__ or "").strip(), "seeds": [], "baselines": {}}
        for label, seed, method in runs:
            score = planted.run(case, seed, method, not options.quiet, **changes)
            if method == "pieces":
                results[case]["seeds"].append(score.results())
                last = score.recovery or last
            else:
                results[case]["baselines"][method] = score.results()
            found = f"{score.recovery.above} of {score.recovery.total} found" if score.recovery else "the truth is not identifiable"
            console.print(f"{case}, {label}: {found}; {score.active:.2f} active per position ({score.true_active:.2f} true); "
                          f"{score.verification.beside_a_count}; {score.seconds:.0f} s")  # fmt: skip
        write_text(options.out / "results.json", json.dumps(results, indent=1))
    table = planted.table(results)
    write_text(options.out / "report.html", planted_page(table, results, last))
    print_table(console, table, "Planted pieces: what comes back. Mean over seeds; KL in nats")
    console.print(f"See {options.out / 'report.html'}")
