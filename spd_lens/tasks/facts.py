"""Golf and basketball, as in arXiv 2511.08854, section 5: which subcomponents know it, and what else depends on them.

1. Target: a GPT-2-architecture model trained here on a generated world of athletes (`spd_lens.tasks.athletes`); or GPT-2-small itself.
2. Prompts: two sentences ("Tiger Woods plays the sport of", "Kobe Bryant …"); or the whole set, every athlete that is not held out.
   A targeted decomposition of every matrix: what happens on the prompts, with other text as the background.
3. Suppression: the fewest subcomponents, active on the prompt, whose cut out of the original weights takes the answer away. Rewiring:
   the fewest pairs whose exchange of outputs, calibrated on the two prompts, makes the golfer play basketball and the other golf.
4. Measured on what had no part in it: athletes of the held-out half, the inverse question, the same question in other words, unrelated
   text. Beside it the same cut of random active subcomponents, of MLP neurons, of singular directions, and of subcomponents learnt on the
   prompts alone.
"""

import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.components import Components
from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.metrics import LABELS, Verification, census, verify
from spd_lens.sites import Hook, find_sites
from spd_lens.tasks.athletes import INVERSE, PHRASINGS, all_athletes, documents, inverse_questions, questions
from spd_lens.tasks.language import packed
from spd_lens.tasks.questions import Drift, Questions, drift
from spd_lens.tasks.surgery import Guard, One, Pair, active_on, choose_cut, choose_swap, first_by_attribution, grouped
from spd_lens.tokens import Batch
from spd_lens.training import decompose

CONCEPTS = {"golf": "Tiger Woods", "basketball": "Kobe Bryant"}
BACKGROUND, TEXT, UNRELATED = 1500, 128, 128  # documents of the background; rows of text for a choice and for the measurement
ROW = 32  # tokens of a row of text
RANDOM_DRAWS = 10
EXAMPLES = 3  # of what a subcomponent reads and writes

