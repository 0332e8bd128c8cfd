"""A concept spread over several tokens ("red apple"): can its subcomponents be told from those of its parts, and cut alone? The stress test
that arXiv 2511.08854 leaves open.

1. Target: a language model in which every pair of a colour and a fruit has a taste that follows from neither, every colour a meaning and
   every fruit a place (`spd_lens.tasks.fruits`).
2. Prompts: one sentence about the pair, one about the colour, one about the fruit. A targeted decomposition of every matrix on the three.
3. Told apart: which subcomponents are active on one of the prompts alone, and which on several.
4. Cut alone: for the pair, the colour and the fruit the fewest subcomponents whose cut takes its answer away and leaves those of the
   other two (`spd_lens.tasks.surgery`). Measured on pairs that share a part, on others, and on unrelated text; half of the pairs have no
   part in the background or in the choice.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.metrics import LABELS, Verification, census, verify
from spd_lens.sites import Hook
from spd_lens.tasks.fruits import (
    COLOUR_PHRASINGS,
    FRUIT_PHRASINGS,
    PAIR_PHRASINGS,
    Pair,
    all_pairs,
    colour_questions,
    documents,
    fruit_questions,
    pair_questions,
)  # fmt: skip
from spd_lens.tasks.language import packed
from spd_lens.tasks.questions import Drift, Questions, drift
from spd_lens.tasks.surgery import Guard, One, active_on, choose_cut, grouped
from spd_lens.tokens import Batch
from spd_lens.training import decompose

PAIR: Pair = ("red", "apple")
BACKGROUND, TEXT, ROW = 1500, 128, 32  # documents of the background; rows of text for a choice or a measurement; tokens of a row
GOALS = {  # figure → nothing was published; what we set out to reach
    "fall": ("", "", "≥ 0.9"), "largest change of the other two": ("", "", "± 0.02"), "sharing a part, accuracy": ("", "", "≥ -0.02"),
    "sharing none, accuracy": ("", "", "≥ -0.02"), "unrelated KL": ("", "", "≤ 0.01"), "unrelated KL, 99 %": ("", "", "≤ 0.1"),
    "subcomponents": ("", "", "≤ 10"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """What the model is asked, and the text around it.

    Attributes:
        asked: `red apple`, `red`, `apple` → its prompt.
        background: `[M, t]`, other text, without sentences about the three and about held-out pairs.
        known: questions about the pairs in the background.
        sharing, apart: questions about held-out pairs that share a part with the concept, and that share none.
        unrelated: `[J, t]`, text without colours, fruits and tastes.
    """

    model: Any
    asked: dict[str, Questions]
    background: Int[Tensor, "M t"]
    text: Int[Tensor, "K t"]
    known: Questions
    sharing: Questions
    apart: Questions
    unrelated: Int[Tensor, "J t"]

    @property
    def together(self) -> Questions:
        """The three prompts, in one batch."""
        parts = list(self.asked.values())
        return Questions(torch.cat([part.tokens for part in parts]), torch.cat([part.answers for part in parts]))

    def others(self, concept: str) -> Questions:
        kept = [index for index, name in enumerate(self.asked) if name != concept]
        return self.together[kept]


def setting(model: Any, seed: int, pair: Pair = PAIR) -> Setting:
    """Half of the other pairs, drawn with the seed, are held out; as many of those that share a part as of the rest."""
    colour, fruit = pair
    chance = random.Random(seed)
    near = [other for other in all_pairs() if other != pair and (other[0] == colour or other[1] == fruit)]
    far = [other for other in all_pairs() if other != pair and other not in near]
    chance.shuffle(near)
    chance.shuffle(far)
    seen = near[: len(near) // 2] + far[: len(far) // 2]
    own = [text for text, _ in (*pair_questions([pair]), *colour_questions([colour]), *fruit_questions([fruit]))]

    def rows(many: int, pairs: Sequence[Pair]) -> Tensor:
        kept = [text for text in documents(many, chance, pairs) if not any(sentence in text for sentence in own)]
        return packed(model.tokenizer, kept, ROW).to(next(model.parameters()).device)

    three = Questions.of(model, [*pair_questions([pair], PAIR_PHRASINGS[:1]), *colour_questions([colour], COLOUR_PHRASINGS[:1]),
                                 *fruit_questions([fruit], FRUIT_PHRASINGS[:1])])  # fmt: skip
    return Setting(
        model=model, asked={name: three[i : i + 1] for i, name in enumerate((" ".join(pair), colour, fruit))},
        background=rows(BACKGROUND, seen), text=rows(4 * TEXT, seen)[:TEXT], known=Questions.of(model, pair_questions(seen)),
        sharing=Questions.of(model, pair_questions(near[len(near) // 2 :])), apart=Questions.of(model, pair_questions(far[len(far) // 2 :])),
        unrelated=rows(4 * TEXT, ())[:TEXT],
    )  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """What hooks do: `red apple`, … → probability of its answer, before and after; accuracy on held-out pairs, before and after; drift on
    unrelated text."""

    answers: dict[str, tuple[float, float]]
    sharing: tuple[float, float]
    apart: tuple[float, float]
    unrelated: Drift

    def fall(self, concept: str) -> float:
        before, after = self.answers[concept]
        return 1 - after / before

    def others(self, concept: str) -> float:
        """The largest change of another answer."""
        return max((after - before for name, (before, after) in self.answers.items() if name != concept), key=abs)


def effect_of(s: Setting, hooks: Sequence[Hook]) -> Effect:
    before, after = (s.together.probabilities(s.model, some).tolist() for some in ((), hooks))
    return Effect(
        answers=dict(zip(s.asked, zip(before, after))),
        sharing=(s.sharing.accuracy(s.model), s.sharing.accuracy(s.model, hooks)),
        apart=(s.apart.accuracy(s.model), s.apart.accuracy(s.model, hooks)),
        unrelated=drift(s.model, s.unrelated, hooks),
    )


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything that table, page and `results.json` say.

    Attributes:
        active: `red apple`, … → the subcomponents active on its prompt.
        cuts: `red apple`, … → what was cut; `effects`: what that did.
    """

    setting: Setting
    decomposition: Decomposition
    seed: int
    seconds: dict[str, float]
    verification: Verification
    distinct: int
    active: dict[str, list[One]]
    cuts: dict[str, list[One]]
    effects: dict[str, Effect]

    def alone(self, concept: str) -> int:
        """How many subcomponents are active on this prompt and on neither of the others."""
        return len(set(self.active[concept]) - {one for other, theirs in self.active.items() if other != concept for one in theirs})

    def told_apart_table(self) -> pd.DataFrame:
        """How many subcomponents are active on each prompt, on it alone, and together with each of the others."""
        rows = {}
        for concept, own in self.active.items():
            elsewhere = {one for other, theirs in self.active.items() if other != concept for one in theirs}
            rows[concept] = {"active": len(own), "on it alone": self.alone(concept),
                             **{f"also on {other}": len(set(own) & set(theirs)) if other != concept else "" for other, theirs in self.active.items()},
                             "cut": len(self.cuts[concept]),
                             "cut, on it alone": len(set(self.cuts[concept]) - elsewhere)}  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("prompt")

    def cut_table(self) -> pd.DataFrame:
        rows = {}
        for concept, effect in self.effects.items():
            rows[f"{concept} cut"] = {
                **{f"P({name}'s answer)": f"{before:.3f} → {after:.3f}" for name, (before, after) in effect.answers.items()},
                "pairs sharing a part": f"{effect.sharing[0]:.3f} → {effect.sharing[1]:.3f}",
                "pairs sharing none": f"{effect.apart[0]:.3f} → {effect.apart[1]:.3f}",
                "unrelated KL": f"{effect.unrelated.mean:.4f}", "99 %": f"{effect.unrelated.p99:.3f}",
            }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what is cut")

    def cut_list(self) -> pd.DataFrame:
        rows = [{"cut for": concept, "subcomponents": ", ".join(f"{name} · {c}" for name, c in cut)} for concept, cut in self.cuts.items()]
        return pd.DataFrame(rows).set_index("cut for")

    def verification_table(self) -> pd.DataFrame:
        rows = {label: f"{getattr(self.verification, name):.1e}" for name, label in LABELS.items()}
        return pd.DataFrame({"value": {"active on the prompts, distinct": f"{self.distinct}", **rows}}).rename_axis("check")

    def figures(self) -> dict[str, float | int]:
        found: dict[str, float | int] = {}
        for concept, effect in self.effects.items():
            found |= {
                f"{concept}: subcomponents": len(self.cuts[concept]), f"{concept}: fall": effect.fall(concept),
                f"{concept}: largest change of the other two": effect.others(concept),
                f"{concept}: sharing a part, accuracy": effect.sharing[1] - effect.sharing[0],
                f"{concept}: sharing none, accuracy": effect.apart[1] - effect.apart[0],
                f"{concept}: unrelated KL": effect.unrelated.mean, f"{concept}: unrelated KL, 99 %": effect.unrelated.p99,
                f"{concept}: active": len(self.active[concept]), f"{concept}: active on it alone": self.alone(concept),
            }  # fmt: skip
        checks = {LABELS[name]: getattr(self.verification, name) for name in ("kl_hard", "kl_alive_only", "kl_adversarial")}
        return {
            **found,
            "active on the prompts": self.distinct,
            **checks,
            **{f"seconds, {part}": value for part, value in self.seconds.items()},
        }

    def results(self) -> dict[str, Any]:
        """`results.json`."""
        return {
            "seconds": sum(self.seconds.values()), "seconds_by_part": self.seconds, "seed": self.seed, "config": self.decomposition.config.to_json(),
            "cuts": {concept: {"cut": [list(one) for one in self.cuts[concept]], **asdict(effect)} for concept, effect in self.effects.items()},
            "active": {concept: [list(one) for one in own] for concept, own in self.active.items()},
            "verification": self.verification.as_dict(), "figures": self.figures(),
        }  # fmt: skip


