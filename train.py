"""Train one stage: python train.py task=mrpc stage=1, then python train.py stage=2 ckpt=RUN.

Only Hydra is imported here, so that --help, typos and completion answer at once.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    from deebert.runs import signals

    with signals.in_one_line(cfg):
        from deebert.runs import train

        return train.train(cfg)


if __name__ == "__main__":
    main()
