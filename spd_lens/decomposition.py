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
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from spd_lens.attachment import Attachment, guarded, rewritten
from spd_lens.components import Components, masked_output
from spd_lens.config import SPDConfig
from spd_lens.errors import SPDError, nearest
from spd_lens.importance import Importance, lower_leaky
from spd_lens.masks import THRESHOLD
from spd_lens.sites import Hook, Passage, Rewrite, Site, check_unchanged, drops_out, held, is_held, model_device
from spd_lens.suffix import compared, compared_only, recorded, repeated, resumed
from spd_lens.tables import Shown, Tabular
from spd_lens.visits import rewrite_hooks

TokensLike = Any  # an integer tensor [b, s]; or text, or a list of texts, where the model has a tokenizer


@dataclass(frozen=True, eq=False, repr=False)
class Observation(Tabular):
    """What one clean forward pass shows.

    Attributes:
        logits: `[b, s, vocabulary]`, the original model's.
        inner: site → `[b, s, C]`, what each subcomponent reads: `v_c·x`.
        importances: site → `[b, s, C]` in [0, 1].
    """

    logits: Float[Tensor, "b s vocabulary"]
    inner: dict[str, Float[Tensor, "b s C"]]
    importances: dict[str, Float[Tensor, "b s C"]]

    def _shown(self) -> Shown:
        rows = {
            name: {"subcomponents": g.shape[-1], "ever active": int((g > THRESHOLD).flatten(0, 1).any(0).sum()),
                   "active per position": f"{float((g > THRESHOLD).sum(-1).float().mean()):.3g}", "largest |v·x|": f"{float(self.inner[name].abs().max()):.3g}"}
            for name, g in self.importances.items()
        }  # fmt: skip
        b, s, vocabulary = self.logits.shape
        return Shown(f"One clean pass over [{b}, {s}] tokens; logits [{b}, {s}, {vocabulary}], inner and importances [{b}, {s}, C] per site",
                     pd.DataFrame.from_dict(rows, orient="index").rename_axis("site"),
                     f"Active: g > {THRESHOLD}. A count alone proves nothing: read it with verify(decomposition, tokens).")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """What a clean pass leaves for the passes that follow.

    Attributes:
        tokens: `[b, s]`.
        logits: `[b, n, vocabulary]`, the original model's at the compared positions.
        inputs: site → `[b, s, d_in]`, what its matrix reads.
        blocks: what every block returned: a pass that changes nothing before layer l can begin there.
    """

    tokens: Int[Tensor, "b s"]
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

    @torch.no_grad()
    def observe(self, tokens: TokensLike) -> Observation:
        """One clean pass: the original logits, and per site the inner activations and causal importances."""
        clean = self.trace(self.tokens(tokens))
        inner, z = self.importance_logits(clean.inputs)
        return Observation(clean.logits, inner, {name: lower_leaky(z[name]) for name in z})

    def importances(self, tokens: TokensLike) -> dict[str, Float[Tensor, "b s C"]]:
        """Site → causal importances `[b, s, C]` in [0, 1]."""
        return self.observe(tokens).importances

    def trace(self, tokens: Int[Tensor, "b s"], positions: str = "all") -> Trace:
        """A clean pass: the original logits at `all` positions or the `last`, and the input of every site; gradients are kept if they
        are on."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Rewrite:
            return lambda passage: inputs.__setitem__(name, passage.x)

        with recorded(self.model) as blocks, compared_only(self.model, positions):
            logits = self._forward(tokens, {name: keep(name) for name in self.sites})
        return Trace(tokens, compared(logits, positions), {name: inputs[name] for name in self.sites}, blocks)

    def importance_logits(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per site the inner activations and the logits z of importance, both `[b, s, C]`."""
        inner = {name: self.components[name].inner(x) for name, x in inputs.items()}
        return inner, {name: self.gates[name](x, inner[name]).to(self.components[name].V.dtype) for name, x in inputs.items()}

    # --- running ---

    def run(self, tokens: TokensLike, masks: Mapping[str, Tensor], delta: float | int | Tensor = 0.0) -> Float[Tensor, "b s vocabulary"]:
        """Logits with the named sites replaced by their masked subcomponents.

        Args:
            tokens: `[b, s]`, or text where the model has a tokenizer.
            masks: site → tensor that broadcasts to `[b, s, C]`; sites not named stay as they are.
            delta: how much of `W - V·U` is added back; with all masks 1 and delta 1 the result is the original.
        """
        return self._forward(self.tokens(tokens), self._replacements(masks, delta), replacing=masks)

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
        tokens, many = clean.tokens, len(variants)
        names = [name for name in self.sites if any(name in masks for masks in variants)]
        layer = min(map(self.first_layer, variants))
        shared = {name for name in names if all(name in masks for masks in variants)}

        def rewrite(name: str) -> Rewrite:
            replaced = [i for i, masks in enumerate(variants) if name in masks]
            mask = torch.cat([variants[i][name] for i in replaced]) if many > 1 else variants[0][name]
            index = torch.tensor(replaced, device=tokens.device)

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

        before = repeated(clean.blocks[layer - 1], len(tokens), many) if layer else None
        with resumed(self.model, before, layer), compared_only(self.model, positions):
            logits = self._forward(tokens.repeat(many, 1), {name: rewrite(name) for name in names}, replacing=shared)
        return compared(logits, positions).unflatten(0, (many, -1))

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
    def attached(self, masks: Mapping[str, Tensor] | None = None, delta: float | int | Tensor = 1.0) -> Iterator[Any]:
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
            delta: how much of `W - V·U` is added back at the sites that the masks name (without masks: at all sites).

        Yields:
            the model.

        Raises:
            SPDError: unknown sites or masks of a wrong shape; a model that was moved or changed; another decomposition attached to one of the
                sites.
        """
        if masks is None and not (isinstance(delta, (float, int)) and delta == 1):
            masks = {name: torch.ones((), device=c.V.device) for name, c in self.components.items()}
        self.check_masks(masks or {})
        if self._attachment is not None:
            with self._attachment.set_to(masks, delta):
                yield self.model
            return
        self.check_model()
        new = Attachment(self.model, self.sites, self.components, self.gates)
        with new.registered(), new.set_to(masks, delta):
            on = rewritten(self.model, self.sites, new.rewrites(), new.replacing, permanent=True)
            with on as hooks, guarded(self.model, hooks, new.points):
                self._attachment = new
                try:
                    yield self.model
                finally:
                    self._attachment = None

    def run_with_cache(
        self, tokens: TokensLike, masks: Mapping[str, Tensor] | None = None, delta: float | int | Tensor = 0.0, **options: Any
    ) -> tuple[Any, ActivationCache | dict[str, Any]]:
        """The model's own `run_with_cache`, with `<site>.hook_spd_acts` and `<site>.hook_spd_ci` `[b, s, C]` in the cache.

        Args:
            masks: as in `run`; None leaves the model as it is.
            options: `run_with_cache`'s own, e.g. `names_filter`, `stop_at_layer`, `pos_slice`.
        """
        tokens = self.tokens(tokens)
        with self.attached(masks, 1.0 if masks is None else delta):
            return self.model.run_with_cache(tokens, **options)

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

    def tokens(self, tokens: TokensLike) -> Int[Tensor, "b s"]:
        """Checked tokens on the model's device; text goes through the model's tokenizer."""
        if isinstance(tokens, str) or (isinstance(tokens, Sequence) and len(tokens) and all(isinstance(t, str) for t in tokens)):
            if getattr(self.model, "tokenizer", None) is None:
                raise SPDError("text was given, but the model has no tokenizer; give token ids [b, s].")
            tokens = self.model.to_tokens(tokens)
        return check_tokens(self.model, tokens)

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

    def check_masks(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self._check_site(name)
            C = self.components[name].C
            if not isinstance(mask, Tensor) or (mask.ndim and mask.shape[-1] not in (1, C)) or mask.ndim > 3:
                given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
                raise SPDError(f"{name}: the mask has {given}; it has to be a tensor that broadcasts to [b, s, {C}].")

    def _replacements(self, masks: Mapping[str, Tensor], delta: float | int | Tensor) -> dict[str, Rewrite]:
        def replace(name: str, mask: Tensor) -> Rewrite:
            return lambda passage: masked_output(self.components[name], self.sites[name], passage, mask, delta)

        self.check_masks(masks)
        return {name: replace(name, mask) for name, mask in masks.items()}

    def check_model(self) -> None:
        """An error where the model, or what of it was decomposed, is not as it was: moved, converted, other weights."""
        own = [c.V for c in self.components.values()] or [site.weight for site in self.sites.values()]  # before there are any components
        here, there = own[0].device, model_device(self.model)
        if here != there:
            raise SPDError(f"the model was moved to {there} and the decomposition is on {here}; load it again with "
                           "Decomposition.load(folder, model), or move the model back.")  # fmt: skip
        for site in self.sites.values():
            check_unchanged(self.model, site)

    def _check_repeatable(self) -> None:
        if not all(map(is_held, self.sites.values())) and drops_out(self.model):
            raise SPDError("the model gives other logits each time it runs (dropout?); call model.eval() first.")

    def _forward(self, tokens: Tensor, rewrites: Mapping[str, Rewrite], replacing: Collection[str] = ()) -> Tensor:
        reached = set()

        def noting(name: str) -> Rewrite:
            def rewrite(passage: Passage) -> Tensor | None:
                reached.add(name)
                return rewrites[name](passage)

            return rewrite

        self.check_model()
        self._check_repeatable()
        with held(self.sites.values()), rewritten(self.model, self.sites, {name: noting(name) for name in rewrites}, replacing):
            logits = self.model(tokens, return_type="logits")
        for name in rewrites:
            if name not in reached:
                raise SPDError(f"{name}: the model's forward pass did not come by this matrix's hooks, so it cannot be replaced.")
        return logits

    @torch.no_grad()
    def _shown(self) -> Shown:
        rows = {
            name: {"d_in": site.d_in, "d_out": site.d_out, "subcomponents": self.components[name].C,
                   "left to the delta": f"{self.share_left(name):.1e}"}
            for name, site in self.sites.items()
        }  # fmt: skip
        return Shown(f"Decomposition of a {type(self.model).__name__} after {self.steps_done} of {self.config.steps} steps",
                     pd.DataFrame.from_dict(rows, orient="index").rename_axis("site"),
                     "Left to the delta: share of the matrix's squared norm in W - V·U. What is active: census and verify(decomposition, tokens).")  # fmt: skip

    def share_left(self, name: str) -> float:
        """Share of a matrix's squared norm that V·U leaves: `‖W - V·U‖²/‖W‖²`."""
        weight = self.sites[name].weight
        return float(self.components[name].delta(weight).square().sum() / weight.square().sum().clamp_min(1e-30))


def check_tokens(model: Any, tokens: Any) -> Int[Tensor, "b s"]:
    """Tokens that the model can read, on its device; an error otherwise."""
    if not isinstance(tokens, Tensor):
        raise SPDError(f"tokens were given as {type(tokens).__name__}; give an integer tensor [b, s].")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise SPDError(f"tokens are {tokens.dtype}; token ids are integers. Use tokens.long() if they are whole numbers.")
    if tokens.ndim != 2:
        mend = "tokens[None]" if tokens.ndim == 1 else "tokens.flatten(0, -2)"
        raise SPDError(f"tokens have shape {list(tokens.shape)}; give [b, s], e.g. {mend}.")
    if tokens.numel() == 0:
        raise SPDError(f"tokens are empty (shape {list(tokens.shape)}); give at least one sequence of one token.")
    context, vocabulary = model.cfg.n_ctx, model.cfg.d_vocab
    if tokens.shape[1] > context:
        raise SPDError(f"tokens have {tokens.shape[1]} positions and the model's n_ctx is {context}; cut the sequences.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise SPDError(f"token ids run from {low} to {high}; the model's vocabulary is 0 … {vocabulary - 1}. Another tokenizer's?")
    return tokens.to(model_device(model), torch.long)
