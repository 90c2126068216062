"""In which script is it written? Chinese, Japanese and Korean letters (CJK) against Latin ones.

Letters of code, formulas, tags and boxes do not count, nor do single Latin letters: "(B)" and "x" are of no language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rewards.types import RewardContractError
from rewards.verifiers.types import Verdict, verifier

_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_LATIN = re.compile("[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]{2,}")
_MARKS = (
    ("```", "```"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"),
    ("<|begin_of_box|>", "<|end_of_box|>"), ("[{", "}]"),
)  # fmt: skip
_TAG = re.compile(r"</?[A-Za-z_|][^<>\n]{0,40}>|\\(?:boxed|text) ?\{[^{}]{0,200}\}|\\[A-Za-z]{1,20}")
_MOST_CHARACTERS = 200_000
_ROUNDING = 1e-9


@verifier(range=(-1.0, 0.0))
def mixed(response: str, limit: float = 0.3) -> Verdict:
    """-1 if more than `limit` of the letters are of the script that has fewer of them, else 0 (GLM-4.5V).

    GLM takes a fifth of the reward away; that is {use: verifiers.language.mixed, weight: 0.2, only_where: {right: 1}}.
    Parts: cjk, the share of CJK letters (NaN without any letters).
    """
    if not 0 <= limit < 0.5:
        raise RewardContractError(f"mixed: limit is {limit!r}; expected a share from 0 to below 0.5")
    share = cjk_share(response)
    if share is None:
        return Verdict(0.0)
    return Verdict(-float(min(share, 1 - share) > limit + _ROUNDING), {"cjk": share})


@verifier(range=(-1.0, 0.0))
def other_than_asked(response: str, prompt: str) -> Verdict:
    """-1 if most letters are of the other script than most of the prompt's, else 0 (Qwen3-VL); 0 if one has none."""
    asked, said = cjk_share(prompt), cjk_share(response)
    if asked is None or said is None:
        return Verdict(0.0)
    return Verdict(-float((asked > 0.5) != (said > 0.5)), {"cjk": said})


def cjk_share(text: str) -> float | None:
    """CJK letters / (CJK + Latin letters) of a text's prose, in [0, 1]; None if it has no letters."""
    prose = _TAG.sub(" ", _without(text[-_MOST_CHARACTERS:], _MARKS))
    cjk = len(_CJK.findall(prose))
    latin = sum(map(len, _LATIN.findall(prose)))
    return cjk / (cjk + latin) if cjk + latin else None


def _without(text: str, marks: Iterable[tuple[str, str]]) -> str:
    """The text without what stands between pairs of marks; a mark that is never closed stays. Linear for each pair."""
    for start, end in marks:
        kept, place = [], 0
        while True:
            begin = text.find(start, place)
            stop = text.find(end, begin + len(start)) if begin >= 0 else -1
            if stop < 0:
                break
            kept.append(text[place:begin])
            place = stop + len(end)
        text = " ".join([*kept, text[place:]])
    return text
