"""A causal language model and its tokenizer from a folder or by name, as the policy needs them."""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from vgrout.faults import OutOfMemory, is_out_of_memory
from vgrout.models.attention import SHARED_HEADS
from vgrout.models.chat import settle
from vgrout.types import UserError

# Settings of models whose logits are not what the head gives, and their values where they are.
PLAIN_HEAD = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = {"sdpa": SHARED_HEADS}  # what transformers calls it, where that is another name
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a model's files, to load it


def model_path(name: str) -> Path:
    """The folder of a model: `micro` is the organism that the package bundles; a folder; or the name of a model on the
    Hugging Face hub that `vgrout model download` has fetched. Nothing is fetched here. Raises UserError."""
    if name == "micro":
        return Path(str(files("vgrout") / "data" / "organism"))
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise UserError(f"{path} is no model: it has no config.json")
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=NEEDED))
    except HFValidationError:  # no name that the hub could have
        raise UserError(f"{path} is no model: it has no config.json") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is no folder and no model that was downloaded: `vgrout model download {name}` fetches one"
        ) from None


def check_device(device: str) -> None:
    """Raises UserError for a device that this machine does not have."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UserError(f"device = {device}: give cpu, cuda, or cuda:N") from None
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (kind.index or 0):
            raise UserError(f"device = {device}: torch finds {count} GPUs on this machine")
    elif kind.type != "cpu":
        raise UserError(f"device = {device}: give cpu, cuda, or cuda:N")


def load_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", attn: str = "sdpa", template: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model in evaluation mode, and its tokenizer. `template`: a file with a chat template instead of its own.

    Raises UserError where there is no such model, device or attention, where the folder is damaged, and for a model
    whose logits are not what its head gives.
    """
    path = model_path(name)
    check_device(device)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION.get(attn, attn),
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
    if model.get_output_embeddings() is None:
        raise UserError(f"{path}: {type(model).__name__} has no head that gives logits")
    for what, plain in PLAIN_HEAD.items():
        if (value := getattr(model.config.get_text_config(), what, plain)) not in (plain, None):
            raise UserError(f"{path} changes its logits ({what} = {value}), which vgrout does not support")
    try:
        settle(tokenizer, model, template)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        return model.eval().to(device), tokenizer
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{path} does not fit on {device}: try --dtype bfloat16, or docs/gpu.md") from error


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights: name, shape and float32 bytes of each, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def recomputing(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that can run again in the backward pass instead of keeping what it needs. They do where `training` is
    set on them, which leaves the modules in them in evaluation mode. Raises UserError where there is none, and where a
    layer would take `training` for more than that (dropout of its own)."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no gradient checkpointing: drop --gradient-checkpointing")
    for layer in layers:
        drops = [name for name, p in vars(layer).items() if "drop" in name and isinstance(p, float) and p > 0]
        if drops:
            raise UserError(f"{type(layer).__name__} has a {drops[0]} of its own: drop --gradient-checkpointing")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return layers
