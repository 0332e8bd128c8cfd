"""The pages of the tasks: what each one measured, in the order in which one asks for it."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens import viz
from spd_lens.graph import answer_logit, circuit_graph
from spd_lens.metrics import CHEAT, Verification
from spd_lens.recovery import Recovery
from spd_lens.report.model import attention, settings, subcomponents
from spd_lens.report.page import Section, page
from spd_lens.tasks.entangled import Outcome as Entangled
from spd_lens.tasks.facts import Outcome as Facts
from spd_lens.tasks.induction import PAPER, Outcome, Sequences
from spd_lens.tokens import Batch

CONTEXTS = 256  # sequences in which the subcomponents of the induction circuit are looked at


def cheat(verification: Verification) -> list[Section]:
    return [("Warning: this count is a cheat", CHEAT, None)] if verification.leans_on_inactive else []


def induction_page(outcome: Outcome) -> str:
    """The report of `spd-lens induction`."""
    verification, d = outcome.verification, outcome.decomposition
    example, answer = _example(outcome.sequences)
    sections: list[Section] = [
        (
            "The circuit",
            "Sequences of 64 random tokens hold the token s twice; at the second one (s2) the model has to say m, the token that followed "
            "the first (s1). Boxes: subcomponents active (g > 0.5) in at least half of the sequences at that position, by index. Arrows: "
            "mean attention when every inactive subcomponent is cut. Hover a box for the accuracy after cutting its subcomponents out of "
            "the original model.",
            outcome.picture(viz.positional_attention_circuit),
        ),
        (
            "Active subcomponents beside the paper's",
            "Mean number of subcomponents with g > 0.5 at each position, and how many distinct ones are ever active in "
            f"{len(outcome.sequences.tokens):,} sequences; in brackets the figures of arXiv 2511.08854, Table 1. Read the count only "
            "together with the checks below it.",
            outcome.beside_paper(),
        ),
        (
            "Can the count be trusted?",
            "KL(original ‖ masked) in nats at the last position, without the delta. Hard keeps exactly the active subcomponents; alive-only "
            "keeps the ever-active ones everywhere; the adversary gives each inactive one its worst value. "
            f"Accuracy with hard masks: {outcome.accuracy_hard:.4f} (the target's own: {outcome.target_accuracy:.4f}).",
            outcome.verification_table(),
        ),
        (
            "Do they do what the circuit needs?",
            "Each step of the circuit read off the active subcomponents alone, beside the original model: Q0 and K0 single out s1 for the "
            "query at m, Q1 and K1 single out m for the query at s2, V1 turns a token into its own logit.",
            outcome.diagnosis_table(),
        ),
        (
            "Where Q0 and K0 look",
            "Score of the query at one position (mean over the tokens seen there) for s at another, as the active subcomponents make it, each "
            "row less its mean over the keys that it can see. An induction circuit needs the largest entry of a row just left of the diagonal.",
            viz.positional_form(outcome.diagnosis.alignment.form.sum((0, 1))),
        ),
        (
            "Proof: cut them out",
            "Accuracy of the original model after the active subcomponents of one mechanism, and only those, are taken out of its weights; and "
            "after as many others are. Other active ones belong to the same circuit, so that cutting them may do as much harm.",
            outcome.interventions_table(),
        ),
        (
            "One sequence's circuit",
            "What feeds what for the answer at s2, in the first sequence in which s comes early. Marks: subcomponents at their positions, larger where ablating them there costs more; lines: what one adds to the "
            "other's activation, checked by subtracting it. The metric is the answer's logit less the mean logit. Hover for figures.",
            viz.circuit_graph(circuit_graph(d, example, answer_logit(answer))),
        ),
        subcomponents(d, outcome.sequences.tokens[:CONTEXTS]),
        (
            "Site by site",
            "Accuracy of the original model without the active subcomponents of one site.",
            pd.DataFrame({"accuracy when cut": outcome.ablated}).rename_axis("site").round(4),
        ),
        *attention(d, example),
        (
            "Positional alignment",
            "Each K0 subcomponent with all of Q0's: the score of the query at one position for s at another, and below it the mean along each diagonal. An induction "
            "circuit peaks one before the query.",
            viz.positional_alignment(outcome.diagnosis.alignment),
        ),
        ("The match", "Whether K1 reads what layer 0 writes for s.", viz.match_bars(outcome.diagnosis.match)),
        (
            "By position",
            "The census as bars.",
            viz.census_bars(outcome.mean_active, PAPER, ("s1", "m", "s2", "random"), verification.beside_a_count),
        ),
        (
            "One sequence",
            "Every subcomponent that is ever active in this sequence. s is the special token.",
            viz.importance_heatmap(outcome.example_importances, outcome.example_labels, outcome.short_names),
        ),
        (
            "Training",
            "Unweighted losses and active subcomponents.",
            viz.training_curves(outcome.decomposition.history, outcome.short_names),
        ),
        (
            "Settings",
            "Everything that made this run.",
            settings(outcome.decomposition.config),
        ),
    ]
    sections = cheat(verification) + sections
    lead = (
        f"Seed {outcome.seed}: {outcome.distinct['total']} distinct subcomponents ({outcome.distinct['total_without_s_first']} without the "
        f"sequences that begin with s); {verification.beside_a_count}; accuracy with hard masks {outcome.accuracy_hard:.4f}; "
        f"{sum(outcome.seconds.values()):.0f} s in all."
    )
    return page("The induction circuit in rank-one subcomponents", lead, sections)


def behind(prompts: Int[Tensor, "N s"], text: Int[Tensor, "K t"]) -> Batch:
    """Where contexts are looked for: the prompts, each with text behind it, and more text. Whole rows: none ends with padding."""
    rest = text[: len(prompts), : text.shape[1] - prompts.shape[1]]
    return Batch(torch.cat([torch.cat([prompts[: len(rest)], rest], 1), text]))


def _example(found: Sequences) -> tuple[Int[Tensor, "1 s"], int]:
    """The first sequence with s1 at 4 to 8 and its answer: a picture of it has few columns."""
    s1 = found.positions["s1"]
    row = int(((s1 >= 4) & (s1 <= 8)).int().argmax())
    return found.tokens[row : row + 1], int(found.answers[row])


def study_page(table: pd.DataFrame, found: Mapping[str, Mapping[str, float | int]]) -> str:
    """The report of `spd-lens induction --seeds`, `--without` and `--vary`."""
    lead = (
        f"{len(found)} runs: {', '.join(found)}. Every run has a report of its own in the folder beside this page. Counts are of subcomponents "
        "with g > 0.5 anywhere; KL(original ‖ masked) in nats."
    )
    return page(
        "The induction circuit in rank-one subcomponents: several runs",
        lead,
        [
            (
                "Count and trust",
                "What a count is worth: the fewer subcomponents and the lower the KL when everything else is cut, the better. Three marks a run.",
                viz.count_against_kl(found),
            ),
            ("All figures", "The target's own mechanism first: targets of the same accuracy differ.", table),
        ],
    )


def planted_page(table: pd.DataFrame, results: Mapping[str, Mapping[str, Any]], last: Recovery | None) -> str:
    """The report of `spd-lens planted`; `last` is one recovery to draw."""
    about = pd.DataFrame({"what is planted": {name: case["about"] for name, case in results.items()}}).rename_axis("case")
    sections: list[Section] = [
        (
            "What comes back",
            "Recovered: mean over the planted pieces of the best |cos v|·|cos u| with an active subcomponent; back: the same of each active subcomponent "
            "with a planted piece. F1: importance against where the pieces act, position by position. In brackets what was planted. Hard, alive-only and "
            "adversarial: KL(original ‖ masked) in nats. Of the recipe the mean over seeds, of the others the first seed.",
            table,
        ),
        ("The cases", "Models whose weights were set by hand; every direction is drawn from the seed.", about),
    ]
    if last is not None:
        sections.append(
            (
                "Piece by piece",
                "Of the last case above, its last seed: each planted piece with each active subcomponent.",
                viz.recovery(last),
            )
        )
    return page("Planted pieces", "Models built by hand from known rank-one pieces, decomposed, and held against what is known.", sections)


def facts_page(outcome: Facts) -> str:
    """The report of `spd-lens facts`."""
    golf, basketball = outcome.cuts["golf"], outcome.cuts["basketball"]
    sections: list[Section] = [
        (
            "What is cut, and what stays",
            "Probability of each answer at its prompt, in the original model, after golf's subcomponents are taken out of the original "
            "weights, after basketball's, and after pairs of output directions are exchanged.",
            viz.answer_bars(outcome.answers()),
        ),
        (
            "Suppression",
            f"{len(golf.chosen)} and {len(basketball.chosen)} subcomponents, chosen among those active on the prompt; beside it the paper's figures for "
            "GPT-2-small. Held-out athletes, the inverse question (“The most famous golfer is”), the other phrasings and the unrelated text had no "
            "part in the choice. Accuracy: change of the share of right answers; inverse: relative change of the probability; KL in nats per token.",
            outcome.suppression_table(),
        ),
        (
            "What each of golf's reads and writes",
            "Where |v·x| is largest on the prompts and the text around (the last token of each snippet), and the answers that lose most when it "
            "alone is cut.",
            outcome.described["golf"],
        ),
        ("What each of basketball's reads and writes", "The same.", outcome.described["basketball"]),
        (
            "Exchange",
            "The output directions of pairs of subcomponents exchanged: the golfer's prompt says basketball, and the other way round.",
            outcome.swap_table(),
        ),
        (
            "The same cut of other things",
            "As many random active subcomponents (mean of several draws); MLP neurons and singular directions, as many by attribution or chosen in the "
            "same way; subcomponents learnt on the prompts alone, without a background.",
            outcome.comparison_table(),
        ),
        (
            "Can the decomposition be trusted?",
            "On the prompts, KL(original ‖ masked) in nats at the last position, without the delta. A targeted decomposition leaves the rest of each "
            "matrix to the delta, so that V·U is far from W.",
            outcome.verification_table(),
        ),
        subcomponents(outcome.decomposition, outcome.setting.prompts, behind(outcome.setting.prompts, outcome.setting.text)),
        ("Training", "Unweighted losses and active subcomponents on the prompts.", viz.training_curves(outcome.decomposition.history)),
        (
            "Settings",
            "Everything that made this run.",
            settings(outcome.decomposition.config),
        ),
    ]
    sections = cheat(outcome.verification) + sections
    lead = (
        f"Seed {outcome.seed}: {sum(outcome.active.values())} of {outcome.allocated} subcomponents are active on the prompts; "
        f"{outcome.verification.beside_a_count}; {sum(outcome.seconds.values()):.0f} s in all."
    )
    return page("Golf and basketball in rank-one subcomponents", lead, sections)


def entangled_page(outcome: Entangled) -> str:
    """The report of `spd-lens entangled`."""
    names = list(outcome.active)
    answers = {
        f"{concept}: its answer": {
            name: {f"answer about {concept}": value}
            for name, value in {
                "original": next(iter(outcome.effects.values())).answers[concept][0],
                **{f"{other} cut": effect.answers[concept][1] for other, effect in outcome.effects.items()},
            }.items()
        }
        for concept in names
    }
    sections: list[Section] = [
        (
            "What is cut, and what stays",
            "Probability of the answer about the pair, the colour and the fruit, each at its own prompt, after each one's subcomponents are taken out of "
            "the original weights.",
            viz.answer_bars(answers),
        ),
        (
            "Told apart?",
            "How many subcomponents are active (g > 0.5) at any position of each prompt, on it alone, and together with each of the other two. Read the "
            "count together with the checks at the end.",
            outcome.told_apart_table(),
        ),
        (
            "Cut alone",
            "Probability of each answer before → after; accuracy on held-out pairs that share a part with the concept, and on those that share none; KL in "
            "nats per token of unrelated text.",
            outcome.cut_table(),
        ),
        ("What was cut", "By site and index.", outcome.cut_list()),
        (
            "Can the decomposition be trusted?",
            "On the three prompts, KL(original ‖ masked) in nats at the last position, without the delta. A targeted decomposition leaves the rest of each "
            "matrix to the delta, so that V·U is far from W.",
            outcome.verification_table(),
        ),
        subcomponents(
            outcome.decomposition, outcome.setting.together.tokens, behind(outcome.setting.together.tokens, outcome.setting.text)
        ),
        ("Training", "Unweighted losses and active subcomponents on the prompts.", viz.training_curves(outcome.decomposition.history)),
        (
            "Settings",
            "Everything that made this run.",
            settings(outcome.decomposition.config),
        ),
    ]
    sections = cheat(outcome.verification) + sections
    lead = f"Seed {outcome.seed}: {outcome.distinct} subcomponents are active on the prompts; {outcome.verification.beside_a_count}."
    return page(f"“{names[0]}” in rank-one subcomponents", lead, sections)


def cuts_study_page(table: pd.DataFrame, found: Mapping[str, Mapping[str, float | int]]) -> str:
    """The report of `spd-lens facts --seeds` and `spd-lens entangled --seeds`."""
    lead = f"{len(found)} runs: {', '.join(found)}, each with a target of its own, and with a report of its own in the folder beside this page."
    explanation = (
        "Fall: share of the probability of the answer that is gone when its subcomponents are cut; accuracy: change of the share of right answers "
        "on what was held out; inverse: relative change; KL in nats per token of unrelated text."
    )
    return page("What is cut and what stays, over seeds", lead, [("All figures", explanation, table)])
