"""The links of the pages work in a clone and in the source distribution."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(page):
    """The relative links of a page, as pairs of a file and a heading or ''."""
    found = LINK.findall(BLOCK.sub("", page.read_text()))
    local = (link for link in found if not re.match(r"\w+:", link))
    for link in local:
        path, _, heading = link.partition("#")
        yield (page.parent / path).resolve() if path else page, heading


def anchors(page):
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ +(.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in words}


def files_in_sdist():
    """The files and folders at the root that the source distribution includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    return {name.strip("/") for name in included} | {"pyproject.toml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_source_distribution(page):
    for target, heading in links(page):
        assert target.exists(), f"{page.name} links to {target}"
        relative = target.relative_to(ROOT)
        assert relative.parts[0] in files_in_sdist(), f"{relative} is in no sdist"
        if heading:
            assert heading in anchors(target), f"{relative} has no heading {heading}"


def test_source_distribution_has_what_its_commands_need():
    # README starts with make, which installs the versions in constraints.txt.
    assert files_in_sdist() >= {"Makefile", "constraints.txt", ".ci"}
