"""Whether the subcomponents of an induction circuit do what the circuit needs (arXiv 2511.08854, section 4).

The task: the special token s stands at `s1` and again at `s2`, where the model has to say `m`, the token that followed the first s.
The circuit, one head in each of two layers:

1. `positional_alignment` Q0 at position i asks for position i - 1 and K0 answers for s there, so that m attends to s1.
2. `match`                V0 writes "I follow s" at m; K1 reads that, and Q1 at s2 finds m by it.
3. `copying`              V1, W_O and the unembedding turn the token at m into its own logit.
4. `attention`            m→s1 and s2→m, in the original model and with only the active subcomponents left.
5. `intervene`            each mechanism is cut out of the original model, and as much of something else for comparison.

1 to 3 read clean inputs and weights, and show what the subcomponents could do; 4 and 5 show what the model does with them. What a matrix
reads is taken from a forward pass and never from a model's parameters, so that it does not matter where positions come in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from math import comb
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens import masks
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import double, steady
from spd_lens.sites import Site, find_sites
from spd_lens.tokens import TokensLike

Given = Any  # an integer tensor [N]; anything else is refused in words

LABELS = ("s1", "m", "s2")
NEEDED = tuple(f"blocks.{layer}.attn.W_{matrix}" for layer in (0, 1) for matrix in "QKV")
MECHANISMS = {  # claim → the sites whose active subcomponents it names
    "previous token": ("blocks.0.attn.W_[QK]",),
    "flag": ("blocks.0.attn.W_[VO]",),
    "match": ("blocks.1.attn.W_[QK]",),
    "copy": ("blocks.1.attn.W_[VO]",),
    "layer 0": ("blocks.0.*",),
    "layer 1": ("blocks.1.*",),
    "everything": ("blocks.*",),
}
ATTENDING = {0: "m", 1: "s2"}  # layer → the position whose attention makes the circuit
BATCH = 256  # sequences run at once: attention of more leaves the cache, and takes three times as long
TOLERANCE = 1e-3  # of attention computed from what Q and K read, against the model's own
TINY = 1e-12  # below any norm that means something


# --- what is looked at ---


@dataclass(frozen=True, eq=False)
class Circuit:
    """A decomposed model on sequences of which the roles of the positions are known; `read_circuit` makes one.

    Attributes:
        decomposition: of a model with two layers of one head.
        tokens: `[N, s]`.
        positions: label → `[N]`; `s1`, `m` and `s2`, and any others.
        answers: `[N]`, the token to be said at s2.
        special: s.
        x_query: `[N, s, d_in]`, what layer 0's W_Q reads in the clean pass.
        inner: site → `[N, s, C]`, `v_c·x` of the clean pass.
        active: site → `[N, s, C]`, importance above 0.5.
        scores: layer → `[N, s]`, the original score of every key (hidden ones too): of the query at m in layer 0, at s2 in layer 1.
        attended: layer → `[N, s]`, the original attention of the same queries.
        correct: `[N]`, whether the original model says the answer.
    """

    decomposition: Decomposition
    tokens: Int[Tensor, "N s"]
    positions: dict[str, Int[Tensor, " N"]]
    answers: Int[Tensor, " N"]
    special: int
    x_query: Float[Tensor, "N s d_in"]
    inner: dict[str, Float[Tensor, "N s C"]]
    active: dict[str, Bool[Tensor, "N s C"]]
    scores: dict[int, Float[Tensor, "N s"]]
    attended: dict[int, Float[Tensor, "N s"]]
    correct: Bool[Tensor, " N"]

    @property
    def rows(self) -> Int[Tensor, " N"]:
        return torch.arange(len(self.tokens), device=self.tokens.device)

    @property
    def alive(self) -> dict[str, list[int]]:
        """Site → its subcomponents that are active at any position of any sequence."""
        return {name: torch.nonzero(on.flatten(0, 1).any(0)).flatten().tolist() for name, on in self.active.items()}

    def often(self, share: float = 0.5) -> dict[str, dict[str, list[int]]]:
        """Position → `Q0` … → subcomponents that are active there in at least this share of the sequences."""
        sites = self.decomposition.sites
        return {
            label: {
                sites[name].short: torch.nonzero(on[self.rows, index].float().mean(0) >= share).flatten().tolist()
                for name, on in self.active.items()
            }
            for label, index in self.positions.items()
        }

    def pairs(self, layer: int) -> tuple[list[int], list[int], Float[Tensor, "q k"]]:
        """The layer's active Q and K subcomponents, and `u_q·u_k/√d_head`: the score of a pair per unit of both inner activations."""
        query, key = (f"blocks.{layer}.attn.W_{matrix}" for matrix in "QK")
        q, k, components = self.alive[query], self.alive[key], self.decomposition.components
        U_q, U_k = components[query].U.detach()[q], components[key].U.detach()[k]
        return q, k, U_q @ U_k.T / U_q.shape[1] ** 0.5

    def visible(self, layer: int) -> Bool[Tensor, "N s"]:
        """The keys that the layer's query sees."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) <= self.positions[ATTENDING[layer]][:, None]

    def pair_scores(self, layer: int) -> Float[Tensor, "N s"]:
        """What the layer's active pairs add up to: the score of every key for the layer's query."""
        q, k, gram = self.pairs(layer)
        asking = self.inner[f"blocks.{layer}.attn.W_Q"][self.rows, self.positions[ATTENDING[layer]]][:, q]
        return torch.einsum("nq,qk,njk->nj", asking, gram, self.inner[f"blocks.{layer}.attn.W_K"][..., k])

    def __repr__(self) -> str:
        return f"Circuit on {len(self.tokens)} sequences of {self.tokens.shape[1]} tokens of a {self.decomposition!r}"


@steady()
def read_circuit(decomposition: Decomposition, tokens: TokensLike, positions: Mapping[str, Given], answers: Given, special: int) -> Circuit:
    """Check that this is an induction circuit as the diagnostics mean it, and run the clean pass that they share.

    Args:
        tokens: `[N, s]`, with s at s1 and s2.
        positions: label → index `[N]`: `s1`, `m` (the position after s1) and `s2` (behind m); others may be there.
        answers: `[N]`.
        special: the id of s.

    Raises:
        SPDError: the model does not have two layers of one head with plain scores `q·k/√d_head`, a site is not decomposed, or the
            positions do not point at what they should.
    """
    _check_model(decomposition)
    batch = decomposition.batch(tokens)
    if batch.real is not None:
        raise SPDError("the sequences are padded, and the diagnostics read a circuit of sequences of one length; give those alone, or name_tokens instead of a "
                       "tokenizer whose padding token is one of the task's.")  # fmt: skip
    tokens = batch.ids
    positions = {label: _index(label, index, tokens) for label, index in positions.items()}
    if missing := [label for label in LABELS if label not in positions]:
        raise SPDError(f"positions were given for {', '.join(positions) or 'nothing'}; {', '.join(missing)} is missing too. Give one index "
                       "[N] each for s1 (the special token), m (the token after it) and s2 (the special token again).")  # fmt: skip
    _check_roles(tokens, positions, answers, special)
    answers, rows = answers.to(tokens.device), torch.arange(len(tokens), device=tokens.device)
    clean = decomposition.trace(tokens)
    inner, z = decomposition.importance_logits(clean.inputs)
    scores = {layer: _scores(decomposition, clean.inputs, layer, positions[label]) for layer, label in ATTENDING.items()}
    attended = _attended(decomposition, tokens, positions)
    for layer, label in ATTENDING.items():
        _check_scores(layer, scores[layer], attended[layer], positions[label])
    return Circuit(
        decomposition, tokens, positions, answers, special, clean.inputs["blocks.0.attn.W_Q"], inner, {name: z[name] > masks.THRESHOLD for name in z}, scores, attended,
        clean.logits[rows, positions["s2"]].argmax(-1) == answers,
    )  # fmt: skip


def _check_model(decomposition: Decomposition) -> None:
    if missing := [name for name in NEEDED if name not in decomposition.sites]:
        raise SPDError(f"{', '.join(missing)} not decomposed here ({', '.join(decomposition.sites)} are); the diagnostics read Q, K and V of "
                       'both layers. Decompose with sites=("blocks.*.attn.W_[QKV]",) or more.')  # fmt: skip
    layers, heads = decomposition.model.cfg.n_layers, max(decomposition.sites[name].heads for name in NEEDED)
    if layers != 2 or heads != 1:
        raise SPDError(f"the model has {layers} layers with up to {heads} heads; the diagnostics read a circuit of 2 layers of 1 head. "
                       "Elsewhere use census, verify and Decomposition.ablate.")  # fmt: skip


def _index(label: str, index: Given, tokens: Tensor) -> Tensor:
    shape = list(index.shape) if isinstance(index, Tensor) else type(index).__name__
    if not isinstance(index, Tensor) or index.is_floating_point() or index.shape != (len(tokens),):
        raise SPDError(f"positions[{label!r}] was given as {shape}; give an integer tensor [{len(tokens)}], one position a sequence.")
    if int(index.min()) < 0 or int(index.max()) >= tokens.shape[1]:
        raise SPDError(f"positions[{label!r}] runs from {int(index.min())} to {int(index.max())}; the sequences have the positions "
                       f"0 … {tokens.shape[1] - 1}.")  # fmt: skip
    return index.to(tokens.device, torch.long)


def _check_roles(tokens: Tensor, positions: Mapping[str, Tensor], answers: Given, special: int) -> None:
    if not isinstance(answers, Tensor) or answers.is_floating_point() or answers.shape != (len(tokens),):
        shape = list(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
        raise SPDError(f"answers were given as {shape}; give an integer tensor [{len(tokens)}], the token to be said at s2.")
    rows = torch.arange(len(tokens), device=tokens.device)
    s1, m, s2 = (positions[label] for label in LABELS)
    for label in ("s1", "s2"):
        if len(wrong := torch.nonzero(tokens[rows, positions[label]] != special)):
            n = int(wrong[0])
            raise SPDError(f"positions[{label!r}] of sequence {n} is {int(positions[label][n])}, where token {int(tokens[n, positions[label][n]])} "
                           f"stands; the special token was given as {special}. Give its id, and where it stands.")  # fmt: skip
    if len(wrong := torch.nonzero((m != s1 + 1) | (m >= s2))):
        n = int(wrong[0])
        raise SPDError(f"sequence {n} has s1 {int(s1[n])}, m {int(m[n])} and s2 {int(s2[n])}; m has to be s1 + 1, and s2 behind it. "
                       "Leave out sequences that begin otherwise.")  # fmt: skip


def _scores(decomposition: Decomposition, inputs: Mapping[str, Tensor], layer: int, at: Tensor) -> Float[Tensor, "N s"]:
    """Original scores of the query at one position of each sequence, from what Q and K read."""
    query, key = (f"blocks.{layer}.attn.W_{matrix}" for matrix in "QK")
    asking = _projected(decomposition.sites[query], inputs[query][torch.arange(len(at), device=at.device), at])
    return torch.einsum("nd,njd->nj", asking, _projected(decomposition.sites[key], inputs[key])) / asking.shape[-1] ** 0.5


def _projected(site: Site, x: Tensor) -> Tensor:
    return x @ site.weight if site.bias is None else x @ site.weight + site.bias


def _check_scores(layer: int, scores: Float[Tensor, "N s"], attended: Float[Tensor, "N s"], at: Int[Tensor, " N"]) -> None:
    """Rotary positions, a window, another scale: then a pair of subcomponents does not make the score that it is said to make here."""
    hidden = torch.arange(scores.shape[1], device=scores.device) > at[:, None]
    worst = float((scores.masked_fill(hidden, -torch.inf).softmax(-1) - attended).abs().max())
    if not worst < TOLERANCE:
        raise SPDError(f"layer {layer} attends otherwise than softmax(q·k/√d_head) over the positions up to the query's (by up to {worst:.2g}): "
                       "rotary positions, a window, a soft cap or another scale? The diagnostics need plain causal scores.")  # fmt: skip


def _attended(
    decomposition: Decomposition, tokens: Tensor, positions: Mapping[str, Tensor], hard: Mapping[str, Tensor] | None = None
) -> dict[int, Float[Tensor, "N s"]]:
    """Layer → attention of the layer's query, in the original model or under masks. A model's `hook_attn_scores` would not do:
    TransformerBridge's native attention gives what follows the softmax there."""
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in ATTENDING}
    found: dict[int, list[Tensor]] = {layer: [] for layer in names}
    for part in torch.arange(len(tokens), device=tokens.device).split(BATCH):
        some = None if hard is None else {name: mask[part] for name, mask in hard.items()}
        _, cache = decomposition.run_with_cache(tokens[part], masks=some, names_filter=lambda name: name in names.values())
        for layer, name in names.items():
            pattern = cache[name][:, 0]
            found[layer].append(pattern[torch.arange(len(pattern), device=pattern.device), positions[ATTENDING[layer]][part]])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


