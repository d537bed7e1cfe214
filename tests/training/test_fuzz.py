"""Files and configurations that nobody would write: each is taken, or refused with its place.

The examples are the same in every run: hypothesis derives them from the tests (derandomize).
"""

import json
import math
import re
from pathlib import Path

import pytest
from chat_tokenizers import TOKENIZERS, own_stop
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from nemo_brain.config.brain import Config, check
from nemo_brain.config.evaluate import EvaluationConfig, check_evaluation
from nemo_brain.config.reward_model import RewardConfig, check_reward_config
from nemo_brain.config.schema import keys
from nemo_brain.config.serve_reward import ServeConfig, check_serve
from nemo_brain.config.sft import SFTConfig, check_sft_config
from nemo_brain.core.groups import Output, RewardedGroup, Rollout, as_json, from_json
from nemo_brain.data.preferences import load_preferences
from nemo_brain.data.prompts import load_prompts
from nemo_brain.data.rollouts import read_rollouts, write_rollout
from nemo_brain.durability.checkpoint import read_json, write_text
from nemo_brain.report.metrics import read_samples, write_samples

fuzzed = settings(derandomize=True, deadline=None, database=None, max_examples=150)
TOKENIZER = TOKENIZERS["chatml"]
SPECIAL = ["<|im_end|>", "<|im_start|>user", "\u2028", "\x00", "\ufeff", "{prompt}", "\r", "\ud800", "é", "𝄞", ""]

# Text with halves of surrogate pairs and control characters, which JSON can spell.
texts = st.one_of(st.text(st.characters(exclude_categories=()), max_size=12), st.sampled_from(SPECIAL))
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
PROMPTS = [
    {"prompt": "hello", "id": "a", "reference": "gold", "tag": [1]},
    {"messages": [USER, ANSWER, USER], "id": 3},
]
ROLLOUTS = [
    {
        "prompt": "hello",
        "prompt_token_ids": [1, 2],
        "iteration": 0,
        "outputs": [
            {
                "text": "a",
                "token_ids": [3],
                "ended": True,
                "reward": 1.0,
                "prior_logprob": -1.0,
                "proposal_logprob": -1,
            },
            {
                "text": "b",
                "token_ids": [4],
                "ended": False,
                "reward": 0,
                "prior_logprob": -1.0,
                "proposal_logprob": 0.0,
            },
        ],
    },
    {"messages": [USER], "outputs": [{"text": "a"}, {"text": "b"}, {"text": "c"}]},
]
TURNS = "\n\nHuman: hello\n\nAssistant:"
PREFERENCES = [
    {"prompt": "hello", "chosen": "a", "rejected": "b", "margin": 0.5},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
    {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
    {"chosen": f"{TURNS} yes", "rejected": f"{TURNS} no"},
    {"chosen": "hello good", "rejected": "hello bad"},
]


@st.composite
def mutated(draw, records):
    """A valid record of which some values, at any level, are others, are missing or were added."""
    record = json.loads(json.dumps(draw(st.sampled_from(records))))
    for _ in range(draw(st.integers(0, 3))):
        place = record
        while True:
            inner = [value for value in (place.values() if isinstance(place, dict) else place) if value]
            inner = [value for value in inner if isinstance(value, (dict, list))]
            if not inner or draw(st.booleans()):
                break
            place = draw(st.sampled_from(inner))
        if not place:
            continue
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        change = draw(st.sampled_from(["set", "set", "drop", "add"]))
        if change == "set":
            place[key] = draw(values)
        elif change == "drop":
            del place[key]
        elif isinstance(place, dict):
            place[draw(texts | st.sampled_from(["id", "prompt", "messages", "iteration", "outputs", "margin"]))] = draw(
                values
            )
        else:
            place.append(draw(values))
    return record


def nested(depth: int, inside: str = '{"prompt": "a", "chosen": "a b", "rejected": "a c", "x": %s}') -> bytes:
    return (inside % ("[" * depth + "]" * depth)).encode()


def lines_of(records):
    line = st.one_of(
        mutated(records).map(lambda record: json.dumps(record).encode()),
        mutated(records).map(lambda record: json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")),
        values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=20),
        st.sampled_from([b"", b" ", b"\x00", b"{", b'{"prompt": 1e999}', b'{"prompt": ' + b"1" * 5000 + b"}"]),
        st.sampled_from([40, 63, 64, 200, 900, 985, 1000, 100_000]).map(nested),
    )
    valid = st.sampled_from(records).map(lambda record: json.dumps(record).encode())
    return st.builds(
        lambda first, rest, end, mark: mark + end.join([first, *rest]),
        st.one_of(valid, line),
        st.lists(line, max_size=3),
        st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]),
        st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    )


