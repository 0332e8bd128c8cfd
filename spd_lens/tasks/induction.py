"""The induction toy of arXiv 2511.08854, section 4: data, target model, known answer.

1. Data: 64 uniform random tokens; the special token s at a random position (s1) and again at the last (s2). At s2 the model has
   to say m, the token that followed the first s.
2. Target: 2 attention-only layers of 1 head, d_model = d_head = 16, no LayerNorm, no biases, shortformer positions (learned
   vectors that enter the inputs of W_Q and W_K only).
3. Answer: layer 0 lets m attend to s1, so m learns "I follow s" (Q0, K0, V0); layer 1 lets s2 find it and copies m (Q1, K1, V1).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from spd_lens import masks
from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.diagnostics import Diagnosis, diagnose
from spd_lens.errors import SPDError
from spd_lens.guards import reproducible, seeded, steady
from spd_lens.labels import name_tokens, token_labels
from spd_lens.metrics import LABELS, Verification, census, verify
from spd_lens.schema import Natural
from spd_lens.storage import Saved, write_tensors

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4.x
    HookedTransformer = HookedTransformerConfig = None

VOCABULARY, SPECIAL, CONTEXT, WIDTH, LAYERS = 128, 127, 64, 16, 2
SITES = ("blocks.*.attn.W_[QKV]",)
DIAGNOSED = 512  # sequences: dozens of cuts are run on them
ENOUGH = 0.996  # accuracy of a target worth decomposing
RATE, FORMED = 5e-3, 0.1  # learning rate; smoothed loss at which the circuit is there
DECAY, SIMPLIFYING = 0.2, 0.3  # weight decay until the circuit has formed, and after
HOLD, ANNEAL, PATIENCE, ATTEMPTS = 1500, 400, 1500, 5

PAPER = {  # arXiv 2511.08854, Table 1: mean active at s1, m, s2 and a random position; distinct ones ever active
    "Q0": {"s1": 0.000, "m": 1.000, "s2": 0.000, "random": 0.001, "distinct": 1},
    "K0": {"s1": 1.000, "m": 0.050, "s2": 0.000, "random": 0.183, "distinct": 1},
    "V0": {"s1": 1.000, "m": 0.000, "s2": 0.000, "random": 0.000, "distinct": 1},
    "Q1": {"s1": 0.000, "m": 0.000, "s2": 1.000, "random": 0.000, "distinct": 1},
    "K1": {"s1": 0.000, "m": 1.000, "s2": 0.000, "random": 0.000, "distinct": 1},
    "V1": {"s1": 0.000, "m": 5.053, "s2": 0.000, "random": 0.000, "distinct": 11},
}
OWN_POSITION = {"Q0": "m", "K0": "s1", "V0": "s1", "Q1": "s2", "K1": "m", "V1": "m"}


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences and where to look in them.

    Attributes:
        tokens: `[N, 64]`.
        positions: `s1`, `m`, `s2`, and `random` (any other), each `[N]`.
        answers: `[N]`, the token to be predicted at s2.
    """

    tokens: Int[Tensor, "N s"]
    positions: dict[str, Int[Tensor, " N"]]
    answers: Int[Tensor, " N"]

    @property
    def s_first(self) -> Tensor:
        """Sequences that begin with s: there s can attend to itself alone, and layer 1's idle gates fire."""
        return self.positions["s1"] == 0

    def select(self, rows: Tensor) -> "Sequences":
        return Sequences(self.tokens[rows], {k: v[rows] for k, v in self.positions.items()}, self.answers[rows])


def sequences(many: int, generator: torch.Generator) -> Sequences:
    """This many sequences `[N, 64]` of uniform random tokens, with s at a random position and again at the last."""
    device = generator.device
    tokens = torch.randint(SPECIAL, (many, CONTEXT), generator=generator, device=device)
    rows = torch.arange(many, device=device)
    s1 = torch.randint(CONTEXT - 2, (many,), generator=generator, device=device)
    tokens[rows, s1] = SPECIAL
    tokens[:, -1] = SPECIAL
    others = torch.rand(many, CONTEXT, generator=generator, dtype=torch.float32, device=device)
    for taken in (s1, s1 + 1, torch.full_like(s1, CONTEXT - 1)):
        others[rows, taken] = -1.0
    positions = {"s1": s1, "m": s1 + 1, "s2": torch.full_like(s1, CONTEXT - 1), "random": others.argmax(1)}
    return Sequences(tokens, positions, tokens[rows, s1 + 1])


