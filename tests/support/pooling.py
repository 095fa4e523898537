"""Vectors of texts as sentence-transformers makes them, by transformers alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer


def mean_pooled(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Padded, masked mean of the last states, length one: float32 [texts, n]."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    limit = model.config.max_position_embeddings
    batch = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    means = (states * mask).sum(1) / mask.sum(1)
    vectors: np.ndarray[Any, Any] = torch.nn.functional.normalize(means, dim=1).numpy()
    return vectors
