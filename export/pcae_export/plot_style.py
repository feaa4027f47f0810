"""The style of drawings in a card: the colours of all plots, files that repeat."""

from typing import Any

from pcae_serve.loadtest.plot_style import COLOURS, EMPHASIS

#: What is recommended, and what it is compared with.
CHOSEN, OTHER = EMPHASIS, COLOURS[0]
#: Fixed ids and no time of day, so that equal drawings of a day give equal files.
REPEATABLE: Any = {"svg.hashsalt": "pcae", "svg.fonttype": "none"}