def goals(found: Mapping[str, Mapping[str, float | int]]) -> dict[str, tuple[str, str, str]]:
    """The goal of every figure that has one."""
    names = {name for figures in found.values() for name in figures}
    return {name: GOALS[name.split(": ")[-1]] for name in names if name.split(": ")[-1] in GOALS}


def run(
    model: Any,
    config: SPDConfig,
    seconds: Mapping[str, float],
    progress: bool = True,
    say: Callable[[str], Any] = lambda text: None,
    learnt: Decomposition | None = None,
    **options: Any,
) -> Outcome:
    """Decompose, choose, measure; arguments as those of `facts.run`."""
    s, clock = setting(model, config.seed), time.perf_counter()
    prompts = s.together.tokens
    if learnt is None:
        say(f"decomposing every matrix on {len(prompts)} prompts, {config.steps} steps …")
    d = learnt or decompose(model, prompts, config, background=Batch(s.background), progress=progress, **options)
    trained = time.perf_counter()
    say("choosing what to cut …")
    active = {concept: active_on(d, asked.tokens) for concept, asked in s.asked.items()}
    cuts = {
        concept: choose_cut(d, asked, active[concept], Guard.of(model, s.others(concept), s.known, s.text))
        for concept, asked in s.asked.items()
    }
    return Outcome(
        setting=s, decomposition=d, seed=config.seed, verification=verify(d, prompts), distinct=census(d, prompts).total, active=active, cuts=cuts,
        effects={concept: effect_of(s, d.ablate(grouped(cut))) for concept, cut in cuts.items()},
        seconds={**seconds, "decomposition": trained - clock, "measuring": time.perf_counter() - trained},
    )  # fmt: skip
