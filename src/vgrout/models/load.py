"""A causal language model and its tokenizer from a folder, as the policy needs them."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from vgrout.types import UserError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def model_path(name: str) -> Path:
    """The folder of a model: `micro` is the organism that the package bundles."""
    path = Path(str(files("vgrout") / "data" / "organism")) if name == "micro" else Path(name)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no model: it has no config.json")
    return path


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model in float32 and evaluation mode, and its tokenizer. Raises UserError when the folder is no model."""
    path = model_path(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no model that transformers can load: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} lacks a pad token, an end token or a chat template")
    return model.eval(), tokenizer
