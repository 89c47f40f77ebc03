"""Analyses of what merging does, one file each. Each analysis writes a CSV, a PNG and a PDF.

    python -m fastmerge analyse interpolate           # models between those of two tasks (CMM, Figures 1, 2, 4)
    python -m fastmerge analyse embeddings            # features before and after alignment (CMM, Figures 5-7)
    python -m fastmerge analyse landscape --tasks 10 --after 4 7 --both --head linear   # around P&M's merges (P&M, Figure 2)
    python -m fastmerge analyse trajectory            # the loss at every merge of two models (TRM, Figure 2)
    python -m fastmerge analyse drift                 # the class token of every layer at every merge (TRM, Figure 3)
    python -m fastmerge analyse gradients             # how the next task's gradient turns (TRM, Figure 4)
    python -m fastmerge analyse bars runs/a runs/b    # accuracy, forgetting, plasticity of runs (P&M, Figure 1)
    python -m fastmerge analyse accuracy runs/a       # accuracy over the tasks (TRM, Figure 6)
    python -m fastmerge analyse sweep runs/a --x trm.replace_ratio   # a setting against a metric (TRM, Figure 7)

`bars`, `accuracy` and `sweep` read finished runs. The others train the models they need; they accept all settings of the
trainer (data, model, epochs, --cmm.lam, ...), and use the first seed and the first tasks.
"""
