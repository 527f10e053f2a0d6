"""Sphinx configuration."""

from openmm_vtdis import __version__

project = "openmm-vtdis"
release = version = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_output_stderr = "remove"
myst_enable_extensions = ["dollarmath", "amsmath"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "openmm-vtdis"
exclude_patterns = ["_build", "tables"]
