"""One spelling for each answer: typographic characters, Markdown and LaTeX variants become plain LaTeX."""

from __future__ import annotations

import re
import unicodedata

from megatron_rpp.reward.characters import ASCII, without_emphasis

_SYMBOLS = {
    "\u00d7": r"\times ", "\u2715": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2219": r"\cdot ", "\u2217": "*",
    "\u00f7": r"\div ", "\u2044": "/", "\u2215": "/", "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2a7d": r"\le ", "\u2265": r"\ge ", "\u2a7e": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2216": r"\setminus ", "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}", "\u2032": "'",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
}  # fmt: skip
_GREEK = {
    "\u03b1": "alpha", "\u03b2": "beta", "\u03b3": "gamma", "\u03b4": "delta", "\u03b5": "epsilon", "\u03b6": "zeta",
    "\u03b7": "eta", "\u03b8": "theta", "\u03bb": "lambda", "\u03bc": "mu", "\u03c0": "pi", "\u03c1": "rho",
    "\u03c3": "sigma", "\u03c4": "tau", "\u03c6": "phi", "\u03d5": "phi", "\u03c8": "psi", "\u03c9": "omega",
    "\u0394": "Delta", "\u03a3": "Sigma", "\u03a9": "Omega",
}  # fmt: skip
_LATEX = {**_SYMBOLS, **{letter: rf"\{name} " for letter, name in _GREEK.items()}}
_LOWERED = {chr(0x2080 + digit): str(digit) for digit in range(10)}
_RAISED = {chr(0x2070 + digit): str(digit) for digit in (0, *range(4, 10))}
_RAISED |= {"\u00b9": "1", "\u00b2": "2", "\u00b3": "3", "\u207a": "+", "\u207b": "-", "\u207d": "(", "\u207e": ")"}
_RAISED |= {"\u207f": "n"}
_ROOTS = {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))?")
_MATHEMATICAL = re.compile("[\U0001d400-\U0001d7ff]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")

# Rows of a matrix end with two backslashes, which are one token: "\\\\ " holds no "\\ ".
_ROW_END = re.compile(r"\\\\(?:\s*\[-?[0-9.]+\s*[a-z]{2}\])?")
_ROW_MARK = "\x02"

