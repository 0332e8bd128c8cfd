"""Which pieces come back: a heatmap of wanted pieces and active subcomponents, the matched ones along the diagonal."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.recovery import Recovery
from spd_lens.viz.style import finish


def recovery(found: Recovery, wanted: str = "piece", own: str = "active subcomponent") -> go.Figure:
    """A panel per site: rows are the wanted pieces, columns the active subcomponents, each in the order of the matching; cells are `|cos v|·|cos u|`.

    Args:
        found: what `recovered` or `similarity` gave.
        wanted, own: what rows and columns are called.
    """
    names = list(found.likeness)
    figure = make_subplots(1, len(names), subplot_titles=names, horizontal_spacing=0.3 / (len(names) + 2))
    tallest = 1
    for column, name in enumerate(names, start=1):
        pairs = [(found.pieces[name].index(piece), found.active[name].index(c)) for piece, c, _ in found.matching[name]]
        rows, columns = (_first([pair[i] for pair in pairs], many) for i, many in enumerate(found.likeness[name].shape))
        tallest = max(tallest, len(rows))
        figure.add_heatmap(
            z=found.likeness[name][rows][:, columns].numpy(), y=[str(found.pieces[name][k]) for k in rows],
            x=[str(found.active[name][a]) for a in columns], zmin=0, zmax=1, colorscale="Cividis", showscale=column == len(names),
            colorbar=dict(title="likeness"), hovertemplate=f"{wanted} %{{y}}, {own} %{{x}}: %{{z:.3f}}<extra>{name}</extra>", row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(title=own, type="category", row=1, col=column)
        figure.update_yaxes(title=wanted if column == 1 else None, type="category", autorange="reversed", row=1, col=column)
    title = f"{found.above} of {found.total} come back; mean likeness {found.mean:.3f}, back {found.back:.3f}"
    return finish(figure, title, min(900, 220 + 16 * tallest))


def _first(chosen: list[int], many: int) -> list[int]:
    return chosen + [i for i in range(many) if i not in set(chosen)]
