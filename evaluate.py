"""Score a checkpoint: python evaluate.py ckpt=RUN prints score and saving for each threshold.

Only Hydra is imported here, so that --help, typos and completion answer at once.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    from deebert.runs import signals

    with signals.in_one_line(cfg):
        from deebert.runs import evaluate

        return evaluate.evaluate(cfg)


if __name__ == "__main__":
    main()
