"""The commands besides `train`: what one can do with finished runs and with checkpoints. One file per command."""

COMMANDS = {  # name -> (function that takes the rest of the command line and returns the exit code, help)
    "evaluate": ("fastmerge.commands.evaluate:main", "accuracy of a saved model on a data set, per task and class"),
    "export": ("fastmerge.commands.export:main", "a saved model as a file of open_clip, timm or transformers"),
    "merge": ("fastmerge.commands.merge:main", "one checkpoint of several: average, TIES, DARE, SLERP, ..."),
    "statistics": (
        "fastmerge.commands.statistics:main",
        "a model's Fisher or input moments, for merge fisher or regmean",
    ),
    "table": ("fastmerge.commands.table:main", "one table of several run folders"),
    "reproduce": ("fastmerge.commands.reproduce:main", "a table or figure of the papers, beside the published numbers"),
    "analyse": (
        "fastmerge.analysis.__main__:main",
        "figures: losses around merges, drift, gradients, curves of runs",
    ),
}
