"""vGROUT: gradient routing against reward hacking, along a direction from hand-written pairs.

VGROUT_TYPECHECK=1 checks every shape and type of the package at run time; it needs beartype.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is first imported

if os.environ.get("VGROUT_TYPECHECK") == "1":  # before the first import of any other module of the package
    from jaxtyping import install_import_hook

    # The numeric tower of PEP 484: an int is a float where a float is asked for.
    install_import_hook("vgrout", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
