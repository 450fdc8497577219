"""Figures of the notebooks are SVG, which is sharp at any size."""

import logging

from matplotlib_inline.backend_inline import set_matplotlib_formats

set_matplotlib_formats("svg")
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it says when it lists the fonts
del logging, set_matplotlib_formats
