"""How a decomposition is made: one frozen object that refuses what it does not know."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from spd_lens.errors import SPDError, nearest
from spd_lens.schema import Count, Natural, brief, check, plain

Importance = Literal["attention", "vector", "scalar"]
Initialisation = Literal["fisher", "svd", "random", "positions"]
Positions = Literal["all", "last"]
MaskKind = Literal["mixed", "uniform"]
Precision = Literal["float32", "bfloat16"]
T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """A value over training: `points` are (fraction of training done, value), joined by lines or half cosines.

    Two points at the same fraction make a step. Before the first and after the last point the value stays.
    """

    points: Any  # (fraction, value) pairs
    shape: Literal["linear", "cosine"] | str = "linear"

    def __post_init__(self) -> None:
        try:
            points = tuple((float(at), float(value)) for at, value in self.points)
        except (TypeError, ValueError, OverflowError):
            raise SPDError(f"a schedule was given as {brief(self.points)}; give a number, or (fraction, value) pairs "
                           "such as ((0, 0.2), (0.5, 0.02)).") from None  # fmt: skip
        ats = [at for at, _ in points]
        finite = all(math.isfinite(at) and math.isfinite(value) for at, value in points)
        if not points or not finite or ats != sorted(ats) or not 0 <= ats[0] <= ats[-1] <= 1:
            raise SPDError(f"a schedule was given as {brief(points)}; its fractions have to rise within 0 … 1 and its values be finite.")
        if self.shape not in ("linear", "cosine"):
            raise SPDError(f"a schedule's shape was given as {brief(self.shape)}; {nearest(brief(self.shape), ('linear', 'cosine'))}.")
        object.__setattr__(self, "points", points)

    @classmethod
    def of(cls, value: Any) -> "Schedule":
        """From a number, (fraction, value) pairs, or what a Schedule was in JSON; a Schedule stays what it is."""
        value = plain(value)
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            if not {"points"} <= value.keys() <= {"points", "shape"}:
                raise SPDError(f"a schedule was given as {brief(value)}; it has to hold its points, and may hold its shape.")
            check("a schedule's shape", value.get("shape", "linear"), str)
            return cls(**value)
        return cls(((0.0, value),)) if isinstance(value, (int, float)) else cls(value)

    def times(self, factor: float | int) -> "Schedule":
        """The same shape with every value multiplied."""
        return dataclasses.replace(self, points=[(at, factor * value) for at, value in self.points])

    def at(self, fraction: float | int) -> float:
        """The value at this fraction (0 … 1) of the training."""
        before, after = self.points[0], self.points[-1]
        if fraction < before[0] or len(self.points) == 1:
            return before[1]
        for left, right in zip(self.points, self.points[1:]):
            if left[0] <= fraction < right[0]:
                along = (fraction - left[0]) / (right[0] - left[0])
                if self.shape == "cosine":
                    along = (1 - math.cos(math.pi * along)) / 2
                return left[1] + along * (right[1] - left[1])
        return after[1]


def falling(first: float | int, last: float | int, pieces: int = 8) -> tuple[tuple[float, float], ...]:
    """From the first value to the last by equal factors, as `Schedule` points."""
    return tuple((i / pieces, first * (last / first) ** (i / pieces)) for i in range(pieces + 1))


ScheduleLike = Any  # Schedule, number, (fraction, value) pairs, or what a Schedule was in JSON

DEFAULT_WEIGHTS: dict[str, ScheduleLike] = {
    "faithfulness": ((0.0, 1e3), (0.75, 1e3), (0.75, 3e4)),
    "stochastic": 1.0,
    "layerwise": 1.0,
    "adversarial": ((0.26, 0.0), (0.26, 1.0)),
    "alive": ((0.3, 0.0), (0.3, 1.0)),
    "price": ((0.0, 1e-3), (0.26, 1e-3), (0.26, 5e-4), (0.5, 5e-4), (0.5, 1e-4)),
    "frequency": ((0.0, 5e-3), (0.5, 5e-3), (0.5, 0.0)),
}


class _Checked(type):
    """What a dataclass is given is made plain, and checked, before it is made."""

    def __call__(cls: type[T], *args: Any, **given: Any) -> T:
        kinds = {f.name: f.type for f in fields(cls)}  # pyright: ignore
        for name, value in given.items():
            if name not in kinds:
                raise SPDError(f"{cls.__name__} has no {brief(name)}; {nearest(name, kinds)}.")
            given[name] = plain(value)
            check(name, given[name], kinds[name])
        return type.__call__(cls, *args, **given)


@dataclass(frozen=True, kw_only=True)
class SPDConfig(metaclass=_Checked):
    """How to decompose. Every number with a schedule is a number or (fraction of training, value) pairs. Numbers may be numpy's or torch's.

    Attributes:
        sites: glob patterns of the matrices to decompose, by TransformerLens' own names; `*` is all of them.
        subcomponents: how many each matrix gets (C); or a mapping from pattern to number, the first match counts.
        importance: how causal importance is predicted: `attention` sees other positions (arXiv 2511.08854), `vector` the
            site's whole input, `scalar` each subcomponent's own inner activation (arXiv 2506.20790).
        gate_width: hidden units of each subcomponent's importance MLP, and width of the importance attention.
        gate_bias: where importances start (1: all on).
        distance_decay: the relative positional bias starts at minus this, per position of distance.
        init: `fisher` starts from the singular vectors in the metric of the output's KL on the first batches (`spd_lens.curvature`):
            few subcomponents carry what the output needs, from the start. `positions`: directions that are read at few positions each
            (`spd_lens.components.from_positions`). `svd`: the matrix's own; `random`: noise.
        steps: training steps; 0 returns the initialised decomposition.
        batch_size: sequences a step (where tokens are one tensor; an iterable brings its own batches).
        learning_rate: Adam's.
        scaled_rate: for U and V it is in units of the root mean square of their entries, site by site, so that a model's scale does not
            matter.
        retire_at: fractions of training at which subcomponents that are not needed are retired (`spd_lens.retirement`); () for never.
        retire_tolerance: KL in nats per output that what is retired at once may cost.
        merge_at: fractions of training at which subcomponents that read and write alike are made one (`spd_lens.retirement`).
        exact: at the end `V·U = W` is made exact by the least change of U, where there are enough subcomponents and it costs no more than
            `retire_tolerance`.
        output_positions: compare outputs at `all` positions or at the `last`.
        seed: of everything random.
        device: where the model is expected; None takes the model's.
        weights: of each loss, by name (see `spd_lens.losses.LOSSES`); a loss without weight is not computed.
        minimality_power: p of `|g|^p` in every term that counts subcomponents.
        frequency_scale: active positions per sequence below which the frequency term is linear.
        masks: `mixed` draws r = 0 for 30 % of the sequences, a coin for 20 %, uniform for the rest; `uniform` (the paper's)
            can be cheated by a model that leans on half-strength subcomponents.
        layerwise_sites: how many sites, drawn anew each step, the layerwise loss masks; None: every one.
        precision: `float32`; or `bfloat16`: matrix products in bfloat16 (autocast), parameters and losses in float32, for GPUs.
        tokens_per_pass: of one masked forward and backward pass; a batch with more, or with more variants, takes several, whose
            gradients are added up. None: 4,096 on a CPU, 65,536 on a GPU. Halved, with a warning, where memory runs out.
    """

    sites: str | Sequence[str] = "*"
    subcomponents: Count | Mapping[str, Count] = 64
    importance: Importance | str = "attention"
    gate_width: Count = 16
    gate_bias: float | int = 1.0
    distance_decay: float | int = 0.3
    init: Initialisation | str = "fisher"
    steps: Natural = 2400
    batch_size: Count = 32
    learning_rate: ScheduleLike = ((0.0, 5e-3), (0.75, 1e-3), (1.0, 0.0))
    scaled_rate: bool = True
    retire_at: Sequence[float | int] = (0.3, 0.45)
    retire_tolerance: float | int = 3e-4
    merge_at: Sequence[float | int] = ()
    exact: bool = True
    output_positions: Positions | str = "all"
    seed: Natural = 0
    device: str | None = None
    weights: Mapping[str, ScheduleLike] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    minimality_power: ScheduleLike = ((0.0, 1.0), (0.75, 0.1))
    frequency_scale: float | int = 0.05
    masks: MaskKind | str = "mixed"
    layerwise_sites: Count | None = 2
    precision: Precision | str = "float32"
    tokens_per_pass: Count | None = None

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "sites", (self.sites,) if isinstance(self.sites, str) else tuple(self.sites))
        for name in ("gate_bias", "distance_decay", "frequency_scale", "retire_tolerance"):
            keep(self, name, float(getattr(self, name)))
        for name in ("learning_rate", "minimality_power"):
            keep(self, name, Schedule.of(getattr(self, name)))
        for name in ("retire_at", "merge_at"):
            keep(self, name, tuple(map(float, getattr(self, name))))
        keep(self, "weights", {name: Schedule.of(weight) for name, weight in self.weights.items()})
        for name, kind in {
            "importance": Importance,
            "init": Initialisation,
            "output_positions": Positions,
            "masks": MaskKind,
            "precision": Precision,
        }.items():
            given = getattr(self, name)
            if given not in get_args(kind):
                raise SPDError(f"{name} was given as {brief(given)}; {nearest(given, get_args(kind))}.")
        rates = {"learning_rate": self.learning_rate, "minimality_power": self.minimality_power}
        for name, schedule in {**rates, **{f"the weight of {loss}": weight for loss, weight in self.weights.items()}}.items():
            if any(value < 0 for _, value in schedule.points):  # it would climb
                raise SPDError(f"{name} was given as {brief(schedule.points)}; no value of it may be below 0.")
        for name in ("retire_at", "merge_at"):
            if not all(0 <= at < 1 for at in getattr(self, name)):
                raise SPDError(
                    f"{name} was given as {brief(getattr(self, name))}; its fractions of training have to lie in 0 … 1, 1 left out."
                )
        if self.retire_tolerance < 0:
            raise SPDError(f"retire_tolerance was given as {self.retire_tolerance!r}; it has to be at least 0.")
        if self.frequency_scale <= 0:
            raise SPDError(f"frequency_scale was given as {self.frequency_scale!r}; it has to be above 0.")

    @classmethod
    def paper(cls, **changes: Any) -> "SPDConfig":
        """The settings of arXiv 2511.08854 for its induction toy, to the letter; `changes` override."""
        paper: dict[str, Any] = dict(
            sites=("blocks.*.attn.W_[QKV]",), subcomponents=100, importance="attention", gate_width=16, gate_bias=0.0,
            distance_decay=0.0, init="random", steps=100_000, batch_size=1024, output_positions="last", masks="uniform",
            learning_rate=Schedule(((0.0, 1e-3), (1.0, 0.0)), "cosine"), scaled_rate=False,
            minimality_power=((0.0, 0.9), (1.0, 0.1)), layerwise_sites=None, retire_at=(), exact=False,
            weights={"faithfulness": 1e3, "plain": 0.5, "stochastic": 1.0, "layerwise": 1.0, "minimality": 0.02},
        )  # fmt: skip
        return cls(**{**paper, **changes})

    @classmethod
    def pieces(cls, **changes: Any) -> "SPDConfig":
        """For finding the pieces that are there rather than few that do (`spd-lens planted`): it starts from what single positions read, an active
        subcomponent is dear at first and cheap in the end, the adversary is there from the first step, what is alike is made one, and nothing
        asks that different inputs share a subcomponent. `changes` override."""
        own: dict[str, Any] = dict(
            init="positions", importance="vector", steps=2000, learning_rate=((0.0, 3e-3), (1.0, 0.0)), minimality_power=1.0, retire_at=(),
            merge_at=(0.3, 0.6, 0.85), exact=False,
            weights={
                "faithfulness": ((0.0, 1e3), (0.5, 1e3), (0.5, 3e4)), "stochastic": 1.0, "adversarial": 0.5, "price": falling(0.2, 2e-3),
            },
        )  # fmt: skip
        return cls(**{**own, **changes})

    @classmethod
    def targeted(cls, **changes: Any) -> "SPDConfig":
        """A decomposition of what a model does on a few prompts, for `decompose(model, prompts, config, background=other text)`: partial
        reconstruction on the prompts, without the delta; on the background the delta is fully on, and activity is dear
        (arXiv 2511.08854, section 3; Vigouroux & Sharkey 2026, arXiv 2607.13047). `changes` override."""
        own: dict[str, Any] = dict(
            subcomponents=48, steps=150, retire_at=(), exact=False, output_positions="last", layerwise_sites=None,
            weights={
                "stochastic": 1.0, "partial": 1.0, "adversarial": DEFAULT_WEIGHTS["adversarial"],
                "price": 1e-4, "frequency": 5e-4, "background": 1.0, "background_price": 3e-3,
            },
        )  # fmt: skip
        return cls(**{**own, **changes})

    @property
    def is_targeted(self) -> bool:
        """Whether a loss looks at a second stream of other text."""
        return any(name.startswith("background") for name in self.weights)

    def replace(self, **changes: Any) -> "SPDConfig":
        """The same config but for `changes`, checked anew."""
        return type(self)(**{**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and mappings, as `decomposition.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SPDConfig":
        """What `to_json` gave; unknown names and wrong types are refused."""
        return cls(**data)
