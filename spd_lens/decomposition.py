"""A model and the subcomponents of its matrices: observe, run, hooks, attached.

One batch's way: tokens `[b, s]` → *observe* (clean pass: logits, the input of every site) → *inner* `x·V` → *importance* →
masks → *run* (each site writes `((x·V) ∘ mask)·U + bias + δ·x·(W - V·U)`) → masked logits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache

from spd_lens.attachment import Attachment, guarded, rewritten
from spd_lens.components import Components, check_delta, check_mask, masked_output
from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError, nearest
from spd_lens.guards import alone, steady
from spd_lens.importance import Importance, lower_leaky
from spd_lens.masks import THRESHOLD
from spd_lens.sites import Hook, Passage, Rewrite, Site, check_unchanged, drops_out, expect_uncompiled, held, is_held, model_device
from spd_lens.suffix import compared_only, recorded, repeated, resumed
from spd_lens.tables import Shown, Tabular
from spd_lens.tokens import TEXT_OPTIONS, Batch, TokensLike, is_text, take_in
from spd_lens.visits import Overheard, rewrite_hooks


@dataclass(frozen=True, eq=False, repr=False)
class Observation(Tabular):
    """What one clean forward pass shows.

    Attributes:
        logits: `[b, s, vocabulary]`, the original model's.
        inner: site → `[b, s, C]`, what each subcomponent reads: `v_c·x`; 0 at padding.
        importances: site → `[b, s, C]` in [0, 1]; 0 at padding.
        real: `[b, s]`, False at padding; None where there is none.
    """

    logits: Float[Tensor, "b s vocabulary"]
    inner: dict[str, Float[Tensor, "b s C"]]
    importances: dict[str, Float[Tensor, "b s C"]]
    real: Bool[Tensor, "b s"] | None = None

    def _shown(self) -> Shown:
        b, s, vocabulary = self.logits.shape
        many = b * s if self.real is None else int(self.real.sum())
        rows = {
            name: {"subcomponents": g.shape[-1], "ever active": int((g > THRESHOLD).flatten(0, 1).any(0).sum()),
                   "active per position": f"{int((g > THRESHOLD).sum()) / many:.3g}", "largest |v·x|": f"{float(self.inner[name].abs().max()):.3g}"}
            for name, g in self.importances.items()
        }  # fmt: skip
        return Shown(f"One clean pass over [{b}, {s}] tokens; logits [{b}, {s}, {vocabulary}], inner and importances [{b}, {s}, C] per site",
                     pd.DataFrame.from_dict(rows, orient="index").rename_axis("site"),
                     f"Active: g > {THRESHOLD}. A count alone proves nothing: read it with verify(decomposition, tokens).")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """What a clean pass leaves for the passes that follow.

    Attributes:
        batch: the tokens, `[b, s]`; every sequence begins at position 0.
        logits: `[b, n, vocabulary]`, the original model's at the compared positions.
        inputs: site → `[b, s, d_in]`, what its matrix reads.
        blocks: what every block returned: a pass that changes nothing before layer l can begin there.
    """

    batch: Batch
    logits: Float[Tensor, "b n vocabulary"]
    inputs: dict[str, Float[Tensor, "b s d_in"]]
    blocks: list[Any]


@dataclass(eq=False, repr=False)
class Decomposition(Tabular):
    """A model with some of its matrices split into rank-one subcomponents. Make one with `spd_lens.decompose`.

    Attributes:
        model: the model itself, unchanged.
        sites: name → `Site`.
        components: name → `Components` with `V [d_in, C]` and `U [C, d_out]`.
        gates: name → the importance function.
        config: how it was made.
        steps_done: training steps behind it.
        history: a few figures of the training, one dict per line of it.
    """

    model: Any
    sites: dict[str, Site]
    components: dict[str, Components]
    gates: dict[str, Importance]
    config: SPDConfig
    steps_done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    _attachment: Attachment | None = field(default=None, init=False)

    # --- looking ---

    @steady()
    def observe(self, tokens: TokensLike, attention_mask: Any = None) -> Observation:
        """One clean pass: the original logits, and per site the inner activations and causal importances.

        Args:
            tokens, attention_mask: as `spd_lens.tokens.take_in` takes them; the results stand at the positions of what was given.
        """
        batch = self.batch(tokens, attention_mask)
        seen = self.look(batch)
        inner, importances = ({name: batch.given(value) for name, value in of.items()} for of in (seen.inner, seen.importances))
        return Observation(batch.given(seen.logits), inner, importances, None if batch.real is None else batch.given(batch.real))

    @steady()
    def look(self, tokens: Batch | Tensor) -> Observation:
        """`observe` in the layout of a `Batch`: every sequence begins at position 0."""
        batch = Batch.of(tokens)
        clean = self.trace(batch)
        inner, z = self.importance_logits(clean.inputs, batch)
        return Observation(
            clean.logits, {name: batch.blanked(a) for name, a in inner.items()},
            {name: batch.blanked(lower_leaky(z[name])) for name in z}, batch.real,
        )  # fmt: skip

    def importances(self, tokens: TokensLike, attention_mask: Any = None) -> dict[str, Float[Tensor, "b s C"]]:
        """Site → causal importances `[b, s, C]` in [0, 1]; arguments as in `observe`."""
        return self.observe(tokens, attention_mask).importances

    def trace(self, tokens: Batch | Tensor, positions: str = "all") -> Trace:
        """A clean pass: the original logits at `all` positions or the `last`, and the input of every site; gradients are kept if they
        are on."""
        inputs: dict[str, Tensor] = {}
        batch = Batch.of(tokens)

        def keep(name: str) -> Rewrite:
            return lambda passage: inputs.__setitem__(name, passage.x)

        with alone(self.model), recorded(self.model) as blocks, compared_only(self.model, batch, positions):
            logits = self._forward(batch, {name: keep(name) for name in self.sites})
        return Trace(batch, batch.compared(logits, positions), {name: inputs[name] for name in self.sites}, blocks)

    def importance_logits(self, inputs: Mapping[str, Tensor], batch: Batch | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per site the inner activations and the logits z of importance, both `[b, s, C]`; `batch` says what is padding (None: nothing)."""
        real = None if batch is None else batch.real
        inner = {name: self.components[name].inner(x) for name, x in inputs.items()}
        return inner, {name: self.gates[name](x, inner[name], real).to(self.components[name].V.dtype) for name, x in inputs.items()}

    # --- running ---

    @steady(gradients=None)
    def run(
        self, tokens: TokensLike, masks: Mapping[str, Tensor], delta: float | int | Tensor = 0.0, attention_mask: Any = None
    ) -> Float[Tensor, "b s vocabulary"]:
        """Logits with the named sites replaced by their masked subcomponents.

        Args:
            tokens, attention_mask: as in `observe`.
            masks: site → tensor that broadcasts to `[b, s, C]`; sites not named stay as they are. `[n, C]` is a mask for each position, and
                refused where it could be one for each sequence as well.
            delta: how much of `W - V·U` is added back; with all masks 1 and delta 1 the result is the original.

        Raises:
            SPDError: an unknown site; a mask of another shape, or not finite.
        """
        batch = self.batch(tokens, attention_mask)
        self.check_masks(masks, delta, batch.shape)
        masks = {name: batch.aligned(mask) for name, mask in masks.items()}
        delta = batch.aligned(delta) if isinstance(delta, Tensor) else delta
        return batch.given(self.masked(batch, masks, delta))

    @steady(gradients=None)
    def masked(
        self, tokens: Batch | Tensor, masks: Mapping[str, Tensor], delta: float | int | Tensor = 0.0
    ) -> Float[Tensor, "b s vocabulary"]:
        """`run` in the layout of a `Batch`: every sequence begins at position 0."""
        return self._forward(tokens, self._replacements(masks, delta), replacing=masks)

    def run_many(
        self, clean: Trace, variants: Sequence[Mapping[str, Tensor]], positions: str = "all", delta: float | int = 0.0
    ) -> Float[Tensor, "V b n vocabulary"]:
        """`run` for each of several sets of masks `[b, s, C]`: the trainer's fast path.

        The variants are stacked along the batch. The blocks before the first replaced matrix are not run again, nor is the original product
        of a matrix that every variant replaces.

        Args:
            clean: the clean pass over the same tokens.
            positions: `all`, or `last`: only the last position's logits.
        """
        batch, many = clean.batch, len(variants)
        names = [name for name in self.sites if any(name in masks for masks in variants)]
        layer = min(map(self.first_layer, variants))
        shared = {name for name in names if all(name in masks for masks in variants)}

        def rewrite(name: str) -> Rewrite:
            replaced = [i for i, masks in enumerate(variants) if name in masks]
            mask = torch.cat([variants[i][name] for i in replaced]) if many > 1 else variants[0][name]
            index = torch.tensor(replaced, device=batch.device)

            def some(passage: Passage) -> Tensor:
                def of(t: Tensor) -> Tensor:
                    return t.unflatten(-3, (many, -1)).index_select(-4, index).flatten(-4, -3)

                assert passage.y is not None
                by_head = None if passage.by_head is None else of(passage.by_head)
                part = Passage(of(passage.x), of(passage.y), passage.bias, by_head)
                new = masked_output(self.components[name], self.sites[name], part, mask, delta).unflatten(-3, (len(replaced), -1))
                original = passage.y.unflatten(-3, (many, -1))
                return original.index_copy(original.ndim - 4, index, new.to(original.dtype)).flatten(-4, -3)

            def all_rows(passage: Passage) -> Tensor:
                return masked_output(self.components[name], self.sites[name], passage, mask, delta)

            return all_rows if name in shared else some

        before = repeated(clean.blocks[layer - 1], len(batch), many) if layer else None
        with alone(self.model), resumed(self.model, before, layer), compared_only(self.model, batch, positions):
            logits = self._forward(batch.repeated(many), {name: rewrite(name) for name in names}, replacing=shared)
        return batch.compared(logits, positions).unflatten(0, (many, -1))

    def first_layer(self, masks: Mapping[str, Tensor]) -> int:
        """The first layer in which these masks replace a matrix."""
        return min((self.sites[name].layer for name in masks), default=0)

    def hooks(self, masks: Mapping[str, Tensor], delta: float | int | Tensor = 0.0) -> list[Hook]:
        """`run` as `(hook name, function)` pairs, for `model.run_with_hooks(tokens, fwd_hooks=…)` and `model.hooks(fwd_hooks=…)`.

        Your own hooks win: a patch upstream of a site is seen by its subcomponents, one on the same point comes after.
        """
        self.check_model()
        return rewrite_hooks(self.model, self.sites, self._replacements(masks, delta), replacing=masks)

    @contextmanager
    def attached(self, masks: Mapping[str, Tensor] | None = None, delta: float | int | Tensor | None = None) -> Iterator[Any]:
        """While it lasts, the model itself has two more hook points a site, `<site>.hook_spd_acts` and `<site>.hook_spd_ci`, `[b, s, C]`:
        its `run_with_cache`, `run_with_hooks`, `hooks(…)` and `generate` know them, and hooks on them may change them.

        Where nothing is changed, the logits are exactly what they were. A changed inner activation is written instead of the original one.
        A changed importance is the subcomponent's mask from then on: 0 ablates it, as `ablate` does. An importance of 0 is shown as the
        smallest positive number, so that a 0 is known for somebody's. Gradients reach what a hook saw: that by an importance is the
        gradient by the mask. The decomposition itself is held fixed.

        Hooks on these points end with the outermost `with`; `model.reset_hooks()` inside leaves ours where they are. Under `generate` with
        a key/value cache the importance functions see the tokens of one pass alone: after the prompt, one at a time.

        Args:
            masks: site → tensor that broadcasts to `[b, s, C]`: the model runs as in `run(tokens, masks, delta)`, and a changed importance
                takes the place of the mask's value. None: everything on; inside another `attached` of this decomposition: what holds there.
            delta: how much of `W - V·U` is added back at the sites that the masks name (without masks: at all sites). None: 0 where masks are
                given, as in `run`, and 1 where none are.

        Yields:
            the model.

        Raises:
            SPDError: unknown sites or masks of a wrong shape; a model that was moved or changed; another decomposition attached to one of the
                sites; the model attached or being decomposed in another thread.
        """
        with alone(self.model, "attached (`with decomposition.attached():`)"), self._attached(masks, delta) as model:
            yield model

    @contextmanager
    def _attached(self, masks: Mapping[str, Tensor] | None, delta: float | int | Tensor | None) -> Iterator[Any]:
        delta = float(masks is None) if delta is None else delta
        if masks is None and not (isinstance(delta, (float, int)) and delta == 1):
            masks = {name: torch.ones_like(c.V[0, 0]) for name, c in self.components.items()}
        self.check_masks({} if masks is None else masks, delta)
        if self._attachment is not None:
            with self._attachment.set_to(masks, delta):
                yield self.model
            return
        self.check_model()
        new = Attachment(self.model, self.sites, self.components, self.gates)
        with new.registered(), new.set_to(masks, delta), Overheard(self.model, new.hear):
            on = rewritten(self.model, self.sites, new.rewrites(), new.replacing, permanent=True)
            with on as hooks, guarded(self.model, hooks, new.points):
                self._attachment = new
                try:
                    yield self.model
                finally:
                    self._attachment = None

    @steady(gradients=None)
    def run_with_cache(
        self, tokens: TokensLike, masks: Mapping[str, Tensor] | None = None, delta: float | int | Tensor | None = None,
        attention_mask: Any = None, **options: Any
    ) -> tuple[Any, ActivationCache | dict[str, Any]]:  # fmt: skip
        """The model's own `run_with_cache`, with `<site>.hook_spd_acts` and `<site>.hook_spd_ci` `[b, s, C]` in the cache; 0 at padding.

        Args:
            tokens, attention_mask: as in `observe`; the model sees them as they are given, padding where it is.
            masks, delta: as in `attached`; without them the model is as it is.
            options: `run_with_cache`'s own, e.g. `names_filter`, `stop_at_layer`, `pos_slice`, `prepend_bos`, `padding_side`.
        """
        texts = {key: options[key] for key in TEXT_OPTIONS if key in options}
        batch = self.batch(tokens, attention_mask, **texts)
        self.check_masks({} if masks is None else masks, 0.0 if delta is None else delta, batch.shape)
        given = tokens if is_text(tokens) else batch.given(batch.ids)  # of texts the model itself makes tokens, as it does without us
        options = options if is_text(tokens) else {**batch.given_arguments, **options}
        with self._attached(masks, delta):
            return self.model.run_with_cache(given, **options)

    # --- changing the original weights ---

    def ablate(self, chosen: Any, positions: Any = None, examples: Any = None, strength: Any = 1.0) -> list[Hook]:
        """Hooks that take exactly these subcomponents out of the *original* model: `y - strength·Σ_c (x·v_c)·u_c`.

        They are `(hook name, function)` pairs for `model.run_with_hooks(tokens, fwd_hooks=…)` and `model.hooks(fwd_hooks=…)`, go together with
        any other hooks, and work under `generate` with its key/value cache.

        Args:
            chosen: site → indices of its subcomponents: one, a sequence, or an integer tensor. `{}` gives no hooks.
            positions: where in the sequence; None: everywhere. A sequence of integers; a slice; or a tensor of bool or float which broadcasts
                to `[b, s]`. They count from the beginning of the whole sequence, also where a cache holds the beginning; negative ones count
                from the end of what the pass has seen. Of positions still to be generated, `slice(a, None)` alone speaks.
            examples: rows of the batch; None: all.
            strength: 1 takes them out, 0 leaves them, -1 doubles them.

        Raises:
            SPDError: an unknown site, subcomponent, position or example; in the pass itself where it is known only there.
        """
        from spd_lens.interventions import ablate

        return ablate(self, chosen, positions, examples, strength)

    def keep(self, chosen: Any, positions: Any = None, examples: Any = None, strength: Any = 1.0) -> list[Hook]:
        """The opposite of `ablate`, with the same arguments: of the named sites' subcomponents these alone stay. `W - V·U` stays too, and so
        do sites that are not named; `{site: []}` takes out all of a site's."""
        from spd_lens.interventions import keep

        return keep(self, chosen, positions, examples, strength)

    def project_out(self, chosen: Any, side: Any = "input", positions: Any = None, examples: Any = None, strength: Any = 1.0) -> list[Hook]:
        """Hooks for orthogonal projection (arXiv 2511.08854, section 3): `x ← x - (x·v̂)v̂`; of several, of all that they span.

        Args:
            chosen, positions, examples, strength: as in `ablate`.
            side: `input`: what this matrix reads, of the `v_c` (other readers of the same x see it whole). `output`: what it writes, of the
                `u_c`: the bias is projected too, except where the hook comes before it is added (`use_attn_result`, and W_in of a gated
                MLP in a HookedTransformer).

        Raises:
            SPDError: as in `ablate`, or a side of another name.
        """
        from spd_lens.interventions import project_out

        return project_out(self, chosen, side, positions, examples, strength)

    def rewire(self, swap_outputs: Any = (), set_output: Any = None, calibrate_on: Any = None) -> list[Hook]:
        """Hooks that give subcomponents of the original model other output directions (arXiv 2607.13047).

        Args:
            swap_outputs: pairs `((site, index), (site, index))` which exchange theirs.
            set_output: `{(site, index): new}`: a vector `[d_out]`, taken as it is; or a token's id or text, on W_O and W_out: the direction
                of its column in W_U, with the norm of what it replaces.
            calibrate_on: tokens `[n, s]`, or text: each of a pair then writes, where it is strongest on them, exactly what the other wrote
                where that was strongest. Without it the rows of U are exchanged as they stand, whose length and sign are a matter of
                training: only the product `v_c ⊗ u_c` is learnt.

        Raises:
            SPDError: an unknown subcomponent or one named twice, different widths, a vector of another shape or not finite, a token where
                none can be written, a text of several tokens; one of a pair that is active nowhere on `calibrate_on`.
        """
        from spd_lens.interventions import rewire

        return rewire(self, swap_outputs, set_output, calibrate_on)

    def edited_model(
        self,
        remove: Any = None,
        swap_outputs: Any = (),
        set_output: Any = None,
        calibrate_on: Any = None,
    ) -> Any:
        """An independent model of the same class with the change in its weights: what `ablate` and `rewire` do, without hooks.

        It has none of the hooks that are on this model's hook points, and is saved and loaded like any other
        (`state_dict`, `load_state_dict`). Of a TransformerBridge the wrapped Hugging Face model is changed too where the bridge computes with
        its weights (`docs/interventions.md`).

        Args:
            remove: site → indices of subcomponents to take out.
            swap_outputs, set_output, calibrate_on: as in `rewire`.

        Raises:
            SPDError: as in `ablate` and `rewire`; tied or quantised weights, or a matrix of another shape than was decomposed; a copy that
                does not give what the hooks give on a few tokens. This model is never changed.
        """
        from spd_lens.interventions import edited_model

        return edited_model(self, remove, swap_outputs, set_output, calibrate_on)

    # --- keeping ---

    @steady()
    def save(self, folder: str | Path) -> Path:
        """Write `decomposition.json` and `decomposition.safetensors` into `folder`; see `spd_lens.storage`."""
        from spd_lens.storage import save_decomposition

        return save_decomposition(self, folder)

    @staticmethod
    def load(folder: str | Path, model: Any) -> "Decomposition":
        """A saved decomposition of this `model`; nothing is unpickled."""
        from spd_lens.storage import load_decomposition

        return load_decomposition(folder, model)

    # --- the rest ---

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for module in (*self.components.values(), *self.gates.values()) for p in module.parameters()]

    def state(self) -> dict[str, Tensor]:
        """Every learned tensor by name: `<site>.V`, `<site>.U`, `<site>.importance.<parameter>`."""
        state = {f"{name}.{key}": value for name, c in self.components.items() for key, value in c.state_dict().items()}
        state |= {f"{name}.importance.{key}": value for name, g in self.gates.items() for key, value in g.state_dict().items()}
        return state

    @steady()
    def batch(self, tokens: TokensLike, attention_mask: Any = None, **options: Any) -> Batch:
        """Checked tokens on the model's device, with their padding known; arguments as in `spd_lens.tokens.take_in`."""
        return take_in(self.model, tokens, attention_mask, **options)

    def check_chosen(self, chosen: Mapping[str, Sequence[int]]) -> None:
        for name, indices in chosen.items():
            self._check_site(name)
            C = self.components[name].C
            for index in indices:
                if not 0 <= index < C:
                    raise SPDError(f"{name}: subcomponent {index} was given; it has 0 … {C - 1}.")

    def _check_site(self, name: str) -> None:
        if name not in self.sites:
            raise SPDError(f"{name!r} is not decomposed here; {nearest(name, self.sites)}.")

    def check_masks(self, masks: Any, delta: Any, batch: Sequence[int] | None = None) -> None:
        """Before a pass over tokens of this shape (None: where that is not known yet)."""
        if not isinstance(masks, Mapping):
            raise SPDError(f"masks were given as {type(masks).__name__}; give a mapping from a site's name to its mask, e.g. "
                           "{'blocks.0.attn.W_Q': torch.ones(())}.")  # fmt: skip
        check_delta(delta, batch)
        for name, mask in masks.items():
            self._check_site(name)
            check_mask(name, mask, self.components[name].C, batch)
            if not all_finite(mask):
                raise SPDError(f"{name}: the mask holds NaN or infinite values; masks are finite numbers, 0 for off and 1 for on.")

    def _replacements(
        self, masks: Mapping[str, Tensor], delta: float | int | Tensor, batch: Sequence[int] | None = None
    ) -> dict[str, Rewrite]:
        def replace(name: str, mask: Tensor) -> Rewrite:
            def rewrite(passage: Passage) -> Tensor:
                check_mask(name, mask, self.components[name].C, passage.x.shape[:2])
                check_delta(delta, passage.x.shape[:2])
                return masked_output(self.components[name], self.sites[name], passage, mask.to(passage.x.device), delta)

            return rewrite

        self.check_masks(masks, delta, batch)
        return {name: replace(name, mask) for name, mask in masks.items()}

    def check_model(self) -> None:
        """An error where the model, or what of it was decomposed, is not as it was: moved, converted, other weights."""
        own = [c.V for c in self.components.values()] or [site.weight for site in self.sites.values()]  # before there are any components
        here, there = own[0].device, model_device(self.model)
        if here != there:
            raise SPDError(f"the model was moved to {there} and the decomposition is on {here}; load it again with "
                           "Decomposition.load(folder, model), or move the model back.")  # fmt: skip
        if all(map(is_held, self.sites.values())):
            return
        expect_uncompiled(self.model)
        for site in self.sites.values():
            check_unchanged(self.model, site)

    def _check_repeatable(self) -> None:
        if not all(map(is_held, self.sites.values())) and drops_out(self.model):
            raise SPDError("the model gives other logits each time it runs (dropout?); call model.eval() first.")

    def _forward(self, tokens: Batch | Tensor, rewrites: Mapping[str, Rewrite], replacing: Collection[str] = ()) -> Tensor:
        batch, reached = Batch.of(tokens), set()

        def noting(name: str) -> Rewrite:
            def rewrite(passage: Passage) -> Tensor | None:
                reached.add(name)
                return rewrites[name](passage)

            return rewrite

        with alone(self.model):
            self.check_model()
            self._check_repeatable()
            with held(self.sites.values()), rewritten(self.model, self.sites, {name: noting(name) for name in rewrites}, replacing):
                logits = self.model(batch.ids, return_type="logits", **batch.model_arguments)
        for name in rewrites:
            if name not in reached:
                raise SPDError(f"{name}: the model's forward pass did not come by this matrix's hooks, so it cannot be replaced.")
        return logits

    @steady(shared=True)
    def _shown(self) -> Shown:
        rows = {
            name: {"d_in": site.d_in, "d_out": site.d_out, "subcomponents": self.components[name].C,
                   "left to the delta": f"{self.share_left(name):.1e}"}
            for name, site in self.sites.items()
        }  # fmt: skip
        return Shown(f"Decomposition of a {type(self.model).__name__} after {self.steps_done} of {self.config.steps} steps",
                     pd.DataFrame.from_dict(rows, orient="index").rename_axis("site"),
                     "Left to the delta: share of the matrix's squared norm in W - V·U. What is active: census and verify(decomposition, tokens).")  # fmt: skip

    @steady(shared=True)
    def share_left(self, name: str) -> float:
        """Share of a matrix's squared norm that V·U leaves: `‖W - V·U‖²/‖W‖²`."""
        weight = self.sites[name].weight
        return float(self.components[name].delta(weight).square().sum() / weight.square().sum().clamp_min(1e-30))


def all_finite(values: Tensor) -> bool:
    """True where nobody can look at values, as inside of `torch.vmap`."""
    try:
        return bool(torch.isfinite(values).all())
    except RuntimeError:
        return True