# --- 1: m attends to the token before it ---


@dataclass(frozen=True, eq=False)
class PositionalAlignment:
    """How Q0 and K0 make position i look at position i - 1 when s stands there.

    Attributes:
        queries, keys: Q0's and K0's active subcomponents.
        form: `[q, k, i, j]`, the score of each pair for the query at i (mean over the tokens seen there, s apart; 0 where s
            alone is seen) and s at j.
        original_form: `[i, j]`, the same of the original matrices, biases included.
        rows: the positions that m takes; figures are means over these rows of the form.
        contrast: `[q, k]`, what each pair adds, on average, to score(m, s1) minus the mean score of m's other visible keys.
        original_contrast: the same of the original model.
        picks_s1: share of sequences in which s1 is the one visible key that the active pairs score highest at m.
        picks_s1_original: the same of the original scores.
        correlation: Pearson's, of the pairs' scores with the original ones over m's visible keys; mean over sequences.
    """

    queries: list[int]
    keys: list[int]
    form: Float[Tensor, "q k i j"]
    original_form: Float[Tensor, "i j"]
    rows: Int[Tensor, " r"]
    contrast: Float[Tensor, "q k"]
    original_contrast: float
    picks_s1: float
    picks_s1_original: float
    correlation: float

    @property
    def by_key(self) -> Float[Tensor, "k i j"]:
        """The form of each K0 subcomponent with all of Q0's active ones."""
        return self.form.sum(0)

    @property
    def share(self) -> Float[Tensor, " k"]:
        """Each K0 subcomponent's share of the original contrast."""
        return self.contrast.sum(0) / self.original_contrast

    def table(self) -> pd.DataFrame:
        """One row for the original, one for all pairs, one per K0 subcomponent (with all of Q0), one per pair. `off by one`: share of rows i whose best visible
        column is i - 1; `advantage`: entry i - 1 minus the mean of the row's other visible columns, in score units."""
        forms = {"original": (self.original_form, self.original_contrast), "Q0×K0": (self.form.sum((0, 1)), self.contrast.sum())}
        forms |= {f"Q0×K0.{k}": (self.by_key[e], self.contrast[:, e].sum()) for e, k in enumerate(self.keys)}
        forms |= {
            f"Q0.{q}×K0.{k}": (self.form[c, e], self.contrast[c, e]) for c, q in enumerate(self.queries) for e, k in enumerate(self.keys)
        }
        rows = {}
        for label, (form, contrast) in forms.items():
            share, advantage = off_by_one(form, self.rows)
            rows[label] = {"off by one": share, "advantage": advantage, "share of contrast": float(contrast / self.original_contrast)}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("pair")

    def __repr__(self) -> str:
        return self.table().to_string(float_format="%.3f")


