"""A causal language model and its tokenizer from a folder, as the policy needs them."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from vgrout.models.attention import SHARED_HEADS
from vgrout.types import UserError

# Settings of models whose logits are not what the head gives, and their values where they are.
PLAIN_HEAD = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}


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
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=SHARED_HEADS,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged folder raises whatever its reader raises
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no model that transformers can load: {type(error).__name__}: {said}") from error
    for what in ("missing", "mismatched"):
        if keys := sorted(map(str, info[f"{what}_keys"])):
            raise UserError(f"{path} is no whole model: {len(keys)} {what} weights, the first is {keys[0]}")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} lacks a pad token, an end token or a chat template")
    for what, plain in PLAIN_HEAD.items():
        if (value := getattr(model.config.get_text_config(), what, plain)) not in (plain, None):
            raise UserError(f"{path} changes its logits ({what} = {value}), which vgrout does not support")
    return model.eval(), tokenizer


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights: name, shape and float32 bytes of each, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().contiguous().numpy().data)
    return digest.hexdigest()
