"""Sphinx: `make docs` builds the documentation into docs/_build/html."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for rdp_kernels where it isn't installed

import rdp_kernels  # noqa: E402
import rdp_kernels.diagnostics  # noqa: E402
from examples.libraries import import_torchvision, installed  # noqa: E402

if installed("torchvision"):
    import_torchvision()  # transformers and Lightning import it where they find it, and autodoc imports them
if installed("matplotlib"):
    import matplotlib.axes

    for name, module in [*sys.modules.items()]:  # they import the type of axes for type checkers only
        if name.startswith("rdp_kernels.diagnostics.") and hasattr(module, "Axes"):
            module.Axes = matplotlib.axes.Axes
os.environ["IPYTHONDIR"] = str(HERE / "_kernel")  # the notebooks' kernels do the same as they start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for these kernels, which run side by side

project = "rdp_kernels"
author = "the authors of rdp_kernels"
version = release = rdp_kernels.__version__
copyright = f"2026, {author}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_kernel"]

# Pages are Markdown that GitHub shows as well; the tutorials are notebooks, executed by every build.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Docstrings: Google's style. What stands in backticks is a link where it names an object.
default_role = "py:obj"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # the fields of a result are a list
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

# Without a network the short list beside this file stands in for torch's own. It is also read beside torch's list, as
# only it has the names that classes have in signatures: torch.nn.modules.module.Module. (Their addresses must differ.)
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable", (None, "torch.inv")),
    "torch's modules": ("https://pytorch.org/docs/stable", "torch.inv"),
}
intersphinx_timeout = 5

html_theme = "pydata_sphinx_theme"
html_title = "rdp_kernels"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_sidebars = {"*": []}  # pages at the top have no neighbours to list: their tables get the room
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}
