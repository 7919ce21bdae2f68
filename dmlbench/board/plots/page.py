"""A figure as SVG inside a page: it takes the page's colours, light or dark, and nothing of the page's but those.

A page has the custom properties ``--soft``, ``--line``, ``--paper`` and ``--s1`` to ``--s8``, and text has its own colour.
Styles stand in attributes, since a content security policy that allows the page's own style alone refuses them elsewhere.
"""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from dmlbench.board.plots.draw import Figure, Ink, draw

SERIES = 8
"""Colours that tell things apart; more things begin again with the first."""
_STANDS_FOR = {
    "#0100f1": "currentColor",
    "#0100f2": "var(--soft)",
    "#0100f3": "var(--line)",
    "#0100f4": "var(--paper)",
    "#ffffff": "none",
    **{f"#0100a{n}": f"var(--s{n})" for n in range(1, SERIES + 1)},
}
"""Colours that nothing is drawn in, and what takes their place."""


def _of(count: int) -> Sequence[str]:
    return [f"#0100a{1 + n % SERIES}" for n in range(count)]


PAGE = Ink(_of, ink="#0100f1", soft="#0100f2", line="#0100f3", paper="#0100f4")


def inline(figure: Figure, name: str, title: str, width: float = 5.5, height: float | None = None) -> Markup:
    """The figure as an element ``svg``, the same text for the same numbers.

    Args:
        name: what its ids begin with, which no other figure of the page has.
        title: what it is called for those who do not see it.

    Raises:
        UsageError: there is nothing to draw.
    """
    root = ElementTree.fromstring(draw(figure, "svg", width, PAGE, height))
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        if element.tag in ("metadata", "style"):
            parents[element].remove(element)
        else:
            _plain(element)
    used = set(re.findall(r"#([\w.-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in list(root.iter()):
        point_id = element.attrib.pop("id", "")
        if point_id in used:
            element.set("id", f"{name}-{point_id}")
        for key, value in element.attrib.items():
            element.set(key, re.sub(r"^#|(?<=url\()#", f"#{name}-", value))
        if point := re.fullmatch(r"point-(\d+)-(\d+)", point_id):
            _lead(element, figure, *map(int, point.groups()))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "role": "group" if any(s.links for s in figure.series) else "img",
        "aria-labelledby": f"{name}-title",
    }
    root.attrib |= {"class": f"plot {figure.kind}", "stroke-linejoin": "round"}
    heading = ElementTree.Element("title", id=f"{name}-title")
    heading.text = title
    root.insert(0, heading)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _plain(element: ElementTree.Element) -> None:
    """Styles as attributes, colours as the page's, no namespaces, no needless white space."""
    style = dict(part.split(": ", 1) for part in element.attrib.pop("style", "").split("; ") if part)
    if (font := style.pop("font", None)) and (size := re.search(r"([\d.]+)px", font)):
        style["font-size"] = size[1]  # as older versions of matplotlib write it
    style.pop("font-family", None)
    given = {key.rpartition("}")[2]: " ".join(value.split()) for key, value in element.attrib.items()}
    styled = {key: value.removesuffix("px") for key, value in style.items()}
    attributes = {key: _STANDS_FOR.get(value, value) for key, value in {**given, **styled}.items()}
    element.attrib.clear()
    element.attrib.update(attributes)
    element.text, element.tail = element.text and element.text.strip("\n"), None
    if not (element.text or "").strip():
        element.text = None


def _lead(element: ElementTree.Element, figure: Figure, series: int, n: int) -> None:
    """A point's marker with its link and its tooltip."""
    s = figure.series[series]
    if s.links:
        link = ElementTree.Element("a", {"href": s.links[n], "class": "point", "tabindex": "-1"})
        link.extend(list(element))
        for child in list(element):
            element.remove(child)
        element.append(link)
        element = link
    if s.tooltips:
        title = ElementTree.Element("title")
        title.text = s.tooltips[n]
        element.insert(0, title)