def batches(size: int, seed: int) -> Iterator[Int[Tensor, "b s"]]:
    """Endless fresh data, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sequences(size, generator).tokens


@steady()
def build_target(seed: int, bridge: bool = HookedTransformer is None) -> Any:
    """The untrained target: a `HookedTransformer`, or (always on transformer-lens 4.x) a native `TransformerBridge`."""
    shape: dict[str, Any] = dict(n_layers=LAYERS, d_model=WIDTH, n_heads=1, d_head=WIDTH, d_vocab=VOCABULARY, n_ctx=CONTEXT,
                                 attn_only=True, normalization_type=None)  # fmt: skip
    with seeded(seed):
        if not bridge and HookedTransformer is not None and HookedTransformerConfig is not None:
            model = HookedTransformer(HookedTransformerConfig(**shape, positional_embedding_type="shortformer", seed=None, device="cpu"))
        else:
            from transformer_lens.config import TransformerBridgeConfig

            model = TransformerBridge.boot_native(TransformerBridgeConfig(**shape, architecture="TransformerLensNative"), device="cpu")
            _give_shortformer_positions(model)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            own_positions = bridge and "pos" in name and "shortformer" not in name
            with torch.no_grad():
                if name.split(".")[-1].startswith("b") or own_positions:  # no biases in this model
                    parameter.zero_().requires_grad_(False)
                else:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device=generator.device))
    name_tokens(model, [*map(str, range(SPECIAL)), "s"])
    return model.eval()


def _give_shortformer_positions(model: Any) -> None:
    """TransformerBridge has no shortformer positions: zero its own, and add learned ones to what W_Q and W_K read."""
    positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH, dtype=torch.float32, device="cpu"))
    model.original_model.register_parameter("shortformer_positions", positions)

    def add(x: Tensor, hook: Any) -> Tensor:
        return x + positions[: x.shape[1]]

    for layer in range(LAYERS):
        for part in ("q", "k"):
            model.hook_dict[f"blocks.{layer}.attn.{part}.hook_in"].add_perma_hook(add)


@steady(gradients=True)
def train_target(seed: int = 0, bridge: bool = HookedTransformer is None) -> Any:
    """A target of at least 99.6 % accuracy, in one to two minutes.

    1. A constant rate with weight decay until the circuit has formed.
    2. `HOLD` steps more, in which decay makes the circuit simple: its matrices become of low rank.
    3. The rate goes down to 0 without decay, which lets the attention become sharp.

    Some initialisations stay at about 98.4 %: they never learn sequences that begin with s. Such a one is left after `PATIENCE` steps or at
    the end, and the seed's next is tried.

    Raises:
        SPDError: none of `ATTEMPTS` initialisations reached that accuracy.
    """
    reached = 0.0
    for attempt in range(ATTEMPTS):
        own = seed + 1000 * attempt
        model, generator = build_target(own, bridge), torch.Generator().manual_seed(own + 1)
        if _train(model, generator):
            test = sequences(4096, generator)
            with torch.no_grad():
                reached = accuracy(model(test.tokens, return_type="logits"), test.answers)
            if reached >= ENOUGH:
                return model
    raise SPDError(f"no target of seed {seed} reached an accuracy of {ENOUGH} in {ATTEMPTS} attempts (the last: {reached:.3f}). "
                   "Try another seed.")  # fmt: skip


def _train(model: Any, generator: torch.Generator) -> bool:
    """Whether the circuit formed in time."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    (group,) = optimiser.param_groups
    smooth, left = 5.0, None
    with reproducible():
        for step in range(PATIENCE + HOLD + ANNEAL):
            group["lr"] = RATE * min(1.0, (step + 1) / 50, 1.0 if left is None else left / ANNEAL)
            group["weight_decay"] = DECAY if left is None else SIMPLIFYING if left > ANNEAL else 0.0
            batch = sequences(128, generator)
            loss = F.cross_entropy(model(batch.tokens, return_type="logits")[:, -1], batch.answers)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            smooth += 0.05 * (loss.item() - smooth)
            if left is None:
                left = HOLD + ANNEAL if smooth < FORMED else None
                if left is None and step >= PATIENCE:
                    break
            else:
                left -= 1
                if not left:
                    break
    optimiser.zero_grad(set_to_none=True)
    return left == 0


