"""Train one stage: python train.py task=mrpc stage=1, then python train.py stage=2 ckpt=RUN.

`deebert train` is the same. Only Hydra and the command are imported here, so that --help, typos
and completion answer at once.
"""

import hydra
from omegaconf import DictConfig

from deebert import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the job, and return the score at full depth."""
    return cli.train(cfg)


if __name__ == "__main__":
    cli.share_hydra_store()
    main()
