"""A picture as SVG, written by hand: small, the same bytes every time. Its words stay text, so that the reader's own
fonts set them, Chinese too."""

from pathlib import Path
from xml.sax.saxutils import escape

INK, FAINT, EMPTY, EDGE, ALARM = "#22303c", "#6b7883", "#e6e9ec", "#c6ccd1", "#d1495b"
PALETTE = ("#e07a5f", "#3d85c6", "#81b29a", "#f2b65a", "#8d6bb8", "#5fb3b3", "#c9628a", "#9aae4e")
SANS = "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace"


class Picture:
    """A drawing of `width` x `height` units on a white card (so that it reads on a dark page)."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        *,
        edge: str = "none",
        line: float = 1,
        round: float = 0,
    ) -> None:
        stroke = "" if edge == "none" else f' stroke="{edge}" stroke-width="{n(line)}"'
        corner = f' rx="{n(round)}"' if round else ""
        self.parts.append(f'<rect x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}" fill="{fill}"{stroke}{corner}/>')

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, fill: str = INK, anchor: str = "start",
        bold: bool = False, mono: bool = False, turn: float = 0,
    ) -> None:  # fmt: skip
        """`y` is the middle of the line; anchor: start, middle or end."""
        style = f' class="{" ".join(filter(None, ("m" if mono else "", "b" if bold else "")))}"' if mono or bold else ""
        place = f'x="{n(x)}" y="{n(y + size * 0.35)}"'
        if turn:
            place += f' transform="rotate({n(turn)} {n(x)} {n(y)})"'
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text {place} font-size="{n(size)}" fill="{fill}"{at}{style}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = FAINT, width: float = 1.2) -> None:
        self.parts.append(
            f'<path d="M{n(x1)} {n(y1)}L{n(x2)} {n(y2)}" stroke="{colour}" stroke-width="{n(width)}" fill="none"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = FAINT, width: float = 1.6) -> None:
        """Along one axis."""
        self.line(x1, y1, x2, y2, colour, width)
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        wings = (
            f"L{n(x2 - 7 * dx - 4 * dy)} {n(y2 - 7 * dy - 4 * dx)}L{n(x2 - 7 * dx + 4 * dy)} {n(y2 - 7 * dy + 4 * dx)}"
        )
        self.parts.append(f'<path d="M{n(x2)} {n(y2)}{wings}Z" fill="{colour}"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {n(self.width)} {n(self.height)}" '
            f'width="{n(self.width)}" height="{n(self.height)}" role="img" font-family="{escape(SANS)}">'
        )
        style = f"<style>text{{white-space:pre}}.b{{font-weight:600}}.m{{font-family:{escape(MONO)}}}</style>"
        card = f'<rect width="{n(self.width)}" height="{n(self.height)}" rx="8" fill="#fff"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", style, card, *self.parts, "</svg>\n"])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg(), encoding="utf-8")


def n(value: float) -> str:
    """A number with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def shade(share: float, colour: str = "#0b7285", steps: int = 12) -> str:
    """From white (0) to `colour` (1), in a few steps: rounding of the last bits cannot be seen."""
    level = round(min(max(share, 0.0), 1.0) * steps) / steps
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * level):02x}" for part in parts)