def off_by_one(form: Float[Tensor, "i j"], rows: Int[Tensor, " r"]) -> tuple[float, float]:
    """Of these rows i > 0, seen up to column i: how many have their one best column at i - 1, and its mean lead over the row's mean."""
    i, j = torch.meshgrid(*(torch.arange(n, device=form.device) for n in form.shape), indexing="ij")
    others = ((j <= i) & (j != i - 1))[rows]
    before, form = form[rows, rows - 1], form[rows]
    best = form.masked_fill(~others, -torch.inf).amax(-1)
    mean = (form * others).sum(-1) / others.sum(-1)
    return float((before > best).float().mean()), float((before - mean).mean())


@steady()
def positional_alignment(circuit: Circuit) -> PositionalAlignment:
    """Step 1, from the inputs of Q0 and K0."""
    d, positions, rows = circuit.decomposition, circuit.positions, circuit.rows
    query, key = "blocks.0.attn.W_Q", "blocks.0.attn.W_K"
    q, k, gram = circuit.pairs(0)

    placed = circuit.tokens[:1].repeat(circuit.tokens.shape[1], 1).fill_diagonal_(circuit.special)  # row j has s at j
    x_special = d.trace(placed).inputs[key].diagonal(dim1=0, dim2=1).T
    usual = (circuit.tokens != circuit.special).to(circuit.x_query.dtype)[..., None]
    x_usual = (circuit.x_query * usual).sum(0) / usual.sum(0).clamp_min(1)
    form = torch.einsum("iq,qk,jk->qkij", x_usual @ d.components[query].V[:, q], gram, x_special @ d.components[key].V[:, k])
    original = _projected(d.sites[query], x_usual) @ _projected(d.sites[key], x_special).T / d.sites[query].d_out ** 0.5

    visible, s1 = circuit.visible(0), positions["s1"]
    contrasting = -visible.to(form.dtype) / (visible.sum(1, keepdim=True) - 1)  # contrast = Σ_j contrasting_j · score_j
    contrasting[rows, s1] = 1.0
    told_apart = torch.einsum("nj,njk->nk", contrasting, circuit.inner[key][..., k])
    contrast = torch.einsum("nq,qk,nk->qk", circuit.inner[query][rows, positions["m"]][:, q], gram, told_apart) / len(rows)

    own, scores = circuit.scores[0], circuit.pair_scores(0)
    return PositionalAlignment(
        q, k, form, original, positions["m"].unique(), contrast, float((contrasting * own).sum(1).mean()),
        _picked(scores, s1, visible), _picked(own, s1, visible), float(_pearson(scores, own, visible).mean()),
    )  # fmt: skip


