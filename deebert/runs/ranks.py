"""Which process of a run this is, as whoever started it says: Lightning, torchrun or SLURM's srun.

For what happens before there is a Trainer to ask. Imports nothing heavy, as every command loads it.
"""

import os

# On a second machine the first process has LOCAL_RANK=0, too; srun knows its own names only.
NAMES = ("LOCAL_RANK", "RANK", "NODE_RANK", "SLURM_PROCID")


def is_first() -> bool:
    """Is this the only process of a run, or the first of all its processes on all machines?"""
    return all(os.environ.get(name, "0") in ("0", "") for name in NAMES)
