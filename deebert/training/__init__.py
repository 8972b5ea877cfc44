"""Training of the backbone and the ramps, in two stages (paper, section 3.2).

`objectives` has one class per objective, `losses` their formulas, `module` the LightningModule,
`feature_cache` the frozen states of stage 2, `callbacks` the evaluation in each validation,
`checkpoint_io` the safe reading of files, `loggers` those of Lightning that never end a run,
`progress` the bar and the line of each epoch.
This package does not know the command line, calibration, or how inference skips layers.
"""
