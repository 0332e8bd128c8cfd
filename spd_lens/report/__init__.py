"""Results → one page that opens without a network: what can be trusted, the circuit, and every subcomponent with a card.

`page` puts sections on a page, `model` says what to show of any decomposition, `tasks` what each task shows besides. Nothing is requested:
scripts, styles and figures are inside.
"""

from spd_lens.report.model import decomposition_page, write_report
from spd_lens.report.page import REPORT_BYTES, Cards, page
from spd_lens.report.tasks import behind, cuts_study_page, entangled_page, facts_page, induction_page, planted_page, study_page

__all__ = [
    "REPORT_BYTES", "Cards", "behind", "cuts_study_page", "decomposition_page", "entangled_page", "facts_page", "induction_page", "page", "planted_page", "study_page",
    "write_report",
]  # fmt: skip
