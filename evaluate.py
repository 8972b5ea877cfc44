"""Score a checkpoint: python evaluate.py ckpt=RUN prints score and saving for each threshold.

`deebert evaluate` is the same. Only Hydra and the command are imported here, so that --help, typos
and completion answer at once.
"""

import sys

import hydra
from omegaconf import DictConfig

from deebert import cli, options


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Run the job, and return its score."""
    return cli.evaluate(cfg)


if __name__ == "__main__":
    options.refuse_moved(sys.argv[1:])
    cli.share_hydra_store()
    main()
