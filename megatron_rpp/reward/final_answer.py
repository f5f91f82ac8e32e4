"""Where the final answer of a response stands.

In this order: the last complete box; the last line that begins with GSM8K's marker "####" and holds an answer; what
follows the last "the answer is" or "Answer:".
"""

from __future__ import annotations

import re

# A box that opens, a box around one character ("\\boxed 2"), an escaped character, a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<open>\{)|(?P<single>[^\s{}\\]))|\\.|[{}]", re.DOTALL)
# What may stand between two boxes that are one list: "and", a comma, dollars, "b =". Not "or": that is a guess.
_LIST_GLUE = re.compile(
    r"""[\s$]* (?: , | ; | & | ,?\s*(?:\\text\s*\{\s*)?and(?:\s*\})? ) [\s$]*
        (?: [A-Za-z] (?:_\{?[0-9A-Za-z]\}?)? \s*=\s* )?""",
    re.VERBOSE,
)

_LIST_OR_GLUE = re.compile(_LIST_GLUE.pattern.replace("?and(", "?(?:and|or)("), re.VERBOSE)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

_MARKER = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_LABEL = re.compile(
    r"(?:(?:the|my|our)\s+)?(?:final\s+)?answer(?:\s+is)?\s*(?::|(?<=is)\s|$)\s*",
    re.IGNORECASE,
)
# A number with its sign, money and percent.
_NUMBER = re.compile(
    r"[-+]?\s* (?:\\?[$\u20ac\u00a3]\s*)? [-+]?[0-9][0-9,.\ ]* (?:/\s*[0-9]+)? \s*(?:\\?%|\\?\$|\u00b0)?\.?",
    re.VERBOSE,
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_TEXT_GROUP = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{[^{}]*\}")

_PHRASE = re.compile(r"answers?(?:\s+(?:is|are)(?:\s*:)?|\s*:)[\s$]*?(?=\S)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|(?<!\\)[.!](?=\s|$)|;\s")
_CLAUSE_END = re.compile(
    r""",\s (?!(?:and|or)\s+(?:[-+$\\(0-9]|[b-zB-HJ-Z]\b)) (?=[a-z]{2,}\s)
        | \s(?=(?:because|since|so|which|where|when|if|for)\s)""",
    re.VERBOSE,
)
_REASON = re.compile(r"(?:because|since|so|which|where)\s")
# "4, or maybe 5", "4 when n is odd and 5 otherwise", "4 for n=1, 5 for n=2": more than one value.
_ALTERNATIVE = re.compile(
    r"""\b(?:or|but|else|otherwise|maybe|perhaps|possibly)\b .* [0-9]
        | (?:,|\band\b)\s* (?:[a-z]+\s+)? [-+$\\(]*[0-9]""",
    re.VERBOSE,
)
_DELIMITER = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
_OPENING = re.compile(r"^(?:[\s$]|\\\[|\\\()+")
_MAX_CLAUSE = 300
_MAX_BOXES = 50


def explicit_answer(text: str, *, with_or: bool = False) -> str | None:
    """The content of the last box or boxes, else of the last "####" line that holds an answer, else None.

    with_or: boxes joined by "or" are one list too.
    """
    if (content := _last_boxes(text, _LIST_OR_GLUE if with_or else _LIST_GLUE)) is not None:
        return content.strip()
    return _marked(text)


def has_open_box(text: str) -> bool:
    """True if a box begins in a text without a complete box: the answer was cut off."""
    return bool(_OPEN_BOX.search(text))


def stated_answer(text: str) -> str | None:
    """The clause after the last "the answer is" or "Answer:"; "" if it says more than one value; None without one."""
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    end = phrases[-1].end()
    clause = _OPENING.sub("", text[end : end + _MAX_CLAUSE])
    sentence = _SENTENCE_END.split(clause, maxsplit=1)[0]
    clause = _CLAUSE_END.split(sentence, maxsplit=1)[0]
    rest = sentence[len(clause) :].lstrip(" ,")
    said_more = rest if not _REASON.match(rest) else ""
    if not is_mathematics(clause := _DELIMITER.sub(" ", clause).strip()):
        said_more = f"{clause} {said_more}"
    return "" if _ALTERNATIVE.search(said_more) else clause or None


def is_mathematics(text: str) -> bool:
    """True for a text with no word in it but "and" and "or"."""
    words = _WORD.findall(_COMMAND.sub(" ", _TEXT_GROUP.sub(" ", text)))
    return all(word in ("and", "or", "pi", "sqrt") for word in words) and not text.endswith("=")


def _last_boxes(text: str, glue: re.Pattern[str]) -> str | None:
    """What the complete box that begins last holds, after the boxes that form a list with it.

    One pass: a model that repeats "\\boxed{" for ever costs no more than others.
    """
    boxes: list[tuple[int, int, str]] = []  # begin of the command, end of the box, content; in order of their begins
    open_braces: list[tuple[int, int] | None] = []  # begins of command and content; None for a brace that is no box
    for token in _BRACES.finditer(text):
        if token["single"]:
            boxes.append((token.start(), token.end(), token["single"]))
        elif token["open"]:
            open_braces.append((token.start(), token.end()))
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces and (opened := open_braces.pop()):
            begin, content = opened
            if not boxes or begin > boxes[-1][0]:  # else it surrounds a box that begins later
                boxes.append((begin, token.end(), text[content : token.start()]))
    if not boxes:
        return None
    begin, _, content = boxes.pop()
    contents = [content]
    while boxes and len(contents) < _MAX_BOXES and glue.fullmatch(text[boxes[-1][1] : begin]):
        begin, _, content = boxes.pop()
        if content not in contents:
            contents.append(content)
    return ", ".join(reversed(contents))


def _marked(text: str) -> str | None:
    """The answer on the last marker line that has one. Markdown's headings of the fourth level look the same.

    A line counts when it is the last one, when a number or a formula is all that it holds, or when it is labeled
    "Answer:". A bare "#### Final answer" points to the line below it.
    """
    end = len(text.rstrip())
    for marker in reversed(list(_MARKER.finditer(text))):
        rest = marker[1].strip().strip("*_` ")
        label = _LABEL.match(rest)
        value = rest[label.end() :].strip("*_` ") if label else rest
        if label and not value and (line := _first_line(text[marker.end() : marker.end() + _MAX_CLAUSE])):
            return line
        if value and (label or marker.end() >= end or _NUMBER.fullmatch(value) or _is_formula(value)):
            return value
    return None


def _first_line(text: str) -> str | None:
    """The first line that is mathematics, if the first line is."""
    line = text.strip().partition("\n")[0].strip().strip("*_` ")
    return line if line and is_mathematics(line) else None


def _is_formula(text: str) -> bool:
    return text.startswith(("\\", "$")) and is_mathematics(text)