# --- 2: s2 finds m by what layer 0 wrote there ---


@dataclass(frozen=True, eq=False)
class Match:
    """Whether Q1 and K1 find m, and whether they do it by what layer 0 wrote for s.

    Attributes:
        queries, keys: Q1's and K1's active subcomponents.
        picks_m: share of sequences in which m is the one visible key that they score highest at s2.
        picks_m_original: the same of the original scores.
        correlation: Pearson's, of their scores with the original ones over the visible keys; mean over sequences. 0 where one is constant.
        cosine: `[k]`, `|cos|` of `v_k` of K1 with what layer 0's V and W_O write for s (biases apart).
        rank_by_cosine: `[k]`, the place of s among all tokens by that cosine; 1 is the first.
        rank_by_projection: `[k]`, the same by `|v_k · what is written|`, which counts how much is written too.
    """

    queries: list[int]
    keys: list[int]
    picks_m: float
    picks_m_original: float
    correlation: float
    cosine: Float[Tensor, " k"]
    rank_by_cosine: Int[Tensor, " k"]
    rank_by_projection: Int[Tensor, " k"]

    def table(self) -> pd.DataFrame:
        """One row per K1 subcomponent."""
        columns = {"|cos|": self.cosine, "rank by cosine": self.rank_by_cosine, "rank by projection": self.rank_by_projection}
        index = pd.Index([f"K1.{k}" for k in self.keys], name="subcomponent")
        return pd.DataFrame({name: value.tolist() for name, value in columns.items()}, index=index)


