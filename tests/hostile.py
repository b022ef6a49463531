"""Names that somebody may hope lead elsewhere."""

from __future__ import annotations

from hypothesis import strategies as st

EVIL = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "$(id)",
    "`id`",
    "'; rm -rf ~; '",
    '"',
    "-rf",
    "--help",
]
EVIL += [
    "~root",
    "C:\\x",
    "..\\..\\x",
    "con",
    "a" * 400,
    "\u202e",
    "..%2f..",
    "é/ü",
    "new:../../x",
    "package:../../x",
    *(
        "..;/",
        "...",
        "x.",
        "x ",
        " ",
        ".hidden",
        "a" * 5000,
        "é" * 300,
        "\ud800",
        "a/../../b",
        "x\x1b[2J",
        "LOGS",
    ),
]
names = st.sampled_from(EVIL) | st.text(max_size=30)
