"""A reward for outputs whose last number is the reference's: GSM8K's and the like."""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

from nemo_brain.rewards.verifiers.base import Verifier, check_number

_NUMBER = re.compile(
    # A sign behind a word or a bracket is subtraction, or a range.
    r"(?P<sign>(?<![\w)\]}])[-+\u2212]\s?(?:\\?\$)?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,9}(?![0-9]))?"
    r"(?P<percent>\s?\\?%)?"
)
_EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


class LastNumberReward(Verifier):
    """1 for an output whose last number is the reference's, 0 for another.

    Numbers may have a sign, thousands separators (``1,234``), decimals, an exponent (``1.5e3``), a dollar sign and a
    percent sign: ``50%`` equals both 50 and 0.5. The reference's number is its last one; of a reference like GSM8K's,
    with ``#### 42``, what stands behind that.

    Args:
        tolerance: by which numbers may differ, relative to the reference's; 0: not at all.

    Raises:
        ValueError: naming the argument, what is wrong with it and the remedy.
    """

    def __init__(self, tolerance: float = 0.0):
        check_number("tolerance", tolerance, at_least=0)
        self._tolerance = Decimal(repr(tolerance))

    def check(self, reference: str | None, metadata: dict) -> None:
        if reference is None or not last_number(reference.rpartition("####")[2]):
            said = "no reference" if reference is None else f"a reference without a number, {reference[-80:]!r}"
            raise ValueError(f"{said} (write the number to be found into the record's 'reference')")

    def score(self, outputs: list[str], references: list[str | None], metadata: list[dict]) -> list[float]:
        expected = [last_number((reference or "").rpartition("####")[2]) for reference in references]
        return [
            float(any(self._equal(a, b) for a in last_number(output) for b in values))
            for output, values in zip(outputs, expected, strict=True)
        ]

    def _equal(self, value: Decimal, reference: Decimal) -> bool:
        # As exact as the tolerance asks for: prec rounds differences, and no number to begin with.
        if value == reference:
            return True
        difference = _EXACT.abs(_EXACT.subtract(value, reference))
        return difference <= _EXACT.multiply(self._tolerance, _EXACT.abs(reference))


def last_number(text: str) -> list[Decimal]:
    """The last number of a text, as its readings: one, with a percent sign two; none where there is no number."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    if match is None:
        return []
    sign = "-" if (match["sign"] or "").startswith(("-", "\u2212")) else ""
    value = Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))
    return [value, _EXACT.divide(value, Decimal(100))] if match["percent"] else [value]
