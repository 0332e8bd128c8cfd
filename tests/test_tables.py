import io
import warnings

import pandas as pd
from rich.console import Console

from spd_lens import census, verify
from spd_lens.tables import Shown, Tabular


class One(Tabular):
    def _shown(self):
        return Shown("<b>of it", pd.DataFrame({"[red]</script>": ["<img src=x>"]}, index=pd.Index(["[/]"], name="row")), "a & b")


def shown_by_rich(thing):
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()


def test_what_comes_from_outside_is_text_everywhere():
    page = One()._repr_html_()
    assert "&lt;b&gt;of it" in page and "&lt;img" in page and "&lt;/script&gt;" in page and "a &amp; b" in page and "<img" not in page
    assert "[red]</script>" in shown_by_rich(One()) and "[/]" in shown_by_rich(One())
    assert repr(One()).startswith("<b>of it\n") and repr(One()).endswith("a & b")


def test_everything_that_a_cell_may_end_with_shows_itself(trained, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        things = [trained, trained.observe(tokens), census(trained, tokens), verify(trained, tokens)]
        for thing in things:
            for text in (thing._repr_html_(), repr(thing), shown_by_rich(thing)):
                assert "tensor(" not in text and len(text) < 20_000
            assert thing._repr_html_().count("<tr") >= 3
        site = next(iter(trained.sites.values()))
        assert site.name in site._repr_html_() and "\n" not in repr(site) and site.name in shown_by_rich(site)


def test_no_count_without_a_word_on_what_it_is_worth(trained, tokens):
    for thing in (trained.observe(tokens), census(trained, tokens)):
        assert "verify" in thing._repr_html_() and "verify" in repr(thing)
    assert "hard" in repr(verify(trained, tokens))


def test_what_is_left_to_the_delta(trained):
    name, site = next(iter(trained.sites.items()))
    components = trained.components[name]
    left = (site.weight - components.V @ components.U).norm() ** 2 / site.weight.norm() ** 2
    assert f"{float(left):.1e}" in repr(trained)