@steady()
def match(circuit: Circuit) -> Match:
    """Step 2, from the inputs of Q1, K1 and V0."""
    d, (q, k, _) = circuit.decomposition, circuit.pairs(1)
    visible, m, scores = circuit.visible(1), circuit.positions["m"], circuit.pair_scores(1)

    written = token_inputs(d) @ d.sites["blocks.0.attn.W_V"].weight @ find_sites(d.model, "blocks.0.attn.W_O")["blocks.0.attn.W_O"].weight
    V = d.components["blocks.1.attn.W_K"].V[:, k]
    projection = (written @ V).abs()  # [vocabulary, k]
    cosine = projection / (written.norm(dim=1, keepdim=True) * V.norm(dim=0)).clamp_min(TINY)
    return Match(
        q, k, _picked(scores, m, visible), _picked(circuit.scores[1], m, visible), float(_pearson(scores, circuit.scores[1], visible).mean()),
        cosine[circuit.special], _place(cosine, circuit.special), _place(projection, circuit.special),
    )  # fmt: skip


def token_inputs(decomposition: Decomposition) -> Float[Tensor, "vocabulary d"]:
    """What layer 0's W_V reads of each token of the vocabulary at position 0: its embedding, as far as layer 0 can see."""
    alone = torch.arange(decomposition.model.cfg.d_vocab, device=next(iter(decomposition.sites.values())).weight.device)[:, None]
    return decomposition.trace(alone).inputs["blocks.0.attn.W_V"][:, 0]


