"""Prompts that ask for a one-line synopsis of a real software package, from texts already on the machine.

Debian and Python packages carry a long description and a one-line synopsis, both written by people. The texts are read
at run time from dpkg's status file, from apt's lists where they exist and from installed Python distributions.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

DPKG_STATUS = Path("/var/lib/dpkg/status")
APT_LISTS = Path("/var/lib/apt/lists")
APT_HELPER = "/usr/lib/apt/apt-helper"  # reads every compression that apt writes

INSTRUCTION = "Summarize this software package in one short phrase of at most eight words.\n\n{description}"

VALIDATION_SHARE = 1 / 3  # of the sources; a quickstart needs 64 held-out prompts from a machine with few packages
MIN_WORDS = 15  # a shorter description leaves nothing to summarize
SYNOPSIS_WORDS = (2, 12)

SKIPPED_SECTIONS = {"libdevel", "debug", "oldlibs", "metapackages", "introspection", "localization", "doc", "kernel"}
SKIPPED_NAMES = re.compile(r"-(dev|dbg|dbgsym|doc|docs|examples|common|data|locales|l10n|all|extra)$|^(gir1\.2|linux)-")
SKIPPED_TEXTS = re.compile(r"transitional|dummy|meta-?\s?package|virtual package|empty package", re.IGNORECASE)
# Says which part of a source a package holds, not what the software is: "(shared library)", " - runtime files".
QUALIFIER = re.compile(
    r"\s*(\s-+|[,:]|\()\s*((shared|runtime|client|static|core|common|main)\s+)*"
    r"(shared|runtime|library|libraries|files|binaries|programs|utilities|bindings|modules?)\)?\.?$",
    re.IGNORECASE,
)
# Sentences about the packaging: "This package contains the shared library."
NOT_ABOUT_THE_SOFTWARE = re.compile(
    r"https?:|git:|ftp:|www\.|^(for )?more information|^licen[cs]e|^copyright|^install|^usage"
    r"|^this (binary )?package (contains|provides|includes|ships|installs)\b.*"
    r"\b(shared|run-?time|dynamic|headers?|development|library|libraries|documentation|language|message)\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9'\"(])")


def package_synopses(split: str, limit: int | None = None, max_words: int = 40, seed: int = 0) -> list[dict]:
    """Records of one split, at most one per source package, in an order that depends on ``seed`` and the sources only.

    A source package belongs to the same split whatever the machine, ``limit`` and ``max_words``, so no text of a
    validation source is ever trained on. dpkg's packages come first, then apt's, then Python's; later origins are
    read only while ``limit`` is not reached.

    Args:
        split: ``train`` or ``validation``.
        limit: the most records to return; null for all of them.
        max_words: descriptions are cut to whole sentences of at most this many words.
        seed: varies the split and the order.

    Returns:
        Dicts with ``id``, ``prompt`` (the instruction and the description), ``reference`` (the human synopsis),
        ``package``, ``source`` and ``description``.

    Raises:
        ValueError: an unknown split, or a machine without any suitable description.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"data: split is {split!r}; it is 'train' or 'validation'")
    records: dict[str, dict] = {}
    for origin in (dpkg_packages, apt_packages, python_packages):
        found = {r["source"]: r for r in _one_per_source(origin(), max_words) if r["source"] not in records}
        for source in sorted(found, key=lambda s: _fraction(s, seed, "order")):
            if (_fraction(source, seed, "split") < VALIDATION_SHARE) == (split == "validation"):
                records[source] = found[source]
        if limit is not None and len(records) >= limit:
            break
    if not records:
        raise ValueError(
            f"data: no package descriptions for the {split} split in {DPKG_STATUS}, {APT_LISTS} or Python's metadata; "
            "name a JSONL file of prompts in data.train and data.validation instead"
        )
    return list(records.values())[:limit]


