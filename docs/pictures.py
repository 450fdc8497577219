"""The drawings of README.md and docs/: `python docs/pictures.py` writes them into docs/pictures/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT))

from tests.test_floors import edges  # noqa: E402

PAPER, INK, PALE, GREY, BLUE = "#fdfdfb", "#1b1f24", "#eceff2", "#6a7178", "#0a4f8f"
FONT = "-apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def two_iterations() -> str:
    """A network of five paths in a drop and a reuse iteration."""
    dropped = (2, 4)
    drop = ["left out" if path in dropped else "learns" for path in range(1, 6)]
    reuse = ["learns" if path in dropped else "frozen" for path in range(1, 6)]
    body = [
        *_iteration(20, "Drop iteration", "some paths are left out, the others learn", ["learns", *drop, "learns"]),
        *_iteration(
            265, "Reuse iteration", "every path runs, only the left-out ones learn", ["frozen", *reuse, "frozen"]
        ),
        _line(20, 504, 660, 504, GREY, 1),
    ]
    for number, (state, meaning) in enumerate(MEANING.items()):
        y = 522 + 42 * number
        body += [*_box(20, y, 92, 34, state, state), _text(128, y + 23, meaning, 18, anchor="start")]
    description = (
        "In the drop iteration paths 2 and 4 of five are left out. The others, the stem and the head run and learn. In "
        "the reuse iteration all run, and just paths 2 and 4 learn. The backward ends at path 2."
    )
    return _svg(680, 656, "The two iterations", description, body)


MEANING = {
    "learns": "runs forward and backward, its weights get gradients",
    "frozen": "runs, its weights get no gradients",
    "left out": "isn't called",
}


def _iteration(top: int, name: str, what: str, states: list[str]) -> list[str]:
    """The stem, the paths and the head: branches above the residual, the backward's reach below it."""
    step, width, residual = 94, 82, top + 138
    middles = [58 + step * number for number in range(len(states))]
    heading = f'<tspan font-weight="700">{name}</tspan>: {what}'
    body = [_text(20, top + 20, heading, 21, anchor="start")]
    body += [_line(middles[0], residual, 662, residual, INK, 2.5, "arrow-ink")]
    names = ["stem", *(f"path {number}" for number in range(1, len(states) - 1)), "head"]
    for place, (label, state, x) in enumerate(zip(names, states, middles, strict=True)):
        if place in (0, len(states) - 1):
            body += _box(x - width / 2, residual - 20, width, 40, state, state)
            body.append(_text(x, residual - 30, label, 17, GREY))
            continue
        body += _box(x - width / 2, top + 62, width, 40, state, state)
        body.append(_text(x, top + 53, label, 17, GREY))
        if state != "left out":
            body += [
                f'<path d="M {x - 34} {residual} V {top + 102} M {x + 34} {top + 102} V {residual - 9}" '
                f'stroke="{INK}" stroke-width="2.5" fill="none"/>',
                f'<circle cx="{x + 34}" cy="{residual}" r="9" fill="{PAPER}" stroke="{INK}" stroke-width="2"/>',
                f'<path d="M {x + 29} {residual} h 10 m -5 -5 v 10" stroke="{INK}" stroke-width="2" fill="none"/>',
            ]
    first = states.index("learns")
    end, y = middles[first] - width / 2, residual + 42
    body += [
        _line(middles[-1] + width / 2, y, end + 2, y, BLUE, 5, "arrow-blue"),
        _text((middles[-1] + end) / 2, y + 24, "backward", 17, BLUE),
    ]
    if first:
        body += [
            f'<path d="M {end - 10} {y - 12} v 24" stroke="{BLUE}" stroke-width="3"/>',
            _text((20 + end) / 2, y + 6, "no backward", 17, GREY),
        ]
    return body


def _box(x: float, y: float, width: float, height: float, text: str, state: str) -> list[str]:
    fill, colour, stroke, more = {
        "learns": (BLUE, "#ffffff", BLUE, ""),
        "frozen": (PALE, INK, INK, ""),
        "left out": (PAPER, GREY, GREY, ' stroke-dasharray="6 5"'),
        "plain": (PALE, INK, INK, ""),
    }[state]
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="2"{more}/>',
        _text(x + width / 2, y + height / 2 + 6, text, 18, colour, weight=600 if state == "learns" else 400),
    ]


def floors(arrows: list[tuple[str, str]]) -> str:
    """The folders of the package in rows, an arrow from each to those that it imports."""
    names = sorted({name for arrow in arrows for name in arrow})
    below = {name: [b for a, b in arrows if a == name] for name in names}

    def row(name: str) -> int:
        return 1 + max((row(other) for other in below[name]), default=-1)

    rows = [[name for name in names if row(name) == height] for height in range(1 + max(map(row, names)))]
    width, height, step, across = 138, 40, 78, 190
    tall = 40 + height + step * (len(rows) - 1)
    place = {
        name: (200 + across * (number - (len(those) - 1) / 2), tall - 20 - height - step * level)
        for level, those in enumerate(rows)
        for number, name in enumerate(those)
    }
    body = []
    for a, b in arrows:
        (x, y), (to_x, to_y) = place[a], place[b]
        body.append(_line(x, y + height, to_x, to_y - 3, INK, 2, "arrow-ink"))
    for name, (x, y) in place.items():
        body += _box(x - width / 2, y, width, height, name, "plain")
    description = "; ".join(f"{name} imports {', '.join(those)}" for name, those in below.items() if those)
    return _svg(400, tall, "What imports what in rdp_kernels", f"{description}.", body)


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float, head: str = "") -> str:
    marker = f' marker-end="url(#{head})"' if head else ""
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="{width:g}"{marker}/>'
    )


def _text(
    x: float, y: float, text: str, size: int, colour: str = INK, anchor: str = "middle", weight: int = 400
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{text}</text>'
    )


def _head(name: str, colour: str, size: int) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerUnits="userSpaceOnUse" '
        f'markerWidth="{size}" markerHeight="{size}" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{colour}"/>'
        "</marker>"
    )


def _svg(width: float, height: float, title: str, description: str, body: list[str]) -> str:
    """On its own paper, so that it reads the same on a light and on a dark page."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img" font-family="{FONT}">',
            f"<title>{title}</title>",
            f"<desc>{description}</desc>",
            f"<defs>{_head('arrow-ink', INK, 12)}{_head('arrow-blue', BLUE, 16)}</defs>",
            f'<rect width="{width:g}" height="{height:g}" rx="10" fill="{PAPER}"/>',
            *body,
            "</svg>\n",
        ]
    )


def pictures() -> dict[str, str]:
    """Every drawing by its file's name."""
    return {"two-iterations.svg": two_iterations(), "floors.svg": floors(edges())}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
