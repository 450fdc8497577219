"""The drawings in README.md and docs/ are those of docs/pictures.py, and are readable on any background."""

import re
from xml.etree import ElementTree

import pytest

from docs import pictures

DRAWN = pictures.pictures()


def test_all_are_drawn():
    assert {path.name for path in pictures.FOLDER.iterdir()} == DRAWN.keys()


@pytest.mark.parametrize("name", DRAWN)
def test_is_current(name):
    assert (pictures.FOLDER / name).read_text(encoding="utf-8") == DRAWN[name], "run `python docs/pictures.py`"


@pytest.mark.parametrize("name", DRAWN)
def test_everything_is_on_the_paper_and_has_a_description(name):
    svg = ElementTree.fromstring(DRAWN[name])
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    tags = {kind: list(svg.iter(f"{{http://www.w3.org/2000/svg}}{kind}")) for kind in ("desc", "rect", "line")}
    assert len(tags["desc"]) == 1
    paper, *boxes = tags["rect"]
    assert (float(paper.attrib["width"]), float(paper.attrib["height"])) == (width, height)
    for box in boxes:
        x, y, wide, high = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    for line in tags["line"]:
        assert all(0 <= float(line.attrib[key]) <= size for key, size in (("x2", width), ("y2", height)))


def test_the_backward_of_the_reuse_iteration_ends_early():
    words = re.findall(r">([^<>]+)</text>", DRAWN["two-iterations.svg"])
    assert words.count("backward") == 2
    assert words.count("no backward") == 1
