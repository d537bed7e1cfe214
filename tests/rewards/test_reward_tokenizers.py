"""Reward models and encoders read their tokenizers as policies do."""

import json

import pytest
import torch
from tokenizer_files import CHAT, V5, write
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForSequenceClassification

from nemo_brain.data.tokenizers import load_tokenizer
from nemo_brain.rewards.huggingface import HuggingFaceReward
from nemo_brain.rewards.minilm import MiniLM

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_a_reward_model_with_files_of_transformers_5_scores_its_chat(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(vocab_size=262, num_labels=1, **SMALL)).save_pretrained(tmp_path)
    write(tmp_path, V5 | {"extra_special_tokens": ["<|eot|>"]})
    reward = HuggingFaceReward(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    text = "<|turn|>user: a<|eot|><|turn|>assistant: b !<|eot|>"
    assert reward._row("a", "b !", {})[0] == tokenizer(text).input_ids
    (score,) = reward(["a"], ["b !"], references=[None], metadata=[{}])
    expected = LlamaForSequenceClassification.from_pretrained(tmp_path)(
        torch.tensor([tokenizer(text).input_ids])
    ).logits
    assert score == pytest.approx(expected.item(), abs=1e-6)  # a batch of one, as the reward's

    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path, V5 | {"chat_template": [{"name": "rag", "template": CHAT}]}, template=None)
    with pytest.raises(ValueError, match=r"reward.template=chat: .* has no chat template named default, only rag .set"):
        HuggingFaceReward(str(tmp_path))


def test_an_encoder_reads_files_of_transformers_5_and_wants_a_padding_token(tmp_path):
    BertModel(BertConfig(vocab_size=262, **SMALL)).save_pretrained(tmp_path)
    write(tmp_path, V5 | {"pad_token": "<img>"})
    encoder = MiniLM(tmp_path)
    together = encoder.encode(["a", "a longer text !"])
    # Padded or alone: fp32 sums over 16 values in another order
    torch.testing.assert_close(together[0], encoder.encode(["a"])[0], atol=1e-6, rtol=0)
    write(tmp_path, V5)
    with pytest.raises(ValueError, match=r"reward.model: the tokenizer in .* has no padding token"):
        MiniLM(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": 3}))
    with pytest.raises(ValueError, match=r"reward.model: .* has no tokenizer that can be loaded"):
        MiniLM(tmp_path)
