"""Rewards, the reward server, samples.jsonl, rollouts.jsonl and the report have the same text of an output."""

import html
import json

from reward_server import RewardServer
from small_runs import train

from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.report.metrics import read_samples

TEXTS = [" !", " ,", " .", " ?", " n't", " 's"]  # what a clean-up takes the spaces from: tokens 258 and on
END = 256
REWARD = """
import json

def heard(prompts, outputs, *, references, metadata):
    with open({file!r}, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(text) + "\\n" for text in outputs)
    return [0.0] * len(outputs)
"""


def spelled(output: dict) -> str:
    """The bytes of the tokens, one by one, without the end token that ended them; <pad> is a special token in them."""
    ids = output["token_ids"][: -1 if output["ended"] else None]
    rest = {END: "<eos>", 257: "<pad>", **{258 + i: text for i, text in enumerate(TEXTS)}}
    return b"".join(rest[i].encode() if i in rest else bytes([i]) for i in ids).decode("utf-8", errors="replace")


def test_rewards_files_report_and_server_have_the_text_token_by_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(TEXTS)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "reward.py").write_text(REWARD.format(file=str(tmp_path / "heard.jsonl")))
    function = (
        f"{{weight: 1, _target_: nemo_brain.rewards.function.FunctionReward, function: {tmp_path}/reward.py:heard}}"
    )
    with RewardServer() as server:
        http = f"{{weight: 1, _target_: nemo_brain.rewards.http.HTTPReward, url: '{server.url}'}}"
        train(
            tmp_path / "run",
            f"model.tokenizer={tmp_path / 'tokenizer'}",
            "rollout.max_new_tokens=24",
            "rollout.save=true",
            "data.holdout=8",
            "trainer.val_every_iterations=2",
            "reward.function=null",
            "reward._target_=nemo_brain.rewards.weighted.WeightedReward",
            f"+reward.rewards=[{http}, {function}]",
        )
        served = [item["output"] for request in server.requests for item in request]
    sampled = [
        output
        for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
        for output in json.loads(line)["outputs"]
    ]
    texts = [output["text"] for output in sampled]
    assert texts == [spelled(output) for output in sampled]
    # The draws are such that it matters: spaces would go, special tokens stand inside, an output has ended.
    assert any(tokenizer.clean_up_tokenization(text) != text for text in texts)
    assert any("<pad>" in text for text in texts)

    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert sorted(heard) == sorted(served)
    assert set(texts) <= set(heard)
    samples = read_samples(tmp_path / "run" / "samples.jsonl")
    kept = {sample["kind"]: [output["text"] for output in sample["outputs"]] for sample in samples}
    assert set(kept["train"]) <= set(texts)
    assert set(kept["start"] + kept["final"]) <= set(heard)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in kept["start"] + kept["final"]:
        assert f">{html.escape(text).replace('&#x27;', '&#39;').replace('&quot;', '&#34;')}<" in report
