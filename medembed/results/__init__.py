"""Run directories and what is made from them: comparisons, figures, the page."""
