"""Numbers as people read them, in the report and at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def number(value: float | None, plus: str = "") -> str:
    """A metric for people: two decimals, fewer for large ones, more for small ones; "n/a" if it is missing."""
    if value is None:
        return "n/a"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:{plus},.0f}"
    if abs(value) >= 10:
        return f"{value:{plus}.1f}"
    return f"{value:{plus}.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:{plus}.2g}"


def signed(value: float | None) -> str:
    """A difference for people: ``number`` with its sign."""
    return number(value, "+")


def percent(value: float | None, decimals: int = 0) -> str:
    return "n/a" if value is None else f"{value:.{decimals}%}"


def p_text(value: float | None) -> str:
    """A p-value for people, "" if there is none: below 0.001 its order says nothing more."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def interval(record: Mapping[str, Any], name: str, text: Callable[[float], str] = number) -> str:
    """The 95% confidence interval of a metric of an eval record, for people; "" if it has none."""
    low, high = record.get(f"{name}_ci_low"), record.get(f"{name}_ci_high")
    return "" if low is None or high is None else f"95% CI {text(low)} to {text(high)}"


def with_interval(record: Mapping[str, Any], name: str, text: Callable[[float | None], str] = number) -> str:
    """A metric of an eval record with its interval, if it has one."""
    ci = interval(record, name, text)
    return text(record.get(name)) + (ci and f" ({ci})")


def nats(value: float | None) -> str:
    """A loss in nats for people: three decimals."""
    return "n/a" if value is None else f"{value:.3f}"
