"""The documentation site's configuration. `make docs` builds the site.

The build needs no network, and neither does a reader's browser: the theme has no web
fonts, and formulas are MathML instead of a script.
"""

import os
import posixpath
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import apollo_optax

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][
    "Repository"
]

# Notebooks import `examples`, which is not installed, in processes of their own.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(ROOT))

project = "apollo-optax"
author = "The apollo-optax authors"
copyright = f"2026, {author}"
release = version = apollo_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates", "gpu/*"]
templates_path = ["_templates"]
highlight_language = "none"  # Blocks without a language are commands and their output.
myst_heading_anchors = 4  # Links to headings are the ones that GitHub understands.
myst_enable_extensions = ["colon_fence"]

# The notebooks' outputs are kept between builds, so that only a changed one runs again.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs/_build/.notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Fields of named tuples are in the docstring's "Attributes". Autodoc would list them a
# second time, as "Alias for field number 0".
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_ignore_module_all = False

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names would need their inventories, which are on the network.
    ("py:.*", r"(jax|jnp|optax|numpy|np)\..*"),
]

html_theme = "furo"
html_title = "apollo-optax"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}


# [text](target), but no figure, and no target on this page or with a scheme.
LINK = re.compile(r"(?<!!)(\[[^\[\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def link_files_outside_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Points links to what is no page of the site at the repository.

    On GitHub these relative links work as they are. MyST would offer the files as
    downloads.
    """
    folder = posixpath.dirname(posixpath.join("docs", page))

    def to_repository(link: re.Match[str]) -> str:
        path, hash_sign, heading = link[2].partition("#")
        target = posixpath.normpath(posixpath.join(folder, path))
        is_folder = (ROOT / target).is_dir()
        if target.startswith("docs/") and not is_folder:
            return link[0]
        kind = "tree" if is_folder else "blob"
        return f"{link[1]}({REPOSITORY}/{kind}/main/{target}{hash_sign}{heading})"

    source[0] = LINK.sub(to_repository, source[0])


# A figure in two colors, as GitHub takes it.
PICTURE = re.compile(
    r"<picture>\s*"
    r'<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]+)" src="(?P<light>[^"]+)">\s*'
    r"</picture>"
)


def show_pictures_by_theme(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns a `<picture>` into two images, of which the theme shows one.

    Sphinx does not copy the files that HTML refers to, and a reader can choose the
    theme's colors against those of the system.
    """
    del app, page

    def two_images(picture: re.Match[str]) -> str:
        return "\n".join(
            f"```{{image}} {picture[mode]}\n"
            f":alt: {picture['alt']}\n"
            f":class: only-{mode}\n"
            "```\n"
            for mode in ("light", "dark")
        )

    source[0] = PICTURE.sub(two_images, source[0])


def render_inline(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def render_block(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    formula = mathml(node.astext(), "block")
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def mathml(latex: str, display: str) -> str:
    # The converter takes the text in \text{} as it is, with line breaks and escapes.
    return convert(" ".join(latex.split()).replace(r"\_", "_"), display=display)


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_outside_the_site)
    app.connect("source-read", show_pictures_by_theme)
    app.add_html_math_renderer("mathml", (render_inline, None), (render_block, None))


html_math_renderer = "mathml"