GOALS = {  # figure of a cut or of the swap → what arXiv 2511.08854 reports, a replication's, what we set out to reach
    "fall": ("0.85", "", "≥ 0.9"), "other sport": ("0.000", "", "± 0.02"), "held-out accuracy": ("", "", "≥ -0.02"),
    "unrelated KL": ("", "", "≤ 0.01"), "unrelated KL, 99 %": ("", "", "≤ 0.1"), "inverse": ("kept", "", "± 0.05"),
    "subcomponents": ("", "", "≤ 10"), "golfer, exchanged": ("", "", "≥ 0.5"), "basketball player, exchanged": ("", "", "≥ 0.5"),
    "active on the prompts": ("96", "", ""),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """A target model, what it is asked, and the text around it.

    Attributes:
        asked: `golf`, `basketball` → the prompt about its athlete.
        prompts: `[N, s]`, what is decomposed: the two prompts, or those of all athletes that are not held out.
        background: `[M, t]`, other text, with athletes that are neither of the two nor held out.
        text: `[K, t]`, the same kind of text, on which a choice may change little.
        known: questions about those athletes, on which a choice may change little.
        held_out: questions about athletes that neither the background nor a choice has seen.
        reworded: `golf`, … → the same question in the other phrasings.
        inverse: `golf`, … → "The most famous golfer is".
        unrelated: `[J, t]`, text without athletes and sports.
    """

    model: Any
    asked: dict[str, Questions]
    prompts: Int[Tensor, "N s"]
    background: Int[Tensor, "M t"]
    text: Int[Tensor, "K t"]
    known: Questions
    held_out: Questions
    reworded: dict[str, Questions]
    inverse: dict[str, Questions]
    unrelated: Int[Tensor, "J t"]

    def other(self, concept: str) -> str:
        return next(one for one in self.asked if one != concept)

    def guard(self, questions: Questions) -> Guard:
        return Guard.of(self.model, questions, self.known, self.text)


def setting(model: Any, seed: int, whole: bool = False) -> Setting:
    """What this model is asked. Of the athletes that it knows in every phrasing, half of the others, drawn with the seed, are held out.

    Raises:
        SPDError: the model does not say golf and basketball at the two prompts.
    """
    device = next(model.parameters()).device
    both = Questions.of(model, questions(list(CONCEPTS.values()), PHRASINGS[:1]))
    if both.accuracy(model) < 1:
        said = dict(zip(CONCEPTS.values(), both.probabilities(model).tolist()))
        raise SPDError(f"the model does not know the two facts (probability of the sport: {said}); give one that does.")
    others = [
        name for name in all_athletes() if name not in CONCEPTS.values() and Questions.of(model, questions([name])).accuracy(model) == 1
    ]
    chance = random.Random(seed)
    chance.shuffle(others)
    seen, held_out = others[: len(others) // 2], others[len(others) // 2 :]
    if not held_out:
        raise SPDError(
            "the model knows fewer than two of the other athletes in every phrasing, so nothing can be held out; give another model."
        )

    def rows(many: int, athletes: Sequence[str]) -> Tensor:
        return packed(model.tokenizer, documents(many, chance, athletes), ROW).to(device)

    prompts = Questions.of(model, questions([*CONCEPTS.values(), *seen], PHRASINGS[:1])) if whole else both
    return Setting(
        model=model,
        asked={concept: both[i : i + 1] for i, concept in enumerate(CONCEPTS)},
        prompts=prompts.tokens,
        background=rows(BACKGROUND, seen),
        text=rows(4 * TEXT, seen)[:TEXT],
        known=Questions.of(model, questions(seen)),
        held_out=Questions.of(model, questions(held_out)),
        reworded={concept: Questions.of(model, questions([athlete], PHRASINGS[1:])) for concept, athlete in CONCEPTS.items()},
        inverse={concept: Questions.of(model, inverse_questions([concept], INVERSE[:1])) for concept in CONCEPTS},
        unrelated=rows(4 * UNRELATED, ())[:UNRELATED],
    )


@dataclass(frozen=True)
class Effect:
    """What hooks do to the model.

    Attributes:
        before, after: `golf`, … → probability of the sport at its prompt.
        crossed: `golf`, … → probability of the other sport at the same prompt, afterwards.
        reworded: `golf`, … → mean probability of the sport in the other phrasings, afterwards.
        inverse: `golf`, … → probability of its athlete at the inverse question, before and after.
        held_out: accuracy on the held-out athletes, before and after.
        unrelated: drift on unrelated text.
    """

    before: dict[str, float]
    after: dict[str, float]
    crossed: dict[str, float]
    reworded: dict[str, float]
    inverse: dict[str, tuple[float, float]]
    held_out: tuple[float, float]
    unrelated: Drift

    def fall(self, concept: str) -> float:
        """Share of the probability that is gone."""
        return 1 - self.after[concept] / self.before[concept]

    def change(self, concept: str) -> float:
        return self.after[concept] - self.before[concept]

    @property
    def inverse_change(self) -> float:
        """The largest, relative."""
        return max((after / before - 1 for before, after in self.inverse.values()), key=abs)

    @property
    def held_out_change(self) -> float:
        return self.held_out[1] - self.held_out[0]


def effect_of(s: Setting, hooks: Sequence[Hook]) -> Effect:
    def p(questions: Questions, hooks: Sequence[Hook] = hooks) -> float:
        return float(questions.probabilities(s.model, hooks).mean())

    return Effect(
        before={concept: p(asked, ()) for concept, asked in s.asked.items()},
        after={concept: p(asked) for concept, asked in s.asked.items()},
        crossed={concept: p(Questions(asked.tokens, s.asked[s.other(concept)].answers)) for concept, asked in s.asked.items()},
        reworded={concept: p(asked) for concept, asked in s.reworded.items()},
        inverse={concept: (p(asked, ()), p(asked)) for concept, asked in s.inverse.items()},
        held_out=(s.held_out.accuracy(s.model), s.held_out.accuracy(s.model, hooks)),
        unrelated=drift(s.model, s.unrelated, hooks),
    )


@dataclass(frozen=True, eq=False)
class Cut:
    """Subcomponents that were cut for one concept, and what that did; of several draws the means."""

    chosen: list[One]
    effect: Effect

    @classmethod
    def of(cls, s: Setting, d: Decomposition, chosen: list[One]) -> "Cut":
        return cls(chosen, effect_of(s, d.ablate(grouped(chosen))))


def alone(config: SPDConfig) -> SPDConfig:
    """The same without a background: what the prompts alone teach."""
    return config.replace(weights={name: weight for name, weight in config.weights.items() if not name.startswith("background")})


def goals(found: Mapping[str, Mapping[str, float | int]]) -> dict[str, tuple[str, str, str]]:
    """The goal of every figure that has one; a baseline's have none."""
    names = {name for figures in found.values() for name in figures}
    return {name: GOALS[name.split(": ")[-1]] for name in names if name.count(": ") < 2 and name.split(": ")[-1] in GOALS}


def neurons(s: Setting) -> Decomposition:
    """The MLPs' neurons as subcomponents of the matrices that they write with: `v_c` picks one, `u_c` is its row."""
    sites = find_sites(s.model, "blocks.*.mlp.W_out")
    own = {
        name: Components(torch.eye(site.d_in, dtype=site.weight.dtype, device=site.weight.device), site.weight.clone())
        for name, site in sites.items()
    }
    return Decomposition(s.model, sites, own, {}, SPDConfig.targeted(steps=0))


def singular_directions(s: Setting) -> Decomposition:
    """The terms of every matrix's own singular value decomposition."""
    sites = find_sites(s.model)
    own = {}
    for name, site in sites.items():
        left, values, right = torch.linalg.svd(site.weight, full_matrices=False)
        own[name] = Components(left * values.sqrt(), values.sqrt()[:, None] * right)
    return Decomposition(s.model, sites, own, {}, SPDConfig.targeted(steps=0))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything that table, page and `results.json` say.

    Attributes:
        cuts: `golf`, … → what was cut, and its effect.
        swap: the pairs that exchange outputs; `swapped`: their effect.
        baselines: name → `golf`, … → the same with something else.
        described: `golf`, … → one row a subcomponent: what it reads and writes.
        active: distinct subcomponents active on the prompts; per site; and per token of the background.
    """

    setting: Setting
    decomposition: Decomposition
    seed: int
    whole: bool
    seconds: dict[str, float]
    verification: Verification
    active: dict[str, int]
    active_background: float
    cuts: dict[str, Cut]
    swap: list[Pair]
    swapped: Effect
    baselines: dict[str, dict[str, Cut]]
    described: dict[str, pd.DataFrame]

    def answers(self) -> dict[str, dict[str, dict[str, float]]]:
        """Prompt → what was done → probability of each sport."""
        done = {f"{concept} cut": cut.effect for concept, cut in self.cuts.items()} | {"exchanged": self.swapped}
        original = effect_of(self.setting, ())
        return {
            f"{CONCEPTS[concept]} …": {
                name: {concept: effect.after[concept], self.setting.other(concept): effect.crossed[concept]}
                for name, effect in {"original": original, **done}.items()
            }
            for concept in self.cuts
        }

    def suppression_table(self) -> pd.DataFrame:
        """Each concept's cut, beside the paper's figure."""
        rows = {}
        for concept, cut in self.cuts.items():
            other, effect = self.setting.other(concept), cut.effect
            rows[f"{concept}: subcomponents cut"] = f"{len(cut.chosen)}"
            rows[f"P({concept}) before → after"] = f"{effect.before[concept]:.3f} → {effect.after[concept]:.3f}"
            rows[f"P({other}) before → after, {concept} cut"] = f"{effect.before[other]:.3f} → {effect.after[other]:.3f}"
            for name, value in self._row(concept, cut).items():
                if name not in ("number", "fall", "other sport"):
                    rows[f"{concept}: {name}"] = value
        frame = pd.DataFrame({"here": rows}).rename_axis("figure")
        frame["paper"] = frame.index.map(
            {"P(golf) before → after": "0.620 → 0.090", "P(basketball) before → after, golf cut": "0.630 → 0.630"}
        ).fillna("")
        return frame

    def _row(self, concept: str, cut: Cut) -> dict[str, str]:
        effect = cut.effect
        return {
            "number": f"{len(cut.chosen)}",
            "fall": f"{effect.fall(concept):.3f}",
            "other sport": f"{effect.change(self.setting.other(concept)):+.4f}",
            "held-out accuracy": f"{effect.held_out_change:+.3f}",
            "inverse": f"{effect.inverse_change:+.4f}",
            "unrelated KL": f"{effect.unrelated.mean:.4f}",
            "unrelated KL, 99 %": f"{effect.unrelated.p99:.3f}",
            "reworded, P": f"{effect.reworded[concept]:.2f}",
        }

    def comparison_table(self) -> pd.DataFrame:
        """The cut of each concept beside the same cut of other things."""
        rows = {}
        for concept, own in self.cuts.items():
            for name, cut in {"this decomposition": own, **{name: cuts[concept] for name, cuts in self.baselines.items()}}.items():
                rows[f"{concept}: {name}"] = self._row(concept, cut)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what is cut")

    def swap_table(self) -> pd.DataFrame:
        golfer, player = self.swapped.crossed.values()
        rows = {
            "pairs exchanged": f"{len(self.swap)}", "golfer: P(basketball)": f"{golfer:.3f}", "basketball player: P(golf)": f"{player:.3f}",
            "held-out accuracy": f"{self.swapped.held_out_change:+.3f}", "inverse": f"{self.swapped.inverse_change:+.4f}",
            "unrelated KL": f"{self.swapped.unrelated.mean:.4f}", "unrelated KL, 99 %": f"{self.swapped.unrelated.p99:.3f}",
        }  # fmt: skip
        return pd.DataFrame({"here": rows}).rename_axis("figure")

    def verification_table(self) -> pd.DataFrame:
        rows = {label: f"{getattr(self.verification, name):.1e}" for name, label in LABELS.items()}
        counts = {"active on the prompts, distinct": f"{sum(self.active.values())} of {self.allocated}",
                  "active per token of the background": f"{self.active_background:.2f}"}  # fmt: skip
        return pd.DataFrame({"value": {**counts, **rows}}).rename_axis("check")

    @property
    def allocated(self) -> int:
        return sum(c.C for c in self.decomposition.components.values())

    def figures(self) -> dict[str, float | int]:
        """What several seeds compare."""
        found: dict[str, float | int] = {}
        for concept, cut in self.cuts.items():
            effect = cut.effect
            found |= {
                f"{concept}: subcomponents": len(cut.chosen), f"{concept}: fall": effect.fall(concept),
                f"{concept}: other sport": effect.change(self.setting.other(concept)), f"{concept}: held-out accuracy": effect.held_out_change,
                f"{concept}: inverse": effect.inverse_change, f"{concept}: unrelated KL": effect.unrelated.mean,
                f"{concept}: unrelated KL, 99 %": effect.unrelated.p99, f"{concept}: reworded, P": effect.reworded[concept],
            }  # fmt: skip
        golfer, player = self.swapped.crossed.values()
        found |= {
            "swap: pairs": len(self.swap), "swap: golfer, exchanged": golfer, "swap: basketball player, exchanged": player,
            "swap: held-out accuracy": self.swapped.held_out_change, "swap: inverse": self.swapped.inverse_change,
            "swap: unrelated KL": self.swapped.unrelated.mean, "swap: unrelated KL, 99 %": self.swapped.unrelated.p99,
            "active on the prompts": sum(self.active.values()), "active per token of the background": self.active_background,
            **{LABELS[name]: getattr(self.verification, name) for name in ("kl_hard", "kl_alive_only", "kl_adversarial")},
        }  # fmt: skip
        for name, cuts in self.baselines.items():
            for concept, cut in cuts.items():
                found |= {f"{name}: {concept}: fall": cut.effect.fall(concept), f"{name}: {concept}: unrelated KL": cut.effect.unrelated.mean,
                          f"{name}: {concept}: unrelated KL, 99 %": cut.effect.unrelated.p99}  # fmt: skip
        return {**found, **{f"seconds, {part}": value for part, value in self.seconds.items()}}

    def results(self) -> dict[str, Any]:
        """`results.json`."""
        golf = self.cuts["golf"].effect
        golfer, player = self.swapped.crossed.values()

        def cut(concept: str, one: Cut) -> dict[str, Any]:
            return {"cut": [list(c) for c in one.chosen], **asdict(one.effect), "fall": one.effect.fall(concept)}

        return {
            "seconds": sum(self.seconds.values()), "seconds_by_part": self.seconds, "seed": self.seed, "prompts": "whole" if self.whole else "two",
            "config": self.decomposition.config.to_json(), "subcomponents": len(self.cuts["golf"].chosen),
            "suppress": {concept: {"before": one.effect.before, "after": one.effect.after} for concept, one in self.cuts.items()},
            "held_out_accuracy": {"before": golf.held_out[0], "after": min(one.effect.held_out[1] for one in self.cuts.values())},
            "inverse": dict(zip(("before", "after"), golf.inverse["golf"])),
            "unrelated_kl": {"mean": max(one.effect.unrelated.mean for one in self.cuts.values()),
                             "p99": max(one.effect.unrelated.p99 for one in self.cuts.values())},
            "swap": {"golfer": golfer, "basketball_player": player, "pairs": [[list(a), list(b)] for a, b in self.swap], **asdict(self.swapped)},
            "baselines": {name: {concept: cut(concept, one) for concept, one in cuts.items()} for name, cuts in self.baselines.items()},
            "cuts": {concept: cut(concept, one) for concept, one in self.cuts.items()},
            "active": {**self.active, "total": sum(self.active.values()), "per_background_token": self.active_background},
            "verification": self.verification.as_dict(), "figures": self.figures(),
            "described": {concept: frame.reset_index().to_dict("records") for concept, frame in self.described.items()},
        }  # fmt: skip


def run(
    model: Any,
    config: SPDConfig,
    seconds: Mapping[str, float],
    whole: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = lambda text: None,
    learnt: Decomposition | None = None,
    **options: Any,
) -> Outcome:
    """Decompose, choose, measure.

    Args:
        seconds: what the target took.
        learnt: the decomposition, where there is one already.
        say: called with a line of text at each stage.
        options: of `decompose`: `checkpoint`, `resume`.
    """
    s, clock = setting(model, config.seed, whole), time.perf_counter()
    if learnt is None:
        say(f"decomposing every matrix on {len(s.prompts)} prompts, {config.steps} steps …")
    d = learnt or decompose(model, s.prompts, config, background=Batch(s.background), progress=progress, **options)
    trained = time.perf_counter()
    say("choosing what to cut and to exchange …")
    cuts = {concept: suppressed(s, d, concept) for concept in s.asked}
    pools = tuple(active_on(d, asked.tokens) for asked in s.asked.values())
    golf, basketball = s.asked["golf"], s.asked["basketball"]
    swap = choose_swap(d, golf, basketball, (pools[0], pools[1]), s.guard(s.known[:0]))
    swapped = effect_of(s, d.rewire(swap_outputs=swap, calibrate_on=torch.cat([golf.tokens, basketball.tokens])))
    chosen = time.perf_counter()
    say("the baselines …")
    own = baselines(s, d, cuts, config, progress)
    measured = time.perf_counter()
    counted = census(d, s.prompts)
    on_background = census(d, Batch(s.text))
    return Outcome(
        setting=s, decomposition=d, seed=config.seed, whole=whole, verification=verify(d, s.prompts),
        active={d.sites[name].short: many for name, many in counted.distinct.items()},
        active_background=sum(means["all"] for means in on_background.mean_active.values()),
        cuts=cuts, swap=swap, swapped=swapped, baselines=own,
        described={concept: describe(s, d, concept, cut.chosen) for concept, cut in cuts.items()},
        seconds={**seconds, "decomposition": trained - clock, "choice": chosen - trained, "baselines": measured - chosen,
                 "measuring": time.perf_counter() - measured},
    )  # fmt: skip


def suppressed(s: Setting, d: Decomposition, concept: str, pool: Sequence[One] | None = None) -> Cut:
    """The cut of a concept; `pool` is what may be cut: by default what is active on its prompt."""
    asked = s.asked[concept]
    pool = active_on(d, asked.tokens) if pool is None else pool
    return Cut.of(s, d, choose_cut(d, asked, pool, s.guard(s.asked[s.other(concept)])))


def baselines(s: Setting, d: Decomposition, cuts: Mapping[str, Cut], config: SPDConfig, progress: bool) -> dict[str, dict[str, Cut]]:
    """The same cut of other things: as many at random or by attribution, or chosen in the same way."""
    single, singular = neurons(s), singular_directions(s)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*leave a part of it to the delta")  # as the targeted one does
        untargeted = decompose(s.model, s.prompts, alone(config), progress=progress)
    found: dict[str, dict[str, Cut]] = {}
    for concept, cut in cuts.items():
        asked, many = s.asked[concept], len(cut.chosen)
        chance, pool = random.Random(config.seed), active_on(d, asked.tokens)
        drawn = [Cut.of(s, d, chance.sample(pool, min(many, len(pool)))) for _ in range(RANDOM_DRAWS)]
        row = {
            "random active subcomponents": _mean(drawn),
            "top neurons by attribution": Cut.of(s, single, first_by_attribution(single, asked, many)),
            "neurons, same choice": suppressed(s, single, concept, first_by_attribution(single, asked)),
            "top singular directions by attribution": Cut.of(s, singular, first_by_attribution(singular, asked, many)),
            "singular directions, same choice": suppressed(s, singular, concept, first_by_attribution(singular, asked)),
            "learnt on the prompts alone": suppressed(s, untargeted, concept),
        }
        for name, one in row.items():
            found.setdefault(name, {})[concept] = one
    return found


def _mean(drawn: Sequence[Cut]) -> Cut:
    """The mean effect of several draws; what was cut is that of the first."""

    def mean(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: mean([value[key] for value in values]) for key in first}
        if isinstance(first, (tuple, list)):
            return tuple(mean(part) for part in zip(*values))
        return sum(values) / len(values)

    effects = [asdict(cut.effect) for cut in drawn]
    merged = mean(effects)
    return Cut(drawn[0].chosen, Effect(**{**merged, "unrelated": Drift(**merged["unrelated"])}))


@torch.no_grad()
def describe(s: Setting, d: Decomposition, concept: str, chosen: Sequence[One]) -> pd.DataFrame:
    """What each of these subcomponents reads, and what it writes.

    Reads: the tokens of the prompts and the text at which `|v_c·x|` is largest, in their context. Writes: the answers that lose most
    log-probability at the concept's prompt when it alone is cut, measured.
    """
    texts = [s.prompts, s.text]
    inner = [d.look(text).inner for text in texts]
    before = s.asked[concept].log_p(s.model)[0]
    rows = []
    for name, c in chosen:
        places = [(float(values[name][b, n, c]), text[b, max(0, n - 4) : n + 1]) for values, text in zip(inner, texts)
                  for b, n in _largest(values[name][..., c].abs(), 2 * EXAMPLES)]  # fmt: skip
        shown: dict[str, float] = {}
        for value, context in sorted(places, key=lambda place: -abs(place[0])):
            shown.setdefault(
                s.model.tokenizer.decode(context.tolist()).replace(s.model.tokenizer.bos_token, "").strip() or "(begin)", value
            )
        lost = (before - s.asked[concept].log_p(s.model, d.ablate({name: [c]}))[0]) * before.exp()
        writes = [
            f"{s.model.tokenizer.decode([token]).strip()} {float(lost[token]):+.2f}" for token in lost.abs().topk(EXAMPLES).indices.tolist()
        ]
        reads = [f"{text} ({value:+.1f})" for text, value in list(shown.items())[:EXAMPLES]]
        rows.append(
            {"subcomponent": f"{name} · {c}", "reads (v·x)": "; ".join(reads), "cut alone: loss of log p, weighted by p": ", ".join(writes)}
        )
    return pd.DataFrame(rows).set_index("subcomponent") if rows else pd.DataFrame(columns=["reads (v·x)"]).rename_axis("subcomponent")


def _largest(values: Tensor, many: int) -> list[tuple[int, int]]:
    top = values.flatten().topk(min(many, values.numel())).indices
    return [(int(at) // values.shape[1], int(at) % values.shape[1]) for at in top]