def _fraction(source: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that is a function of its arguments alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def dpkg_packages(path: Path | None = None) -> Iterator[dict]:
    """Installed Debian packages as ``{"package", "source", "section", "synopsis", "long"}``."""
    path = path or DPKG_STATUS
    if path.exists():
        for fields in stanzas(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            yield from _debian(fields, fields.get("Description", ""), fields.get("Source"))


def apt_packages(directory: Path | None = None) -> Iterator[dict]:
    """All packages of apt's lists, where the long texts were downloaded (``Translation-en``)."""
    directory = directory or APT_LISTS
    translations = sorted(directory.glob("*_Translation-en*"))
    sources: dict[str, str] = {}
    for path in sorted(directory.glob("*_Packages*")) if translations else ():
        for fields in stanzas(_lines(path)):
            if "Package" in fields and "Source" in fields:
                sources[fields["Package"]] = fields["Source"]
    for path in translations:
        for fields in stanzas(_lines(path)):
            yield from _debian(fields, fields.get("Description-en", ""), sources.get(fields.get("Package", "")))


def python_packages() -> Iterator[dict]:
    """Installed Python distributions: their summary, and their readme without markup."""
    for distribution in metadata.distributions():
        meta: Any = distribution.metadata  # an email message, of which its protocol names a part
        name, body = meta["Name"], meta.get("Description") or meta.get_payload() or ""
        if name and isinstance(body, str):
            synopsis = (meta.get("Summary") or "").rstrip(".")
            yield {
                "package": name,
                "source": name,
                "section": "python",
                "synopsis": synopsis,
                "long": readme_prose(body),
            }


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file (deb822) as dicts; continuation lines keep their indentation."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            if name:
                fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def debian_prose(text: str) -> list[str]:
    """The prose paragraphs of a Debian long description: lines joined, lists and preformatted lines left out."""
    paragraphs, current = [], []
    for line in [*text.splitlines(), " ."]:
        body = line[1:].rstrip()
        prose = body not in ("", ".") and body[0] not in " \t*-+"
        if prose:
            current.append(body)
        elif current:
            paragraphs.append(" ".join(current))
            current = []
    return paragraphs


def readme_prose(text: str) -> list[str]:
    """The prose paragraphs of a Markdown or reStructuredText readme, with links reduced to their words."""
    text = re.sub(r"<!--.*?-->|```.*?```|~~~.*?~~~", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?|\|[\w .-]+\|_?", "", text)  # images and badges
    text = re.sub(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)  # Markdown links
    text = re.sub(r"`([^`<]+?)\s*<[^>]*>`_+", r"\1", text)  # reStructuredText links
    text = re.sub(r"(\*\*|__|``?)(\S.*?)\1", r"\2", text)
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        if re.search(
            r"^([#.<>|=*+~:\s-]|\d+\.)|^[=~^*#-]{3,}\s*$|::\s*$|<\w+[^>]*>|[{}|]", block.lstrip("\n"), re.MULTILINE
        ):
            continue
        paragraphs.append(" ".join(block.split()))
    return paragraphs


def _lines(path: Path) -> list[str]:
    """A list file's lines, decompressed by apt itself; none where apt cannot read it."""
    done = subprocess.run([APT_HELPER, "cat-file", str(path)], capture_output=True, check=False)
    return done.stdout.decode("utf-8", errors="replace").splitlines()


def _debian(fields: dict[str, str], description: str, source: str | None) -> Iterator[dict]:
    package = fields.get("Package")
    if package:
        synopsis, _, long = description.partition("\n")
        name = (source or package).split()[0]
        yield {
            "package": package,
            "source": name,
            "section": fields.get("Section", "").rpartition("/")[2],
            "synopsis": synopsis,
            "long": debian_prose(long),
        }


def _one_per_source(packages: Iterable[dict], max_words: int) -> Iterator[dict]:
    """The suitable packages as records; of one source's packages its main one."""
    chosen: dict[str, tuple[tuple, dict]] = {}
    for p in packages:
        synopsis = QUALIFIER.sub("", p["synopsis"]).strip()
        description = _cut(p["long"], max_words)
        if (
            p["section"] in SKIPPED_SECTIONS
            or SKIPPED_NAMES.search(p["package"])
            or SKIPPED_TEXTS.search(p["synopsis"] + " " + description)
            or not SYNOPSIS_WORDS[0] <= len(synopsis.split()) <= SYNOPSIS_WORDS[1]
            or len(description.split()) < MIN_WORDS
        ):
            continue
        # One project has several names: python-attrs and attrs, llvm-toolchain-14 and llvm-toolchain-15.
        source = re.sub(r"^python3?-|(-\d[\d.]*|\d+\.\d[\d.]*)$", "", p["source"].lower().replace("_", "-"))
        record = {
            "id": f"package-{p['package']}",
            "prompt": INSTRUCTION.format(description=description),
            "reference": synopsis,
            "package": p["package"],
            "source": source,
            "description": description,
        }
        rank = (p["package"] != p["source"], p["section"] == "libs", len(p["package"]), p["package"])
        if source not in chosen or rank < chosen[source][0]:
            chosen[source] = (rank, record)
    return (record for _, record in chosen.values())


def _cut(paragraphs: list[str], max_words: int) -> str:
    """The leading sentences about the software, at most ``max_words`` words."""
    kept: list[str] = []
    words = 0
    for paragraph in paragraphs:
        for sentence in filter(None, SENTENCE_END.split(paragraph)):
            if NOT_ABOUT_THE_SOFTWARE.search(sentence) or sentence[-1] not in ".!?":
                continue
            words += len(sentence.split())
            if words > max_words:
                return " ".join(kept)
            kept.append(sentence)
    return " ".join(kept)
