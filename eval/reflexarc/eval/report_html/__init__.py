"""``report.html``: one self-contained page about an evaluation, made from its results folder."""
