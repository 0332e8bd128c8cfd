import pandas as pd

from spd_lens import viz
from spd_lens.report import page


def test_a_page_is_whole_and_asks_for_nothing():
    figure = viz.training_curves([{"step": 1, "total": 1.0, "stochastic": 0.2, "active": {"a": 1.0}}])
    table = pd.DataFrame({"<b>x</b>": ["</script>"]})
    html = page("<title>", "a & b", [("Warning: one", "<i>", None), ("Two", "", figure), ("Three", "", table)])
    body = html.split("<body>")[1]
    assert "<h1>&lt;title&gt;</h1>" in body and "a &amp; b" in body and "&lt;i&gt;" in body and 'class="warn"' in body
    assert "&lt;/script&gt;" in body and "&lt;b&gt;x&lt;/b&gt;" in body
    assert "<link" not in html and "src=" not in body and "href=" not in body
    assert html.count("figure-1") >= 1