def taken(path: Path, content: bytes, read):
    """What ``read`` makes of a file; None where it refuses it and says where."""
    path.write_bytes(content)
    try:
        return read(path)
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        assert re.match(rf"({re.escape(str(path))}:\d+: |data\.\w+\W)", str(error)), str(error)
        assert re.search(r"\(.+\)$", str(error), re.DOTALL), f"no remedy: {error}"
        return None


STOP = own_stop(TOKENIZER)
OPTIONS = {"tokenizer": TOKENIZER, "max_prompt_tokens": 8}
templates = st.sampled_from([None, "chat", "Q: {prompt}"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(content=lines_of(PROMPTS), template=templates)
@example(content=nested(985), template=None)
@example(content=b"\xef\xbb\xbf" + json.dumps(PROMPTS[0]).encode(), template=None)
def test_any_prompt_file_is_taken_or_refused_with_its_line(scratch, content, template):
    loaded = taken(scratch / "p.jsonl", content, lambda path: load_prompts(path, template=template, **OPTIONS))
    if loaded is None:
        return
    outputs = [Output([5], "a", False), Output([6], "b", True)]
    groups = [RewardedGroup(prompt, outputs, rewards=[0.0, 1.0]) for prompt in loaded.prompts]
    assert all(0 <= token < len(TOKENIZER) for group in groups for token in group.prompt.token_ids)
    # What was taken can be written, and read again: by checkpoints, reports and later runs.
    write_text(scratch / "groups.json", json.dumps(as_json(groups)))
    assert from_json(read_json(scratch / "groups.json"), RewardedGroup) == groups
    for name in ("r.jsonl", "samples.jsonl"):
        (scratch / name).unlink(missing_ok=True)
    write_rollout(scratch / "r.jsonl", Rollout(0, groups))
    again = read_rollouts(scratch / "r.jsonl", stop=STOP, template=template, max_new_tokens=4, **OPTIONS)
    assert [group.prompt.token_ids for group in again] == [group.prompt.token_ids for group in groups]
    write_samples(scratch, 0, groups, "train")
    assert [sample["id"] for sample in read_samples(scratch / "samples.jsonl")] == [g.prompt.id for g in groups]


@fuzzed
@given(content=lines_of(ROLLOUTS), template=templates)
def test_any_rollout_file_is_taken_or_refused_with_its_line(scratch, content, template):
    def read(path):
        return read_rollouts(path, stop=STOP, template=template, max_new_tokens=4, **OPTIONS)

    groups = taken(scratch / "r.jsonl", content, read)
    for group in groups or ():
        assert all(1 <= len(output.token_ids) <= 4 for output in group.outputs)
        for scores in (getattr(group, "rewards", None), group.prior_logprobs, group.proposal_logprobs):
            assert scores is None or (len(scores) == len(group.outputs) and all(map(math.isfinite, scores)))


@fuzzed
@given(content=lines_of(PREFERENCES), template=templates)
def test_any_preference_file_is_taken_or_refused_with_its_line(scratch, content, template):
    def read(path):
        return load_preferences(path, stop=STOP, template=template, max_output_tokens=4, **OPTIONS)

    loaded = taken(scratch / "pairs.jsonl", content, read)
    for pair in loaded.examples if loaded else ():
        assert math.isfinite(pair.margin)
        assert len(pair.group.outputs) == 2 and all(1 <= len(output.token_ids) <= 4 for output in pair.group.outputs)


# Configurations: what YAML and the command line can say.

junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([-1, 0, 1, 2, 3, 10**6, 2**31, 2**63, 10**400]),
        st.sampled_from([-0.5, 0.0, 0.3, 1.0, 1.5, math.nan, math.inf, -math.inf]),
        st.sampled_from(["", "x", "auto", "1", "nan", "???", "${", "${}", "${x}", "${run_dir}", "${.}", "${..seed}"]),
        st.sampled_from(["${oc.env:HOME}", "${oc.env:NOT_SET}", "${seed}", "${now:}", "${a.b.${c}}", "\x00", "é"]),
        st.text(max_size=5),
    ),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "lr", "url", "_target_", "", "1", "a.b", "${x}"]), inner, max_size=2)
        | st.dictionaries(st.sampled_from([0, 1.5, True, "a"]), inner, max_size=1)
    ),
    max_leaves=4,
)