def accuracy(logits: Float[Tensor, "N s v"], answers: Int[Tensor, " N"]) -> float:
    """How often the last position's likeliest token is the answer."""
    return float((logits[:, -1].argmax(-1) == answers).float().mean())


def config(**changes: Any) -> SPDConfig:
    """The library's defaults on this task's sites and output; `changes` override."""
    return SPDConfig(**{"sites": SITES, "subcomponents": WIDTH, "output_positions": "last", **changes})


class _Made(TypedDict):
    """How a saved target was made."""

    seed: Natural
    bridge: bool


def save_target(model: Any, path: Path, seed: int) -> None:
    write_tensors(path, dict(model.named_parameters()), {"seed": seed, "bridge": isinstance(model, TransformerBridge)})


def load_target(path: Path) -> Any:
    """The target that `save_target` wrote, for `Decomposition.load(folder, model)`."""
    saved = Saved(path, _Made)
    model = build_target(saved.about["seed"], saved.about["bridge"])
    saved.copy_to(dict(model.named_parameters()))
    return model


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a decomposition of the target shows, measured; everything that table, page and `results.json` say.

    Attributes:
        seconds: what took how long.
        mean_active: `Q0` … → position → mean number active.
        distinct: `Q0` … → ever active; `total`; `total_without_s_first`.
        diagnosis: whether they do what the circuit needs.
        ablated: `Q0` … → accuracy of the original model without its active subcomponents of that site.
    """

    decomposition: Decomposition
    sequences: Sequences
    seed: int
    seconds: dict[str, float]
    target_accuracy: float
    accuracy_hard: float
    verification: Verification
    mean_active: dict[str, dict[str, float]]
    distinct: dict[str, int]
    diagnosis: Diagnosis
    ablated: dict[str, float]
    example_importances: dict[str, Tensor]

    @property
    def short_names(self) -> dict[str, str]:
        return {name: site.short for name, site in self.decomposition.sites.items()}

    @property
    def example_labels(self) -> list[str]:
        return token_labels(self.decomposition.model, self.sequences.tokens[0])

    def beside_paper(self) -> pd.DataFrame:
        """Table 1: ours, and the paper's in brackets."""
        rows = {}
        for site, own in self.mean_active.items():
            paper = PAPER.get(site, {})
            rows[site] = {position: f"{value:.3f} ({paper[position]:.3f})" for position, value in own.items() if position in paper}
            rows[site]["distinct"] = f"{self.distinct[site]} ({paper['distinct']})"
        total = sum(row["distinct"] for row in PAPER.values())
        rows["total"] = {"distinct": f"{self.distinct['total']} ({total})"}
        rows["without s first"] = {"distinct": f"{self.distinct['total_without_s_first']}"}
        return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("site")

    def verification_table(self) -> pd.DataFrame:
        rows = {label: f"{getattr(self.verification, name):.1e}" for name, label in LABELS.items()}
        return pd.DataFrame({"value": {**rows, "accuracy, hard masks": f"{self.accuracy_hard:.4f}"}}).rename_axis("check")

    def diagnosis_table(self) -> pd.DataFrame:
        return self.diagnosis.table().map("{:.3f}".format)

    def interventions_table(self) -> pd.DataFrame:
        """Accuracies; where there were not as many others as to be cut, the note says so."""
        table = self.diagnosis.interventions.table()
        accuracies = [column for column in table if column not in ("cut", "note")]
        return table.assign(
            **{column: table[column].map(lambda value: "" if math.isnan(value) else f"{value:.3f}") for column in accuracies}
        )

    def picture(self, draw: Callable[..., Any]) -> Any:
        """Hand the circuit to a drawing function (plotting lies to the right of this file)."""
        columns = {"s1": "s, for the first time", "m": "the token after it", "s2": "s again: the model says m"}
        often = {position: self.diagnosis.often[position] for position in columns}
        return draw(often, {key: value["hard"] for key, value in self.diagnosis.attention.items()}, self.ablated, columns)

    def figures(self) -> dict[str, float | int]:
        """What a study compares, by name: the target's own mechanism, the count and whether it can be trusted, the interventions, time."""
        found = self.diagnosis
        v, attention = self.verification, found.attention
        return {
            "target: accuracy": self.target_accuracy,
            **{f"target: attention {edge}": value["original"] for edge, value in attention.items()},
            "target: effective rank of V1": found.copying.effective_rank,
            "distinct": self.distinct["total"], "distinct without s first": self.distinct["total_without_s_first"],
            **{f"distinct {site}": self.distinct[site] for site in self.mean_active},
            **{f"{site} active at {OWN_POSITION[site]}": means[OWN_POSITION[site]] for site, means in self.mean_active.items()},
            **{f"{site} active at random": means["random"] for site, means in self.mean_active.items()},
            **{label: getattr(v, name) for name, label in LABELS.items()},
            "accuracy, hard masks": self.accuracy_hard,
            **{f"attention {edge}, hard masks": value["hard"] for edge, value in attention.items()},
            **{f"accuracy without {claim.name}": claim.accuracy_without for claim in found.interventions.claims},
            **{f"seconds, {part}": value for part, value in self.seconds.items()},
        }  # fmt: skip

    def results(self) -> dict[str, Any]:
        """`results.json`."""
        return {
            "seconds": sum(self.seconds.values()), "seconds_by_part": self.seconds, "seed": self.seed,
            "config": self.decomposition.config.to_json(), "target_accuracy": self.target_accuracy, "distinct": self.distinct,
            "mean_active": self.mean_active,
            "verification": {**self.verification.as_dict(), "accuracy_hard": self.accuracy_hard},
            "attention": self.diagnosis.attention, "accuracy_when_cut": self.ablated, "figures": self.figures(),
            "interventions": self.interventions_table().to_dict("index"),
        }  # fmt: skip