def _picked(scores: Tensor, at: Tensor, visible: Tensor) -> float:
    """How often the key `at` is scored above all other visible ones: a tie, as among scores of nothing, picks nothing."""
    others = scores.masked_fill(~visible, -torch.inf).scatter(1, at[:, None], -torch.inf)
    return float((scores.gather(1, at[:, None])[:, 0] > others.amax(1)).float().mean())


def _pearson(a: Tensor, b: Tensor, where: Tensor) -> Float[Tensor, " N"]:
    def centred(x: Tensor) -> Tensor:
        return torch.where(where, x - (x * where).sum(1, keepdim=True) / where.sum(1, keepdim=True), 0.0)

    a, b = centred(a), centred(b)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(TINY)


def _place(values: Float[Tensor, "vocabulary k"], token: int) -> Int[Tensor, " k"]:
    return 1 + (values > values[token]).sum(0)


# --- 3: V1 copies ---


@dataclass(frozen=True, eq=False)
class Copying:
    """Whether layer 1 turns the token that it attends to into that token's logit: embedding → V1 → W_O → unembedding, biases apart.

    Attributes:
        values: V1's active subcomponents.
        own_logit_largest: `active` (they alone) and `original` (the whole of W_V): share of tokens, s apart, whose own logit is the largest.
        eigenvalues: the same two: `Σλ / Σ|λ|` of the map from tokens to logits; 1 copies every direction, -1 suppresses it (Elhage et al.
            2021, "A mathematical framework for transformer circuits", on copying heads).
        effective_rank: `(Σσ)² / Σσ²` of W_V: about how many subcomponents of equal size it takes.
    """

    values: list[int]
    own_logit_largest: dict[str, float]
    eigenvalues: dict[str, float]
    effective_rank: float

    def table(self) -> pd.DataFrame:
        """The active subcomponents beside the whole matrix."""
        return pd.DataFrame({"own logit largest": self.own_logit_largest, "Σλ/Σ|λ|": self.eigenvalues}).rename_axis("V1")


@steady()
def copying(circuit: Circuit) -> Copying:
    """Step 3, from the embeddings as W_V reads them in layer 0."""
    d, name = circuit.decomposition, "blocks.1.attn.W_V"
    embedded, values = token_inputs(d), circuit.alive[name]
    onward = find_sites(d.model, "blocks.1.attn.W_O")["blocks.1.attn.W_O"].weight @ d.model.W_U.detach()
    usual = torch.arange(len(embedded), device=embedded.device) != circuit.special
    whole, components = d.sites[name].weight, d.components[name]
    largest, eigenvalues = {}, {}
    for kind, matrix in {"active": components.V[:, values] @ components.U[values], "original": whole}.items():
        logits = embedded @ matrix @ onward
        own = logits.diagonal()[:, None]
        largest[kind] = float(((logits >= own).sum(1) == 1)[usual].float().mean())  # none as large: no logits at all copy nothing
        spectrum = torch.linalg.eigvals(double(matrix @ onward @ embedded))  # those of [vocabulary, vocabulary] that are not 0
        eigenvalues[kind] = float(spectrum.real.sum() / spectrum.abs().sum().clamp_min(TINY))
    sigma = torch.linalg.svdvals(double(whole))
    return Copying(values, largest, eigenvalues, float(sigma.sum() ** 2 / sigma.square().sum().clamp_min(TINY)))


# --- 4: attention ---


