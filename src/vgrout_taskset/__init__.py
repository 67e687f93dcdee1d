"""What verifiers imports for the id `vgrout-taskset`: it takes top-level packages only."""

from vgrout.integrations.verifiers_taskset import *  # noqa: F403
from vgrout.integrations.verifiers_taskset import __all__  # noqa: F401