# Spacing, sizes and styles that change nothing.
_STYLE = re.compile(
    r"""\\(?: displaystyle | textstyle | left | right | [bB]igg?[lrm]? | limits | nolimits
        | large | Large | LARGE | huge | Huge | small | normalsize )(?![a-zA-Z])""",
    re.VERBOSE,
)
_SPACE = re.compile(
    r"\\[,;:>!\ ] | \\text\{\ *\} | \\(?:q?quad|space)(?![a-zA-Z]) | \\hspace\*?\{[^{}]*\} | (?<=[0-9])\{\} | ~ | \s",
    re.VERBOSE,
)
_SPACES = re.compile(r" {2,}|(?<=\}) (?=\{)|(?<=[A-Za-z]) (?=\{)")
_BRACED_TOKEN = re.compile(r"(?<![\\A-Za-z^_}\]])\{ ?(\\[A-Za-z]+|[0-9A-Za-z]) ?\}")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mbox|hbox)\s*\{")
_CONSTANT = re.compile(r"\\mathrm\s*\{\s*([ei])\s*\}")
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|emph|underline|boxed|fbox)\s*\{([^{}]*)\}")
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\leq(?:slant)?(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\geq(?:slant)?(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\.{2,}|\u2026|\\(?:[lc]?dots|dots[bcimo])(?![a-zA-Z])"), r"\\ldots "),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\colon(?![a-zA-Z])|\\mathbin\{:\}|\{:\}"), ":"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)(?=\s*[0-9])"), r"{,}"),
    (re.compile(r"\\(?:degree|degrees)(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ"),
    (re.compile(r"\\(?:euro|pounds|yen)(?![a-zA-Z])|\\\$|[$\u20ac\u00a3\u00a5\u20b9]"), " "),
    (re.compile(r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty"),
    (re.compile(r"\\text\{\s*(?:percent|pct)\s*\}|(?<=[0-9}\s])(?:percent|pct)(?![A-Za-z])|(?<!\\)%"), r"\\%"),
)
_OUTER = tuple(re.compile(pattern, re.DOTALL) for pattern in (r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\{([^{}]*)\}"))
_EDGES = re.compile(r"^(?:[\s.,;:](?![0-9]|\\overline))+|(?:\x02|[\s,;:]|\.(?!\.))+$")

# Digits. White space may separate groups of three digits. Other white space between digits is kept.
_SPLIT_THOUSANDS = re.compile(r"(?<![0-9.,}])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]| [0-9])")
_BRACED_THOUSANDS = re.compile(r"(?<=[0-9])\{,\}\s*(?=[0-9]{3})")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9]{3})")
# \frac and \sqrt with arguments that have no braces.
_SINGLE = r"([0-9A-Za-z]|\\pi(?![A-Za-z])|\\[A-Za-z]+(?![A-Za-z{]))"
_UNBRACED = (
    (re.compile(rf"\\frac\s*{_SINGLE}\s*{_SINGLE}"), r"\\frac{\1}{\2}"),
    (re.compile(rf"\\frac\s*{_SINGLE}\s*\{{"), r"\\frac{\1}{"),
    (re.compile(rf"\\frac\s*\{{([^{{}}]*)\}}\s*{_SINGLE}"), r"\\frac{\1}{\2}"),
    (re.compile(rf"\\sqrt\s*{_SINGLE}"), r"\\sqrt{\1}"),
)
_ROOT_CALL = re.compile(r"\\sqrt ?\(([^()]*)\)")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_MIXED = re.compile(r"(?<![0-9.,/^_}])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.])")
_BARE_MIXED = re.compile(r"(?<![0-9.,/^_}\\])[0-9]+ ?\\frac\{[0-9]+\}\{[0-9]+\}")
_E_NOTATION = re.compile(r"([-+]?[0-9]*\.?[0-9]+)[eE](-?[0-9]+|\+[0-9]{2,})")
_GAP = re.compile(r" (?![0-9A-Za-z])|(?<![0-9A-Za-z]) ")


def plain(text: str) -> str:
    """Prose with ASCII digits, minus signs and spaces, and without emphasis. Raised digits become powers."""
    text = _wide_to_ascii(text)
    text = _runs(text, _RAISED, "^{}")
    return without_emphasis(_VULGAR.sub(_vulgar, text))


def with_marked_mixed(prose: str) -> str:
    """The prose with "1 1/4" as LaTeX, and dollars around it where there are none, so that it is read as one number."""
    parts = [_MIXED.sub(r"\1\\frac{\2}{\3}", part) for part in prose.split("$")]
    parts[::2] = [_BARE_MIXED.sub(r"$\g<0>$", part) for part in parts[::2]]
    return "$".join(parts)


def canonical(text: str) -> str:
    """An answer in one spelling. White space between digits stays unless it parts thousands: "1 2" is not "12"."""
    text = _THOUSANDS.sub("", text)
    text = _ROW_END.sub(_ROW_MARK, without_emphasis(_wide_to_ascii(text).strip()))
    text = _runs(_runs(_VULGAR.sub(_vulgar, text), _RAISED, "^{{{}}}"), _LOWERED, "_{{{}}}")
    text = _ROOT.sub(_root, text)
    text = "".join(_LATEX.get(character, character) for character in text)
    text = _TEXT.sub(r"\\text{", _CONSTANT.sub(r"\1", text))
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _BOLD.sub(r"{\1}", _STYLE.sub(" ", text))
    text = _SPACES.sub(_narrowed, _SPACE.sub(" ", text))
    text = _BRACED_TOKEN.sub(r" \1 ", text)
    text = " ".join(text.split())
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _ROOT_CALL.sub(r"\\sqrt{\1}", text))
    text = _strip(text).replace(_ROW_MARK, r"\\")
    text = _BRACED_THOUSANDS.sub("", text)
    text = _SPLIT_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text)
    for pattern, replacement in _UNBRACED:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    if match := _E_NOTATION.fullmatch(text):
        text = rf"{match[1]}\times 10^{{{match[2]}}}"
    return text


def joined(text: str) -> str:
    """A canonical text without the white space that parts neither digits nor letters."""
    return _GAP.sub("", text)


def _wide_to_ascii(text: str) -> str:
    """ASCII for full-width forms and mathematical alphabets, but not for raised, lowered or circled digits."""
    return _MATHEMATICAL.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text.translate(ASCII))


def _runs(text: str, alphabet: dict[str, str], form: str) -> str:
    """Each run of characters of the alphabet becomes one group: a raised 1 and a raised 0 are ^{10}."""
    if text.isascii():
        return text
    letters = "".join(alphabet)
    return re.sub(f"[{letters}]+", lambda run: form.format("".join(alphabet[one] for one in run.group())), text)


def _narrowed(match: re.Match[str]) -> str:
    """One space for many; none before the braces of an argument."""
    return " " if len(match.group()) > 1 else ""


def _vulgar(match: re.Match[str]) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", match.group()).split("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _root(match: re.Match[str]) -> str:
    radicand = match[2] or match[3]
    return _ROOTS[match[1]] + (f"{{{radicand}}}" if radicand else " ")


def _strip(text: str) -> str:
    """Without what surrounds the whole answer: delimiters, braces, punctuation."""
    before = None
    while text != before:
        before = text
        text = _EDGES.sub("", text)
        for pattern in _OUTER:
            if match := pattern.fullmatch(text):
                text = match[1]
    return text
