"""A page read back: its title, facts and sections with their figures and tables."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "img", "link")


@dataclass
class Part:
    """A section: figures, and the head and rows of its tables, one below the other."""

    figures: list[tuple[str, str]] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


class Page(HTMLParser):
    """Fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.title, self.text = "", text
        self.facts: list[tuple[str, str]] = []
        self.parts: dict[str, Part] = {}
        self._part, self._words, self._name = Part(), "", ""
        self._in_head = False
        self.feed(text)
        assert not self.open

    def section(self, title: str) -> Part:
        return self.parts[title]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("title", "dt", "dd", "h2", "th", "td"):
            self._words = ""
        if tag == "section":
            self._part = Part()
        if tag in ("thead", "tbody"):
            self._in_head = tag == "thead"
        if tag == "tr" and not self._in_head:
            self._part.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        words = self._words.strip().replace("\N{NO-BREAK SPACE}", " ")
        if tag == "title" and not self.title:
            self.title = words
        elif tag == "h2":
            self.parts[words] = self._part
        elif tag == "dt":
            self._name = words
        elif tag == "dd":
            (self._part.figures if "section" in self.open else self.facts).append((self._name, words))
        elif tag in ("th", "td"):
            (self._part.head if self._in_head else self._part.rows[-1]).append(words)

    def handle_data(self, data: str) -> None:
        self._words += data


def page_of(text: str) -> Page:
    """Read a page."""
    return Page(text)