@steady()
def attention(circuit: Circuit) -> dict[str, dict[str, float]]:
    """`m→s1` (layer 0) and `s2→m` (layer 1): mean attention of the `original` model and under `hard` masks."""
    hard = {name: on.to(circuit.inner[name].dtype) for name, on in circuit.active.items()}
    kinds = {"original": circuit.attended, "hard": _attended(circuit.decomposition, circuit.tokens, circuit.positions, hard)}

    def mean(layer: int, source: str) -> dict[str, float]:
        return {kind: float(attended[layer][circuit.rows, circuit.positions[source]].mean()) for kind, attended in kinds.items()}

    return {"m→s1": mean(0, "s1"), "s2→m": mean(1, "m")}


# --- 5: intervening ---


@dataclass(frozen=True, eq=False)
class Claim:
    """A mechanism is these subcomponents: without them the original model should fail, without as many others it should not.

    Attributes:
        name: of the mechanism.
        subcomponents: site → indices, as for `Decomposition.ablate`.
        accuracy_without: of the original model with exactly these cut out.
        control_accuracies: with as many other active ones cut out, one per draw; empty where there are not that many. They belong to
            the same circuit, so that the model may well fail without them too.
        idle_accuracies: with as many never-active ones cut out, one per draw; these should change nothing.
        others: how many other active ones there are.
        idle: how many never-active ones there are.
    """

    name: str
    subcomponents: dict[str, list[int]]
    accuracy_without: float
    control_accuracies: list[float]
    idle_accuracies: list[float]
    others: int
    idle: int

    @property
    def size(self) -> int:
        return sum(map(len, self.subcomponents.values()))

    @property
    def note(self) -> str:
        """Why a control is missing or is fewer draws than asked for; empty where both are there."""
        if not self.size:
            return "names no active subcomponent: nothing was cut"
        pools = {"other active": (self.others, self.control_accuracies), "never-active": (self.idle, self.idle_accuracies)}
        few = [f"{self.size} needed, {pool} {kind}: no control" for kind, (pool, drawn) in pools.items() if not drawn]
        few += [f"{kind}: only {len(drawn)} different draw{'s' * (len(drawn) > 1)} of {self.size} from {pool}"
                for kind, (pool, drawn) in pools.items() if drawn and comb(pool, self.size) == len(drawn)]  # fmt: skip
        return "; ".join(few)


@dataclass(frozen=True, eq=False)
class Interventions:
    """Every claim, tested.

    Attributes:
        accuracy: of the original model at s2.
        claims: one per mechanism.
    """

    accuracy: float
    claims: list[Claim]

    def __getitem__(self, name: str) -> Claim:
        found = {claim.name: claim for claim in self.claims}
        if name not in found:
            raise SPDError(f"no claim {name!r} was tested; {nearest(name, found)}.")
        return found[name]

    def table(self) -> pd.DataFrame:
        """One row per claim; the controls' means over their draws, empty where there was none."""
        rows = {
            claim.name: {
                "cut": claim.size, "accuracy": self.accuracy, "without": claim.accuracy_without, "without other active": _mean(claim.control_accuracies),
                "without never active": _mean(claim.idle_accuracies), "note": claim.note,
            }
            for claim in self.claims
        }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")

    def __repr__(self) -> str:
        return self.table().to_string(float_format="%.3f")


@steady()
def intervene(
    circuit: Circuit, generator: torch.Generator, draws: int = 4, mechanisms: Mapping[str, Sequence[str]] = MECHANISMS
) -> Interventions:
    """Step 5: cut the active subcomponents of each mechanism out of the original model, and as many others.

    Args:
        generator: draws the controls; on the CPU.
        draws: how many of each kind a claim is compared with.
        mechanisms: claim → patterns of the sites whose active subcomponents it names.
    """
    if draws < 1:
        raise SPDError(f"draws was given as {draws}; a claim needs 1 or more controls to be compared with.")
    alive, components = circuit.alive, circuit.decomposition.components
    active = [(name, c) for name, indices in alive.items() for c in indices]
    idle = [(name, c) for name, indices in alive.items() for c in range(components[name].C) if c not in indices]

    def tested(name: str, patterns: Sequence[str]) -> Claim:
        claimed = [pair for pair in active if any(fnmatchcase(pair[0], pattern) for pattern in patterns)]
        others = [pair for pair in active if pair not in claimed]
        control, never = ([_accuracy(circuit, cut) for cut in _drawn(pool, len(claimed), draws, generator)] for pool in (others, idle))
        return Claim(name, _by_site(claimed), _accuracy(circuit, claimed), control, never, len(others), len(idle))

    return Interventions(float(circuit.correct.float().mean()), [tested(name, patterns) for name, patterns in mechanisms.items()])


