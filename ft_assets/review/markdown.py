"""The review as Markdown, for the asset's page and `ft status`."""

from ft_assets.markdown import table
from ft_assets.review.win_rates import HumanReview


def review_markdown(found: HumanReview) -> str:
    """Return the win rates as a table, and what is known about the reviewers."""
    lines = [f"{found.judged} of {found.prompts} prompts are judged.", ""]
    if found.identical:
        lines += [f"{found.identical} prompts have equal answers: ties without a question.", ""]
    rows = [
        [
            one.candidate,
            one.rival,
            f"{one.rate:.0%} [{one.low:.0%}, {one.high:.0%}]",
            str(one.prompts),
            f"{one.wins}, {one.ties}, {one.losses}",
            str(one.identical),
        ]
        for one in found.win_rates
    ]
    header = ["candidate", "against", "win rate", "prompts", "wins, ties, losses", "equal answers"]
    lines += [table(header, rows), ""] if rows else ["Nobody has judged yet: open ft review.", ""]
    people = ", ".join(f"{name} {count}" for name, count in found.reviewers.items())
    lines += [f"Judgements by reviewer: {people or 'none'}.", ""]
    if found.agreement:
        lines += [f"Agreement among people: {found.agreement.describe()}.", ""]
    if found.first_preferred is not None:
        share = f"{found.first_preferred:.0%}"
        lines += [f"The best answer stood first in {share} of the judgements.", ""]
    return "\n".join(lines)
