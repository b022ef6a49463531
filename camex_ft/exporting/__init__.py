"""Export: a finished run's model in a form that others can use.

    run --read--> merged model, data
    "dense"    s_bar = mean routing weights over a calibration split; E_hat at s_bar -> the original architecture
    "folded"   curvature and mask -> the experts; still merged for every input
    either     -> measured on the validation splits beside the merged model -> folder, card

`export.export` is all of it. Both are measured by the run's own trainer, and what was lost is written on the card.
"""