Pairs = Sequence[tuple[str, int]]  # (site, subcomponent)


def _drawn(pool: Pairs, many: int, draws: int, generator: torch.Generator) -> list[Pairs]:
    """So many at a time, drawn `draws` times; each choice once where there are no more of them; none where the pool is too small."""
    if not many:
        return []
    if comb(len(pool), many) <= draws:  # 0 where the pool is too small
        return list(combinations(pool, many))
    return [
        [pool[i] for i in torch.randperm(len(pool), generator=generator, device=generator.device)[:many].tolist()] for _ in range(draws)
    ]


def _by_site(pairs: Pairs) -> dict[str, list[int]]:
    return {name: [c for other, c in pairs if other == name] for name in dict.fromkeys(name for name, _ in pairs)}


def _accuracy(circuit: Circuit, cut: Pairs) -> float:
    d, hooks, right = circuit.decomposition, circuit.decomposition.ablate(_by_site(cut)), 0
    for part in circuit.rows.split(BATCH):
        logits = d.model.run_with_hooks(circuit.tokens[part], return_type="logits", fwd_hooks=hooks)
        last = logits[torch.arange(len(part), device=part.device), circuit.positions["s2"][part]]
        right += int((last.argmax(-1) == circuit.answers[part]).sum())
    return right / len(circuit.tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


# --- all of it ---


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All five steps.

    Attributes:
        often: position → `Q0` … → subcomponents active there in at least half of the sequences.
    """

    alignment: PositionalAlignment
    match: Match
    copying: Copying
    attention: dict[str, dict[str, float]]
    interventions: Interventions
    often: dict[str, dict[str, list[int]]]

    def table(self) -> pd.DataFrame:
        """The figures that sum up steps 1 to 4: of the active subcomponents, beside the original model's."""
        a, m, c = self.alignment, self.match, self.copying
        aligned, whole = a.table().loc["Q0×K0"], a.table().loc["original"]
        rows = {
            "Q0×K0: share of sequences in which s1 is picked": (a.picks_s1, a.picks_s1_original),
            "Q0×K0: correlation with the original scores": (a.correlation, 1.0),
            "Q0×K0: share of the contrast of s1 with m's other keys": (aligned["share of contrast"], 1.0),
            "Q0×K0: share of rows whose best column is the one before": (aligned["off by one"], whole["off by one"]),
            "Q0×K0: lead of that column, in score units": (aligned["advantage"], whole["advantage"]),
            "Q1×K1: share of sequences in which m is picked": (m.picks_m, m.picks_m_original),
            "Q1×K1: correlation with the original scores": (m.correlation, 1.0),
            "V1: share of tokens whose own logit is largest": (c.own_logit_largest["active"], c.own_logit_largest["original"]),
            "V1: Σλ/Σ|λ|": (c.eigenvalues["active"], c.eigenvalues["original"]),
            **{f"attention {pair} (active: hard masks)": (kinds["hard"], kinds["original"]) for pair, kinds in self.attention.items()},
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["active", "original"]).rename_axis("figure")

    def __repr__(self) -> str:
        tables = (self.table(), self.alignment.table(), self.match.table(), self.copying.table(), self.interventions.table())
        return "\n\n".join(table.to_string(float_format="%.3f") for table in tables)


@steady()
def diagnose(
    decomposition: Decomposition, tokens: TokensLike, positions: Mapping[str, Given], answers: Given, special: int,
    seed: int = 0, draws: int = 4,
) -> Diagnosis:  # fmt: skip
    """All five steps on these sequences; the arguments are those of `read_circuit` and `intervene`, with the controls drawn from `seed`."""
    circuit = read_circuit(decomposition, tokens, positions, answers, special)
    return Diagnosis(
        positional_alignment(circuit), match(circuit), copying(circuit), attention(circuit),
        intervene(circuit, torch.Generator().manual_seed(seed), draws), circuit.often(),
    )  # fmt: skip
