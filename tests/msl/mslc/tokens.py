"""The tokens of a preprocessed .metal file, and the file and line each of them came from."""
import bisect
import re
from typing import NamedTuple

PATTERN = re.compile(
    r"""
    (?P<directive>^\#[^\n]*$)
  | (?P<space>\s+)
  | (?P<string>"(?:\\.|[^"\\])*")
  | (?P<character>'(?:\\.|[^'\\])*')
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<sign>::|->|<<=|<=|>=|==|!=|&&|\|\||\+\+|--|\+=|-=|\*=|/=|&=|\|=|\^=|%=|<<|\.\.\.|\S)
    """,
    re.M | re.S | re.X,
)
LINE_MARKER = re.compile(r'# (\d+) "([^"]*)"')
OPENING = {"(": ")", "[": "]", "{": "}"}


class Problem(NamedTuple):
    """One diagnostic of the tool itself."""

    file: str
    line: int
    message: str

    def __str__(self):
        return f"{self.file}:{self.line}: error: {self.message}"


class Unreadable(Exception):
    """Brackets without a partner, or a declaration without an end: nothing after it can be understood."""


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


class Source:
    """A token list with matched brackets. `>>` stays two tokens, so that template brackets match."""

    def __init__(self, text):
        self.text = text
        self.tokens = [
            Token(found.lastgroup, found.group(), found.start(), found.end())
            for found in PATTERN.finditer(text)
            if found.lastgroup not in ("space", "directive")
        ]
        self.size = len(self.tokens)
        self.tokens.append(Token("end", "", len(text), len(text)))
        self._read_line_markers()
        self._match_brackets()

    def __getitem__(self, i):
        """The text of token i."""
        if i > self.size:
            raise Unreadable(self.problem(self.size - 1, "the file ends within a declaration or statement"))
        return self.tokens[i].text

    def _read_line_markers(self):
        self.line_starts, self.origins = [], []
        position, file, line = 0, "?", 1
        for text in self.text.split("\n"):
            marker = LINE_MARKER.match(text)
            if marker:
                line, file = int(marker.group(1)) - 1, marker.group(2)
            self.line_starts.append(position)
            self.origins.append((file, line))
            position += len(text) + 1
            line += 1

    def _match_brackets(self):
        self.pair = {}
        open_brackets = []
        for i, token in enumerate(self.tokens):
            if token.kind != "sign":
                continue
            if token.text in OPENING:
                open_brackets.append(i)
            elif token.text in ")]}":
                if not open_brackets or OPENING[self[open_brackets[-1]]] != token.text:
                    raise Unreadable(self.problem(i, f"'{token.text}' without its opening bracket"))
                partner = open_brackets.pop()
                self.pair[partner], self.pair[i] = i, partner
        if open_brackets:
            raise Unreadable(self.problem(open_brackets[-1], f"'{self[open_brackets[-1]]}' is never closed"))

    def origin(self, i):
        """(file, line) of token i."""
        return self.origins[bisect.bisect_right(self.line_starts, self.tokens[i].start) - 1]

    def problem(self, i, message):
        return Problem(*self.origin(i), message)

    def texts(self, start, end):
        return [token.text for token in self.tokens[start:end]]

    def words(self, start, end):
        """The identifiers and keywords of a range, as a set."""
        return {token.text for token in self.tokens[start:end] if token.kind == "word"}

    def skip(self, i):
        """The index after token i, or after the bracket it opens."""
        return self.pair[i] + 1 if self[i] in OPENING else i + 1

    def angle_end(self, i):
        """The index after the `>` that closes the `<` at i, or None where `<` is a comparison."""
        depth = 0
        while i < self.size:
            text = self[i]
            if text in OPENING:
                i = self.pair[i]
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return i + 1
            elif text in (";", ")", "]", "}", "&&", "||"):
                return None
            i += 1
        return None

    def is_attribute(self, i):
        """Does `[[...]]` begin here?"""
        return (
            self[i] == "["
            and self[i + 1] == "["
            and self.tokens[i + 1].start == self.tokens[i].end
            and self.pair[i + 1] == self.pair[i] - 1
        )

    def attributes(self, i):
        """The attributes of the `[[...]]` at i as (name, argument text) pairs, and the index after it."""
        end, found = self.pair[i + 1], []
        j = i + 2
        while j < end:
            name, argument = self[j], ""
            j += 1
            if self[j] == "(":
                argument = " ".join(self.texts(j + 1, self.pair[j]))
                j = self.pair[j] + 1
            found.append((name, argument))
            if self[j] == ",":
                j += 1
        return found, self.pair[i] + 1

    def arguments(self, i):
        """The comma-separated ranges inside the bracket at i, as (start, end) pairs."""
        end, ranges = self.pair[i], []
        start = j = i + 1
        while j < end:
            closing = self.angle_end(j) if self[j] == "<" else None
            if closing and closing <= end:
                j = closing
            elif self[j] == ",":
                ranges.append((start, j))
                start = j = j + 1
            else:
                j = self.skip(j)
        if start < end:
            ranges.append((start, end))
        return ranges
