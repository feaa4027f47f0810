"""The style of drawings in a card: colours for the colour-blind, files that repeat."""

from typing import Any

#: What is recommended, and what it is compared with (Okabe and Ito, "Color universal design").
CHOSEN, OTHER = "#d55e00", "#0072b2"
#: Fixed ids and no date, so that equal drawings give equal files.
REPEATABLE: Any = {"svg.hashsalt": "pcae", "svg.fonttype": "none"}
