"""Name the ramps that are no better than a constant answer, and say what to do about them.

The module reads results alone. It does not know models or data.
"""

from deebert.models.trained_ramps import trains_ramps
from deebert.reporting.results import Results


def useless_ramps(results: Results) -> list[int]:
    """Return the layers of the ramps that score no better than the best constant answer.

    In a run that trains the final classifier alone, only that one counts.
    """
    part = results.headline
    if part.constant_score is None:
        return []
    ramps = part.exits if trains_ramps(results.objective) else part.exits[-1:]
    return [
        ramp.layer for ramp in ramps if ramp.score is not None and ramp.score <= part.constant_score
    ]


def warning(results: Results) -> str | None:
    """Return one line that names the useless ramps, or None if there are none."""
    layers, part = useless_ramps(results), results.headline
    if not layers:
        return None
    constant = f"no better than a constant answer ({results.metric} {part.constant_score:.4f})"
    if part.num_layers in layers:
        return (
            f"Warning: full depth is {constant}: train stage 1 for longer or at another rate "
            "(stages.1.epochs=, stages.1.lr=), and look at the labels."
        )
    listed = ", ".join(map(str, layers))
    who = f"ramp {listed} is" if len(layers) == 1 else f"ramps {listed} are"
    ways = f"train for longer or at a higher rate (stages.{results.stage}.epochs=, "
    ways += f"stages.{results.stage}.lr=)"
    if results.stage == 2:
        ways += ", with stages.2.standardize=true, or on other states (ramp=pair)"
    return f"Warning: {who} {constant}, so nothing should leave there: {ways}."