@steady()
def measure(decomposition: Decomposition, seed: int, seconds: Mapping[str, float], many: int = 2048) -> Outcome:
    """Everything that is reported, on `many` fresh sequences; `seconds` is what its making took, part by part."""
    started = time.perf_counter()
    test = sequences(many, torch.Generator().manual_seed(1_000_000 + seed))
    short = {name: site.short for name, site in decomposition.sites.items()}
    observation = decomposition.observe(test.tokens)
    counted = census(decomposition, test.tokens, test.positions)
    kept = census(decomposition, test.select(~test.s_first).tokens)
    verification = verify(decomposition, test.tokens)
    alive = {name: torch.nonzero(on).flatten().tolist() for name, on in counted.alive.items()}
    ablated = {
        short[name]: accuracy(
            decomposition.model.run_with_hooks(test.tokens, fwd_hooks=decomposition.ablate({name: alive[name]})), test.answers
        )
        for name in decomposition.sites
    }
    some = test.select(torch.arange(min(many, DIAGNOSED), device=test.tokens.device))
    diagnosis = diagnose(decomposition, some.tokens, some.positions, some.answers, SPECIAL, seed, draws=2)
    return Outcome(
        decomposition=decomposition, sequences=test, seed=seed, target_accuracy=accuracy(observation.logits, test.answers),
        accuracy_hard=accuracy(decomposition.run(test.tokens, masks.hard(observation.importances)), test.answers),
        verification=verification,
        mean_active={short[n]: {k: v for k, v in means.items() if k != "all"} for n, means in counted.mean_active.items()},
        distinct={**{short[n]: v for n, v in counted.distinct.items()}, "total": counted.total, "total_without_s_first": kept.total},
        diagnosis=diagnosis, ablated=ablated, example_importances={name: g[:1] for name, g in observation.importances.items()},
        seconds={**seconds, "measuring": time.perf_counter() - started},
    )  # fmt: skip
