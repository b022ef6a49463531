"""Export a finished run's model in a form for others.

    run --read--> model and data of the run
    "dense"    s_bar = mean routing weights over a calibration split; E_hat at s_bar -> the original architecture
    "folded"   curvature and mask -> the experts; still merged for every input
    either     -> measured on the validation splits beside the run's model -> folder with card

`export.export` does all of it. The run's own trainer measures both models, and the card has the differences.
"""
