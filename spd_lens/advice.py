"""What a decomposition's figures warn of, and what to do about it.

`advise` looks at a finished decomposition on some tokens; `while_training` at what is known between two steps. Each piece of advice names what was
seen, with its figure, and how to mend it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lens.components import Factors, likeness, weighted_svd
from spd_lens.curvature import factors
from spd_lens.decomposition import Decomposition
from spd_lens.guards import frozen, steady
from spd_lens.metrics import CHEAT, Census, Verification, census, verify
from spd_lens.suffix import rows_at_once
from spd_lens.tokens import Batch

UNFAITHFUL = 0.1  # of a matrix's squared norm
LOPSIDED, FEW = 0.8, 10  # share of all active subcomponents in one matrix or layer; below so many there is nothing to share out
CROWDED = 0.9  # of a matrix's subcomponents are ever active
DEAD = 0.97  # of all subcomponents never are
BROKEN, ATTACKED = 0.1, 0.3  # nats
BASIS, ALWAYS, SINGULAR = 3, 0.8, 0.8  # of so many or more this share is on at a mean position; likeness to singular vectors that is one
NAMED = 3  # matrices: each of these takes a whole factorisation
LOOKED_AT = 32  # sequences that tell which directions of a matrix matter
SETTLED = 50  # steps; shorter runs are trials


@dataclass(frozen=True)
class Advice:
    """One thing to mend.

    Attributes:
        kind: `faithfulness`, `nothing active`, `lopsided`, `dead`, `crowded`, `basis`, `cheat`, `broken`, `alive-only` or `adversarial`.
        seen: what was seen, with its figure.
        mend: what to do.
    """

    kind: str
    seen: str
    mend: str

    def __str__(self) -> str:
        return f"{self.seen} {self.mend}"


@steady()
def advise(
    d: Decomposition, tokens: Any, counted: Census | None = None, checked: Verification | None = None, attention_mask: Any = None
) -> list[Advice]:
    """What to mind before this decomposition is believed; an empty list where nothing is amiss.

    Args:
        d: the decomposition.
        tokens, attention_mask: `[b, s]` of the kind it was learnt on, as `spd_lens.tokens.take_in` takes them.
        counted, checked: `census` and `verify` on these tokens, where they are there already.
    """
    tokens = d.batch(tokens, attention_mask)
    counted, checked = counted or census(d, tokens), checked or verify(d, tokens)
    found = _unfaithful(d) + _shares({name: float(n) for name, n in counted.distinct.items()}, d)
    if counted.total == 0:
        found.append(_nothing(f"of {len(tokens)} sequences"))
        return found
    full = [
        name
        for name, on in counted.alive.items()
        if float(on.float().mean()) >= CROWDED and len(on) < min(d.sites[name].d_in, d.sites[name].d_out)
    ]
    if full:
        found.append(Advice("crowded", f"C is too small: {CROWDED:.0%} or more of the subcomponents of {_few(full)} are active somewhere, so that mechanisms have to share them.",
                            "Give more, e.g. subcomponents={'" + full[0] + "': " + str(2 * d.components[full[0]].C) + ", '*': …}."))  # fmt: skip
    allocated = sum(c.C for c in d.components.values())
    if (dead := 1 - counted.total / allocated) >= DEAD and not d.config.is_targeted:
        found.append(Advice("dead", f"{dead:.1%} of {allocated} subcomponents are active nowhere on these tokens.",
                            "That is no fault, but fewer would be faster: lower subcomponents; or look at more tokens before you say so."))  # fmt: skip
    found += _basis(d, tokens, counted)
    if checked.leans_on_inactive:
        found.append(
            Advice(
                "cheat",
                f"This is a cheat: the stochastic KL is {checked.kl_stochastic:.1e} nats and the hard one {checked.kl_hard:.1e}.",
                CHEAT,
            )
        )
    elif checked.kl_hard > BROKEN:
        found.append(Advice("broken", f"With the active subcomponents alone (hard masks) the outputs are {checked.kl_hard:.2g} nats away from the model's.",
                            "Train longer (steps=), give more subcomponents, or lower the weight of price; and check that these tokens are of the kind it was learnt on."))  # fmt: skip
    else:
        found += _elsewhere(checked)
    return found


def _elsewhere(checked: Verification) -> list[Advice]:
    """The active ones carry the outputs; whether the others may be anything is another question."""
    found = []
    if checked.kl_alive_only > BROKEN:
        found.append(Advice("alive-only", f"With the ever-active subcomponents on everywhere the outputs are {checked.kl_alive_only:.2g} nats away from the model's (hard masks: {checked.kl_hard:.1e}): "
                            "what is active does harm where it is not.", "Raise the weights of alive and faithfulness towards the end of training, or train longer."))  # fmt: skip
    if checked.kl_adversarial > ATTACKED:
        found.append(Advice("adversarial", f"With the worst strength for each inactive subcomponent the outputs are {checked.kl_adversarial:.2g} nats away from the model's (hard masks: {checked.kl_hard:.1e}), so these positions "
                            "need more than what counts as active.", "Raise the weight of adversarial, or begin it earlier; do not say that the inactive ones do not matter."))  # fmt: skip
    return found


def _basis(d: Decomposition, tokens: Batch, counted: Census) -> list[Advice]:
    """Nothing tells positions apart. Before any training all importances are on, and on a few prompts they may be: neither says anything."""
    if not d.steps_done or d.config.is_targeted:
        return []
    full = {name: n for name, n in counted.distinct.items() if n >= BASIS and counted.mean_active[name]["all"] >= ALWAYS * n}
    if sum(full.values()) < counted.total / 2:
        return []
    named = list(full)[:NAMED]
    like = min(
        max(_likeness_to_basis(d, name, counted.alive[name], F) for F in (None, G)) for name, G in _factors(d, tokens, named).items()
    )
    what = "This is the singular basis" if like >= SINGULAR else "This is a basis, not pieces that positions choose from"
    each = ", ".join(f"{counted.mean_active[name]['all']:.3g} of {n} in {name}" for name, n in list(full.items())[:NAMED])
    more = f" and {len(full) - NAMED} matrices more" if len(full) > NAMED else ""
    return [Advice("basis", f"{what}: {each}{more} are active at every position.",
                   "They say which directions matter, not which piece acts where: try SPDConfig.pieces(), or a larger weight of price, and none of frequency.")]  # fmt: skip


def _factors(d: Decomposition, tokens: Batch, names: Sequence[str]) -> dict[str, Factors]:
    rows = rows_at_once(d.model, tokens.shape[1], len(tokens))
    part = Decomposition(
        d.model, {name: d.sites[name] for name in names}, {name: d.components[name] for name in names},
        {name: d.gates[name] for name in names}, d.config,
    )  # fmt: skip
    with frozen(d.model), torch.enable_grad():
        return factors(part, tokens[:LOOKED_AT], torch.Generator(tokens.device).manual_seed(d.config.seed), rows)


@torch.no_grad()
def _likeness_to_basis(d: Decomposition, name: str, alive: Tensor, metric: Factors | None) -> float:
    c = d.components[name]
    V, U = weighted_svd(d.sites[name].weight, metric)
    return float(likeness(V, U, c.V[:, alive].to(V), c.U[alive].to(U)).amax(0).mean())


def while_training(d: Decomposition, active: dict[str, float]) -> list[Advice]:
    """What can be seen between two steps: `active` is the mean number of active subcomponents of each matrix per position."""
    if d.steps_done < SETTLED or d.steps_done < d.config.steps / 2:
        return []
    return [] if sum(active.values()) else [_nothing(f"at step {d.steps_done}")]


@torch.no_grad()
def _unfaithful(d: Decomposition) -> list[Advice]:
    """A targeted decomposition leaves the rest of a matrix to the delta on purpose."""
    if d.config.is_targeted:
        return []
    left = {name: d.share_left(name) for name in d.sites}
    far = [name for name, share in left.items() if share > UNFAITHFUL]
    if not far:
        return []
    worst = max(far, key=lambda name: left[name])
    return [Advice("faithfulness", f"V·U misses {left[worst]:.0%} of {worst} ({UNFAITHFUL:.0%} or more of {_few(far)}), which is then explained by the delta alone.",
                   "Train longer, give more subcomponents (up to the matrix's rank), or raise the weight of faithfulness.")]  # fmt: skip


def _shares(active: dict[str, float], d: Decomposition) -> list[Advice]:
    total = sum(active.values())
    layers: dict[int, float] = {}
    for name, n in active.items():
        layers[d.sites[name].layer] = layers.get(d.sites[name].layer, 0.0) + n
    mend = ("Ask whether the task lives there; if not, the price pushes the others' work into it: lower the weight of price, or decompose "
            "that part with more subcomponents.")  # fmt: skip
    if total < FEW:
        return []
    for what, some in (("matrix", active), ("layer", {f"layer {layer}": n for layer, n in layers.items()})):
        most = max(some, key=lambda name: some[name])
        if len(some) > 2 and some[most] >= LOPSIDED * total:
            return [Advice("lopsided", f"{some[most] / total:.0%} of the active subcomponents lie in one {what}, {most}.", mend)]
    return []


def _nothing(where: str) -> Advice:
    return Advice("nothing active", f"No subcomponent is active (g > 0.5) in any position {where}: everything was priced away.",
                  "Lower the weights of price, minimality and frequency, or the learning rate; or look at tokens of the kind it was learnt on.")  # fmt: skip


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
