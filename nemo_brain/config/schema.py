"""What a configuration's key is, said once, at its field: default, meaning, bounds, whether it may change on resume.

    epochs: int = key(MISSING, "passes over the training data", at_least=1, resumable=True)

``parse`` makes a composed configuration an instance of such dataclasses, or says which key is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")


@dataclass(frozen=True)
class Unless:
    """A key that a resumed run may change as long as the key ``other`` has no value: ``because`` says why."""

    other: str
    because: str

    def forbids(self, configuration: Mapping[str, Any]) -> bool:
        value: Any = configuration
        for name in self.other.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return bool(value)


@dataclass(frozen=True)
class Never:
    """A key that no resumed run may change, whatever ``checkpoint.allow_changes`` says: ``because`` says why."""

    because: str


@dataclass(frozen=True)
class Key:
    """What a field says of its key.

    Args:
        doc: its meaning.
        at_least, above, at_most, below: bounds of a number; null passes where the type lets it.
        among: the values it may have, each with its meaning; of a list, its items.
        resumable: whether a resumed run may change it, and what is below it: it says how a run computes, or where, but
            not what.
    """

    doc: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    among: Mapping[Any, str] | None = None
    resumable: bool | Unless | Never = False

    @property
    def bounds(self) -> str:
        """The values it may have, in words; '' for any."""
        if self.among is not None:
            return f"one of {', '.join('null' if value is None else str(value) for value in self.among)}"
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)

    @property
    def choices(self) -> str:
        """The values of ``among`` with their meanings; '' for none."""
        return " | ".join(
            ("null" if value is None else str(value)) + (f" ({meaning})" if meaning else "")
            for value, meaning in (self.among or {}).items()
        )

    @property
    def comment(self) -> str:
        """Its meaning and choices, as the YAML files have them."""
        return ": ".join(filter(None, (self.doc, self.choices)))

    def accepts(self, value: Any) -> bool:
        if self.among is not None:
            return value in self.among
        return value is None or not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )


def key(default: Any, doc: str = "", **rules: Any) -> Any:
    """A field of a configuration.

    Args:
        default: its value; a type (of a section) or a list or dictionary gives each instance its own.
        doc, rules: as ``Key`` has them.
    """
    metadata = {"key": Key(doc, **rules)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def rules(item: dataclasses.Field[Any]) -> Key:
    rule: Key = item.metadata.get("key", Key())
    return rule


def sections(kind: type) -> dict[str, type]:
    """The fields that are sections, those that may be null too."""
    found: dict[str, type] = {}
    for name, hint in typing.get_type_hints(kind).items():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                found[name] = part
    return found


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], type | None]]:
    """All dotted keys of a configuration, their fields, and of a section its type; a section comes before its keys."""
    nested = sections(kind)
    for item in dataclasses.fields(kind):
        section = nested.get(item.name)
        yield prefix + item.name, item, section
        if section is not None:
            yield from keys(section, f"{prefix}{item.name}.")


def resume_rule(kind: type, name: str) -> bool | Unless | Never:
    """Whether a resumed run may change the dotted key ``name``: its own rule, or that of a section above it."""
    first, _, rest = name.partition(".")
    own = {item.name: rules(item).resumable for item in dataclasses.fields(kind)}.get(first, False)
    nested = sections(kind).get(first)
    return own if own or nested is None or not rest else resume_rule(nested, rest)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the known ones that are like it, or ``otherwise``."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else otherwise


def check_names(given: Mapping[str, Any], kind: type, key: str) -> None:
    """ValueError: the section ``key`` names a field that the dataclass ``kind`` of NeMo's or Megatron's has not."""
    names = [item.name for item in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(
                f"unknown configuration key {key}.{name}: {kind.__name__} has no such field{did_you_mean(name, names)}"
            )


def parse(kind: type[T], cfg: DictConfig, file: str) -> T:
    """``cfg`` as an instance of ``kind``, each key within its bounds.

    Args:
        file: the configuration file that states every key, for errors.

    Raises:
        ValueError: names the key that is unknown, has no value, one of another type or one out of bounds.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), cfg)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        unknown = error.full_key or str(error.key)
        hint = did_you_mean(unknown, (name for name, *_ in keys(kind)), f"; the known keys are in {file}")
        raise ValueError(f"unknown configuration key {unknown}{hint}") from None
    except MissingMandatoryValue as error:
        raise ValueError(
            f"configuration key {error.full_key} has no value: set it in the YAML or on the command line"
        ) from None
    except OmegaConfBaseException as error:
        culprit = error.full_key or _culprit(kind, cfg)
        raise ValueError(f"configuration key {culprit}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, kind)
    _check_bounds(config)
    return config


def _check_bounds(section: Any, prefix: str = "") -> None:
    for item in dataclasses.fields(section):
        name, value, rule = prefix + item.name, getattr(section, item.name), rules(item)
        if dataclasses.is_dataclass(value):
            _check_bounds(value, f"{name}.")
            continue
        for one in value if isinstance(value, list) else [value]:
            # Every comparison with a bound would let NaN pass, or not, by accident.
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"{name} must be a finite number, not {one}")
            if not rule.accepts(one):
                null = " or null" if rule.among is None and str(item.type).endswith("None") else ""
                raise ValueError(f"{name} must be {rule.bounds}{null}, not {one!r}")


def _culprit(kind: type, cfg: DictConfig) -> str:
    """The key that OmegaConf fails on, where its error does not say: alone it has another type, or does not resolve."""
    for path, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        name = ".".join(map(str, path))
        items = [f"{name}[{index}]" for index in range(len(value))] if isinstance(value, list) else []
        try:
            for item in items:
                OmegaConf.select(cfg, item)
            tree = OmegaConf.select(cfg, name) if isinstance(value, str) else value  # an interpolation's value
            for part in reversed(path):
                tree = {part: tree}
            OmegaConf.merge(OmegaConf.structured(kind), tree)
        except OmegaConfBaseException:
            return name
    return "(unknown)"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values that are no sections, with the names that lead to them."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
