"""The page of any decomposition on some tokens.

1. What is amiss (`advise`), and whether the count can be trusted (`verify`), before the count itself (`census`).
2. The circuit of one prompt, and every subcomponent that is active on the tokens with its card.
3. Where and how much they are active, what pairs of Q and K attend to, how it was learnt.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spd_lens import viz
from spd_lens.advice import advise
from spd_lens.attention import pair_attention
from spd_lens.cards import describe, times_active
from spd_lens.config import SPDConfig
from spd_lens.decomposition import Decomposition
from spd_lens.errors import SPDError
from spd_lens.graph import answer_logit, circuit_graph
from spd_lens.guards import steady
from spd_lens.labels import short_names, token_labels
from spd_lens.metrics import census, verify
from spd_lens.patching import cut_costs
from spd_lens.report.page import REPORT_BYTES, Cards, Section, page
from spd_lens.storage import check_writable, write_text
from spd_lens.tokens import Batch

TITLE = "A model in rank-one subcomponents"
MOST = 500  # cards
COSTED = 32  # sequences on which each is cut
PROMPT = 64  # tokens of the first sequence, where no prompt is given
ATTENTION_LAYERS = 3


@steady()
def write_report(
    d: Decomposition,
    tokens: Any,
    path: str | Path,
    prompt: Any = None,
    answer: int | None = None,
    contexts: Any = None,
    title: str = TITLE,
    most: int = MOST,
    progress: bool = True,
    attention_mask: Any = None,
) -> Path:
    """Write one self-contained HTML page about a decomposition; it opens without a network.

    Args:
        d: the decomposition.
        tokens, attention_mask: `[N, s]`, as `spd_lens.tokens.take_in` takes them: of the kind that it was learnt on; a few hundred sequences. What
            is active on them is counted, cut and described.
        path: the file to write.
        prompt: `[1, s]` or a text, whose circuit is drawn; None: the first of the tokens, up to 64 of it.
        answer: the token whose logit at the prompt's end the circuit is of; None: the model's own first choice.
        contexts: `[M, t]`, or text: where the cards look for contexts; None: in the tokens.
        title: of the page.
        most: cards; of more subcomponents those that are active most often.
        progress: whether to show bars.

    Raises:
        SPDError: tokens that the model cannot read, several prompts, no card at all, or a place that cannot be written to.
    """
    path = Path(path)
    if most < 1:
        raise SPDError(f"most was given as {most}; it is a number of cards, at least 1.")
    check_writable(path.parent, REPORT_BYTES)
    write_text(path, decomposition_page(d, tokens, prompt, answer, contexts, title, most, progress, attention_mask))
    return path


@steady()
def decomposition_page(
    d: Decomposition,
    tokens: Any,
    prompt: Any = None,
    answer: int | None = None,
    contexts: Any = None,
    title: str = TITLE,
    most: int = MOST,
    progress: bool = False,
    attention_mask: Any = None,
) -> str:
    """The page that `write_report` writes; arguments as there."""
    tokens = d.batch(tokens, attention_mask)
    prompt = tokens.alone(most=PROMPT) if prompt is None else d.batch(prompt)
    if len(prompt) != 1:
        raise SPDError(f"{len(prompt)} prompts were given; the circuit is drawn of one, [1, s].")
    prompt = prompt.alone()
    counted, checked = census(d, tokens), verify(d, tokens)
    sections: list[Section] = [(f"Warning: {advice.kind}", str(advice), None) for advice in advise(d, tokens, counted, checked)]
    sections += [
        ("Can the count be trusted?", f"KL(original ‖ masked) in nats per output, without the delta, on {_many(tokens)}. Hard "
         "keeps exactly the active subcomponents (g > 0.5); alive-only keeps the ever-active ones everywhere; the adversary gives each inactive one its worst "
         "value. What is not survived is not explained.", checked.table().map("{:.1e}".format)),
        ("Active subcomponents", f"Mean number active per position, distinct ones that are ever active ({counted.total} in all), and how many there are. Read "
         f"together with: {checked.beside_a_count}.", counted.table().round(3)),
        _circuit(d, prompt, answer),
        subcomponents(d, tokens, contexts, most, progress),
    ]  # fmt: skip
    seen, names = d.look(prompt).importances, short_names(d.sites)
    labels = token_labels(d.model, prompt.ids[0])
    sections.append(("Where they are active", "How many subcomponents of each matrix are active at each token of the prompt.",
                     viz.active_by_layer(seen, labels, checked.beside_a_count, names)))  # fmt: skip
    sections += attention(d, prompt)
    some = {name: tokens[:64].rows(g)[None] for name, g in d.look(tokens[:64]).importances.items()}
    sections += [
        ("How clear the choice is", "Importance of all subcomponents at all positions of up to 64 sequences: what lies between 0 and 1 is neither in nor out.",
         viz.importance_density(some)),
        ("How many are needed", "A cliff means that few subcomponents of a matrix carry it; a slope, that many share the work.", viz.mean_importance(some, names)),
    ]  # fmt: skip
    if d.history:
        sections.append(("Training", "Unweighted losses and active subcomponents.", viz.training_curves(d.history, names)))
    sections.append(("Settings", "Everything that made this decomposition.", settings(d.config)))
    lead = (f"{type(d.model).__name__}, {len(d.sites)} matrices, {d.steps_done} steps. {counted.total} of {sum(c.C for c in d.components.values())} "
            f"subcomponents are ever active; {checked.beside_a_count}.")  # fmt: skip
    return page(title, lead, sections)


def _many(batch: Batch) -> str:
    if batch.lengths is None:
        return f"{len(batch)} sequences of {batch.shape[1]} tokens"
    return f"{len(batch)} sequences of {int(batch.lengths.min())} to {int(batch.lengths.max())} tokens"


def subcomponents(d: Decomposition, tokens: Any, contexts: Any = None, most: int = MOST, progress: bool = False) -> Section:
    """The index of those that are ever active on these tokens; of more than `most` those that are active most often. Contexts are looked for in
    `contexts` (None: the tokens)."""
    tokens = d.batch(tokens)
    times = {name: found.tolist() for name, found in times_active(d, tokens).items()}
    alive = {name: [c for c, n in enumerate(found) if n] for name, found in times.items()}
    total = sum(map(len, alive.values()))
    if not total:
        return "Subcomponents", "None is active (g > 0.5) on these tokens.", None
    if total > most:
        ranked = sorted(((name, c) for name in alive for c in alive[name]), key=lambda one: -times[one[0]][one[1]])
        alive = {name: sorted(c for other, c in ranked[:most] if other == name) for name in alive}
    elsewhere = (
        "" if contexts is None else " “Active at”, “mean g”, the spread of importance and the contexts are of more text, in which some may be active nowhere."
    )  # fmt: skip
    said = (
        f"The {most} of {total} ever-active subcomponents that are active most often."
        if total > most
        else f"All {total} that are ever active."
    )
    return (
        "Subcomponents",
        f"{said} Search for a name or a token ( / ), sort by a column, open one for its card (Enter; arrow keys move, Esc closes). "
        f"“Cut costs”: what taking it alone out of the original weights does to the outputs of {min(COSTED, len(tokens))} sequences, KL in nats.{elsewhere}",
        Cards(
            describe(d, tokens if contexts is None else contexts, alive, progress=progress), cut_costs(d, tokens[:COSTED], alive, progress)
        ),
    )


def settings(config: SPDConfig) -> pd.DataFrame:
    return pd.DataFrame({"value": {key: str(value) for key, value in config.to_json().items()}}).rename_axis("setting")


def _circuit(d: Decomposition, prompt: Batch, answer: int | None) -> Section:
    if answer is None:
        with torch.no_grad():
            answer = int(d.model(prompt.ids, return_type="logits")[0, -1].argmax())
    heading = "The circuit of one prompt"
    try:
        graph = circuit_graph(d, prompt, answer_logit(answer))
    except SPDError as error:
        return heading, str(error), None
    (label,) = token_labels(d.model, [answer])
    return (
        heading,
        f"What feeds what for the answer “{label}” after “{' '.join(graph.labels[-12:])}”. Marks: subcomponents at their positions, larger where ablating them costs more; "
        "lines: what one adds to the other's activation, checked by subtracting it. The metric is the answer's logit less the mean logit. Hover for figures.",
        viz.circuit_graph(graph),
    )


def attention(d: Decomposition, prompt: Any) -> list[Section]:
    """Layer by layer, the strongest pairs of Q and K beside their heads."""
    found = []
    for layer in sorted({site.layer for site in d.sites.values()}):
        if all(f"blocks.{layer}.attn.W_{matrix}" in d.sites for matrix in "QK") and len(found) < ATTENTION_LAYERS:
            try:
                pairs = pair_attention(d, prompt, layer)
            except SPDError:  # no pair is active here
                continue
            found.append((f"Attention of layer {layer}, by pairs of subcomponents", "The whole head beside what its strongest active pairs of Q and K subcomponents "
                          "make of it alone, on the prompt.", viz.attention_patterns(pairs)))  # fmt: skip
    return found
