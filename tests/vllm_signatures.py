"""Names, parameters and defaults of the part of vLLM that vgrout uses, read from source without importing it.

`python tests/vllm_signatures.py FOLDER > tests/fake_vllm/signatures.json` records those of the package in FOLDER, which
is the `vllm` of an installation or of an unpacked wheel.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

REQUIRED = "required"
FIELDS = {  # classes whose fields are their parameters
    "SamplingParams": "sampling_params.py",
    "Logprob": "logprobs.py",
    "LoRARequest": "lora/request.py",
    "CompletionOutput": "outputs.py",
    "EngineArgs": "engine/arg_utils.py",
}
CALLS = {
    "LLM.__init__": "entrypoints/llm.py",
    "LLM.generate": "entrypoints/llm.py",
    "LLM.sleep": "entrypoints/llm.py",
    "LLM.wake_up": "entrypoints/llm.py",
    "LLMEngine.add_lora": "v1/engine/llm_engine.py",
    "LLMEngine.remove_lora": "v1/engine/llm_engine.py",
    "RequestOutput.__init__": "outputs.py",
}
CHOICES = {"MaxLoRARanks": "config/lora.py", "LogprobsMode": "config/model.py", "ModelDType": "config/model.py"}
DEFAULTS = {"ModelConfig": "config/model.py", "LoRAConfig": "config/lora.py", "CacheConfig": "config/cache.py"}
Signature = dict[str, str]  # parameter -> "kind default"


def read(package: Path) -> dict[str, object]:
    """{"version", "fields", "calls", "choices"} of a package."""

    def tree(file: str) -> ast.Module:
        return ast.parse((package / file).read_text(encoding="utf-8"))

    def body(file: str, name: str) -> list[ast.stmt]:
        (found,) = (node for node in tree(file).body if isinstance(node, ast.ClassDef) and node.name == name)
        return found.body

    def default(value: ast.expr | None) -> str:
        """The default's source; that of another class's field is looked up, and of field(default=...) taken."""
        if value is None:
            return REQUIRED
        if isinstance(value, ast.Call):
            inside = [word.value for word in value.keywords if word.arg in ("default", "default_factory")]
            return default(inside[0]) if inside else ast.unparse(value)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id in DEFAULTS:
            return fields(DEFAULTS[value.value.id], value.value.id)[value.attr]
        return ast.unparse(value)

    def fields(file: str, name: str) -> Signature:
        lines = (node for node in body(file, name) if isinstance(node, ast.AnnAssign))
        return {line.target.id: default(line.value) for line in lines}

    def call(file: str, name: str) -> Signature:
        owner, method = name.split(".")
        (found,) = (n for n in body(file, owner) if isinstance(n, ast.FunctionDef) and n.name == method)
        a = found.args
        values = [None] * (len(a.args) - len(a.defaults)) + a.defaults
        out = {arg.arg: f"positional {default(v)}" for arg, v in zip(a.args, values, strict=True)}
        return out | {arg.arg: f"keyword {default(v)}" for arg, v in zip(a.kwonlyargs, a.kw_defaults, strict=True)}

    def choices(file: str, name: str) -> list:
        for node in tree(file).body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
                return sorted(ast.literal_eval(node.value.slice), key=str)
        raise LookupError(name)

    version = [n for n in tree("_version.py").body if isinstance(n, ast.Assign) and "__version__" in ast.unparse(n)]
    return {
        "version": ast.literal_eval([n for n in version if isinstance(n.value, ast.Constant)][-1].value),
        "fields": {name: fields(file, name) for name, file in FIELDS.items()},
        "calls": {name: call(file, name) for name, file in CALLS.items()},
        "choices": {name: choices(file, name) for name, file in CHOICES.items()},
    }


def strays(mine: dict, theirs: dict) -> list[str]:
    """Where `mine`, a part of an interface, is not a part of `theirs`: a parameter, order, default or choice differs,
    or one is missing that must be given."""
    out = []
    for kind in ("fields", "calls"):
        for name, own in mine[kind].items():
            real = theirs[kind][name]
            out += [f"{name}({key} = {value}): {real.get(key)}" for key, value in own.items() if real.get(key) != value]
            needed = [key for key, value in real.items() if value.endswith(REQUIRED)]
            out += [f"{name} lacks {key}" for key in needed if key not in own]
            given = [key for key in own if key in needed]
            out += [f"{name}: {given} in another order"] if given != [key for key in needed if key in own] else []
    for name, own in mine["choices"].items():
        out += [f"{name}: {own}"] if own != theirs["choices"][name] else []
    return out


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1])), indent=1))
