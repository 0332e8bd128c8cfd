"""Results → plotly figures, CircuitsVis views and HTML. Nothing else in the package draws.

`style` holds the colours; `offline` puts CircuitsVis on a page without a network. Each figure shows itself in a notebook, and so do the views.
"""

from spd_lens.viz.attention import (
    attention_patterns,
    bilinear_form,
    match_bars,
    positional_alignment,
    positional_form,
    subcomponent_attention,
)
from spd_lens.viz.bench import bench_forward_bars, bench_growth_lines, bench_step_bars
from spd_lens.viz.circuit import circuit_graph, positional_attention_circuit
from spd_lens.viz.effects import ablation_bars, answer_bars, count_against_kl, output_change
from spd_lens.viz.importance import active_by_layer, census_bars, coloured_tokens, importance_density, importance_heatmap, mean_importance
from spd_lens.viz.offline import CircuitsVisView, Html, embed
from spd_lens.viz.recovery import recovery
from spd_lens.viz.subcomponents import contexts, reads_and_writes, weights
from spd_lens.viz.training import training_curves

__all__ = [
    "CircuitsVisView", "Html", "ablation_bars", "active_by_layer", "answer_bars", "attention_patterns", "bench_forward_bars", "bench_growth_lines",
    "bench_step_bars", "bilinear_form", "census_bars", "circuit_graph", "coloured_tokens", "contexts", "count_against_kl", "embed", "importance_density",
    "importance_heatmap", "match_bars", "mean_importance", "output_change", "positional_alignment", "positional_attention_circuit", "positional_form",
    "reads_and_writes", "recovery", "subcomponent_attention", "training_curves", "weights",
]  # fmt: skip
