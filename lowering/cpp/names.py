"""User text -> C++ identifiers and comments. Nothing of it can leave its comment or become code."""

from __future__ import annotations

import re

from snn_compile.lowering.cpp.prelude import SLEEF


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KEYWORDS = words("""
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class
    co_await co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype
    default delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int
    long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register
    reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch template
    this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t
    while xor xor_eq int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t uintptr_t std main linux unix
    errno NULL
""")

#: What the kernels and the helpers name themselves.
_OURS = words("""
    steps t lane lanes first size block blocks block_lanes rows row first_row end_row block_rows row_blocks
    lane_blocks at end capacity threads thread streaming stream scratch scratch_bytes here visit replays segment
    segments begin stop number LANES min max sigmoid integer_power sigmoid_of_one start prefetch next_begin next_first
""").union(SLEEF, (f"v{name}" for name in SLEEF))

RESERVED = _KEYWORDS | _OURS

#: A value `x` has `x_data`, `x_row`, `x_stride_t`... beside it, so no value may end like that.
_DERIVED = re.compile(
    r".*_(data|row|lanes|init|final|record|checkpoint|sum|stage|to|then|next|bf16|fp16|(stride|size|at)_\w+)|(size|at)_\d+"
)

_LONGEST = 40


class Names:
    """Hands out identifiers, each once."""

    def __init__(self) -> None:
        self._taken = set(RESERVED)

    def copy(self) -> Names:
        """The names of an inner scope."""
        inner = Names()
        inner._taken = set(self._taken)
        return inner

    def unique(self, wanted: str) -> str:
        base = name = identifier(wanted)
        count = 1
        while name in self._taken:
            count += 1
            name = f"{base}{count}"
        self._taken.add(name)
        return name


def identifier(text: str) -> str:
    """An ASCII identifier that is no keyword, none of the generated code's names, none the standard reserves."""
    name = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")[:_LONGEST].strip("_")
    if not name or name[0].isdigit():
        name = f"value_{name}".rstrip("_")
    numbered = re.fullmatch(r"(.*?)_([0-9]+)", name)
    if numbered:  # `mul_1` is fx's second `mul`
        name = numbered[1] + numbered[2]
    if name in RESERVED or _DERIVED.fullmatch(name) or name.startswith(("Sleef", "_")):
        name += "_value"
    return name


def comment(text: str) -> str:
    """`text` as comment lines: ASCII-printable (no line end survives), not ending in a backslash, no trigraph."""
    plain = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text)
    plain = plain[:160].replace("??", "? ?").rstrip("\\ ")
    return f"// {plain}".rstrip()