@st.composite
def spoiled(draw, base: dict, keys: list[str]):
    """Overrides of some keys, known and unknown, at any level."""
    given_ = json.loads(json.dumps(base))
    changed = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([*keys, *{key.partition(".")[0] for key in keys}, "rollot.save", "a", "optim.x"]))
        place = given_
        *sections, name = key.split(".")
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[name] = draw(junk)
        changed.append(key)
    return given_, changed


def accepted(content: tuple[dict, list[str]], schema: set[str], check_):
    """What ``check_`` makes of a configuration; None where it refuses it and names a key."""
    given_, changed = content
    try:
        cfg = OmegaConf.create(given_)
    except GrammarParseError:  # Hydra would not come to us with it
        return None
    try:
        return check_(cfg)
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        known = {*schema, *changed, *(part for key in changed for part in key.split("."))} - {""}
        assert any(key in str(error) for key in known), str(error)
        return None


def composed(name: str, *overrides: str) -> dict:
    """A file of conf/ with overrides, as plain values."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base=None):
        return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=True)


configured = settings(fuzzed, max_examples=40)
BRAIN, REWARD, SFT, EVALUATION, SERVE = (
    sorted(name for name, *_ in keys(kind)) for kind in (Config, RewardConfig, SFTConfig, EvaluationConfig, ServeConfig)
)


@configured
@given(content=spoiled(composed("toy", "run_dir=runs/x"), BRAIN))
def test_any_configuration_is_taken_or_refused_with_its_key(content):
    config = accepted(content, set(BRAIN), check)
    if config is not None:
        assert config.steps_per_iteration >= 1 and config.rollout.temperature < math.inf
        assert config.layout and config.objective.keys() & {"name", "_target_"}


@configured
@given(content=spoiled(composed("reward_model", "data.train=x", "model.restore_from=x"), REWARD))
def test_any_configuration_of_a_reward_model_is_taken_or_refused_with_its_key(content):
    accepted(content, set(REWARD), check_reward_config)


@configured
@given(content=spoiled(composed("sft", "data.train=x", "model.restore_from=x"), SFT))
def test_any_configuration_of_fine_tuning_is_taken_or_refused_with_its_key(content):
    accepted(content, set(SFT), check_sft_config)


@configured
@given(content=spoiled(composed("serve_reward", "reward.model=x"), SERVE))
def test_any_configuration_of_a_server_is_taken_or_refused_with_its_key(content):
    accepted(content, set(SERVE), check_serve)


@configured
@given(
    content=spoiled(
        composed("evaluate", "candidates=[x]", "model.restore_from=x", "data.validation=x", "reward.function=x"),
        EVALUATION,
    )
)
def test_any_configuration_of_an_evaluation_is_taken_or_refused_with_its_key(content):
    accepted(content, set(EVALUATION), check_evaluation)
