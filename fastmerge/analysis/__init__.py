"""Looks into what merging does, one file each; every one writes a PNG and a CSV.

    python -m fastmerge.analysis interpolate           # between two tasks' models (CMM, Figures 1, 2, 4)
    python -m fastmerge.analysis embeddings            # features before and after alignment (CMM, Figures 5-7)
    python -m fastmerge.analysis landscape --after 3   # the loss around P&M's merge (P&M, Figure 2); --head linear
    python -m fastmerge.analysis bars runs/a runs/b    # accuracy, forgetting, plasticity of finished runs (P&M, Figure 1)

`bars` reads what runs left. The others train what they need, with all settings of the trainer (data, model, epochs,
--cmm.lam, ...), the first seed and the first tasks.
"""
