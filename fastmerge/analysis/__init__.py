"""Looks into what merging does, one file each; every one trains what it needs and writes a PNG and a CSV.

    python -m fastmerge.analysis interpolate --out figures            # between two tasks' models (CMM, Figures 1, 2, 4)
    python -m fastmerge.analysis embeddings --out figures             # features before and after alignment (CMM, Figures 5-7)

All settings of the trainer apply: data, model, epochs, --cmm.lam, ...; the first two tasks and the first seed are used.
"""
