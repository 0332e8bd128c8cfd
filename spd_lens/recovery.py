"""Which pieces come back: of a truth that is known, or of another decomposition of the same model.

1. Only active subcomponents count (g > 0.5 somewhere on the tokens).
2. Two rank-one matrices `v ⊗ u` and `v' ⊗ u'` are as alike as their cosine, `|cos(v, v')|·|cos(u, u')|`: 1 where one is a multiple of the other.
3. Forward: of each wanted piece the best active subcomponent. Back: of each active subcomponent the best wanted piece, which is what tells a truth
   found from a truth found among much else.
4. A matching: pairs in the order of likeness, each piece and each subcomponent once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.components import likeness
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.guards import steady
from spd_lens.metrics import census
from spd_lens.schema import brief
from spd_lens.tables import Shown, Tabular
from spd_lens.tokens import TokensLike

FOUND = 0.9  # as alike as this is found
Pieces = tuple[Float[Tensor, "d_in K"], Float[Tensor, "K d_out"]]


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Tabular):
    """How alike the active subcomponents of a decomposition are to wanted pieces.

    Attributes:
        likeness: site → `[K, A]`, `|cos v|·|cos u|` of each wanted piece with each active subcomponent.
        pieces: site → the K wanted pieces' numbers: columns of the truth, or active subcomponents of the other decomposition.
        active: site → the A active subcomponents' numbers.
    """

    likeness: dict[str, Float[Tensor, "K A"]]
    pieces: dict[str, list[int]]
    active: dict[str, list[int]]

    @property
    def mean(self) -> float:
        """Mean over the wanted pieces of the best likeness with an active subcomponent."""
        return float(self._best(1).mean())

    @property
    def above(self) -> int:
        """How many of them are found: a likeness of 0.9 or more."""
        return int((self._best(1) >= FOUND).sum())

    @property
    def total(self) -> int:
        """How many pieces are wanted."""
        return sum(map(len, self.pieces.values()))

    @property
    def back(self) -> float:
        """Mean over the active subcomponents of the best likeness with a wanted piece; nan where none is active."""
        return float(self._best(0).mean())

    @property
    def matching(self) -> dict[str, list[tuple[int, int, float]]]:
        """Site → (piece, subcomponent, likeness), each piece and each subcomponent once, the most alike first."""
        return {
            name: [(self.pieces[name][k], self.active[name][a], float(alike[k, a])) for k, a in matched(alike)]
            for name, alike in self.likeness.items()
        }

    def table(self) -> pd.DataFrame:
        """A row per wanted piece: the most alike active subcomponent, and the one that it is matched with; -1 where there is none."""
        rows = []
        for name, pairs in self.matching.items():
            partner = {piece: (c, alike) for piece, c, alike in pairs}
            for piece, alike in zip(self.pieces[name], self.likeness[name]):
                best = int(alike.argmax()) if len(alike) else None
                c, how = partner.get(piece, (-1, 0.0))
                rows.append({"site": name, "piece": piece, "best": -1 if best is None else self.active[name][best],
                             "likeness": 0.0 if best is None else float(alike[best]), "matched": c, "likeness when matched": how})  # fmt: skip
        return pd.DataFrame(rows).set_index("site")

    def _best(self, dim: int) -> Float[Tensor, " n"]:
        best = [alike.amax(dim) if alike.shape[dim] else alike.new_zeros(alike.shape[1 - dim]) for alike in self.likeness.values()]
        return torch.cat(best)

    def _shown(self) -> Shown:
        rows = {}
        for name, alike in self.likeness.items():
            one = Recovery({name: alike}, {name: self.pieces[name]}, {name: self.active[name]})
            rows[name] = {"pieces": one.total, "active": alike.shape[1], "mean": f"{one.mean:.3f}", f"≥ {FOUND}": one.above,
                          "back": f"{one.back:.3f}"}  # fmt: skip
        return Shown(f"{self.above} of {self.total} pieces come back; mean likeness {self.mean:.3f}",
                     pd.DataFrame.from_dict(rows, orient="index").rename_axis("site"),
                     "Likeness: |cos v|·|cos u| of each piece with the best active subcomponent; back: of each active subcomponent with the best "
                     "piece.")  # fmt: skip


@steady()
def recovered(decomposition: Decomposition, truth: Mapping[str, Any], tokens: TokensLike, attention_mask: Any = None) -> Recovery:
    """Which true pieces an active subcomponent stands for.

    Args:
        decomposition: the decomposition.
        truth: site → `(V [d_in, K], U [K, d_out])`, the pieces `v_k ⊗ u_k` that its matrix is known to be made of. Sites that it does not name are
            not looked at.
        tokens, attention_mask: `[b, s]` on which subcomponents are called active, as `spd_lens.tokens.take_in` takes them.

    Raises:
        SPDError: a site that is not decomposed, or pieces of another shape, without length, or not finite.
    """
    if not truth:
        raise SPDError("the truth names no site; give {site: (V [d_in, K], U [K, d_out])}.")
    for name, pieces in truth.items():
        decomposition.check_chosen({name: []})
        _check_pieces(decomposition, name, pieces)
    active = _active(decomposition, tokens, attention_mask)
    return _recovery(decomposition, {name: (V, U, list(range(len(U)))) for name, (V, U) in truth.items()}, active)


@steady()
def similarity(a: Decomposition, b: Decomposition, tokens: TokensLike, attention_mask: Any = None) -> Recovery:
    """Which active subcomponents of `b` come back in `a`, another decomposition of the same model: another seed, other settings, other text.

    Args:
        a, b: the two; sites that only one of them has are not looked at.
        tokens, attention_mask: `[b, s]` on which subcomponents are called active, as `spd_lens.tokens.take_in` takes them.

    Raises:
        SPDError: no site in common, or one that has another shape in the other.
    """
    common = [name for name in a.sites if name in b.sites]
    if not common:
        raise SPDError(
            f"the two decompositions have no site in common ({', '.join(a.sites)}; {', '.join(b.sites)}); give two of the same matrices."
        )
    for name in common:
        one, other = ([d.sites[name].d_in, d.sites[name].d_out] for d in (a, b))
        if one != other:
            raise SPDError(f"{name} is {one} in one decomposition and {other} in the other; give two of the same model.")
    theirs = _active(b, tokens, attention_mask)
    wanted = {name: (b.components[name].V[:, theirs[name]], b.components[name].U[theirs[name]], theirs[name]) for name in common}
    if not any(theirs[name] for name in common):
        raise SPDError("no subcomponent of the second decomposition is active (g > 0.5) on these tokens, so there is none to come back; give tokens "
                       "of the kind that it was learnt on.")  # fmt: skip
    return _recovery(a, wanted, _active(a, tokens, attention_mask))


def matched(alike: Float[Tensor, "K A"]) -> list[tuple[int, int]]:
    """Pairs (row, column), the most alike first, each row and each column once."""
    left, pairs = alike.clone(), []
    for _ in range(min(alike.shape)):
        k, a = divmod(int(left.argmax()), alike.shape[1])
        pairs.append((k, a))
        left[k], left[:, a] = -1.0, -1.0
    return pairs


def _active(d: Decomposition, tokens: TokensLike, attention_mask: Any) -> dict[str, list[int]]:
    return {name: torch.nonzero(alive).flatten().tolist() for name, alive in census(d, tokens, attention_mask=attention_mask).alive.items()}


@torch.no_grad()
def _recovery(d: Decomposition, wanted: Mapping[str, tuple[Tensor, Tensor, list[int]]], active: Mapping[str, list[int]]) -> Recovery:
    alike = {}
    for name, (V, U, _) in wanted.items():
        c, some = d.components[name], active[name]
        alike[name] = likeness(V.to(c.V), U.to(c.U), c.V[:, some], c.U[some]).cpu()
    return Recovery(alike, {name: numbers for name, (_, _, numbers) in wanted.items()}, {name: active[name] for name in wanted})


def _check_pieces(d: Decomposition, name: str, pieces: Any) -> None:
    site = d.sites[name]
    if not (isinstance(pieces, (tuple, list)) and len(pieces) == 2 and all(isinstance(part, Tensor) for part in pieces)):
        raise SPDError(
            f"truth[{name!r}] was given as {brief(pieces)}; it has to be two tensors, V [{site.d_in}, K] and U [K, {site.d_out}]."
        )
    V, U = pieces
    if V.ndim != 2 or U.ndim != 2 or len(V) != site.d_in or U.shape[1] != site.d_out or V.shape[1] != len(U) or not len(U):
        raise SPDError(f"truth[{name!r}] has V {list(V.shape)} and U {list(U.shape)}; they have to be [{site.d_in}, K] and [K, {site.d_out}], K at "
                       "least 1: transpose them if they are the other way round.")  # fmt: skip
    lengths = V.norm(dim=0) * U.norm(dim=1)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        bad = torch.nonzero(~(torch.isfinite(lengths) & (lengths > 0))).flatten().tolist()
        raise SPDError(f"truth[{name!r}]: the pieces {brief(bad)} have no length, or are not finite; leave them out.")
