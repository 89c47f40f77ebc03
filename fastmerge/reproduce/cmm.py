"""CMM: "Toward a Holistic Approach to Continual Model Merging" (Tables 1-4, Figures 1-7).

The rows that the paper marks with Theta(N) keep every task vector: they run under the full protocol (MagMax's, from which the
paper takes their numbers). Accuracy is the mean over tasks (section 5.1). A number is not said to be a mean of several runs.
"""

from __future__ import annotations

from functools import partial

from fastmerge.reproduce.small import domains, easy, hard, hard_domains
from fastmerge.reproduce.target import Target, of_paper

column = partial(of_paper, "cmm", "full")
SETS = {
    "CIFAR-100": ("cifar100", (10, 20, 50)),
    "ImageNet-R": ("imagenet-r", (5, 10, 20)),
    "CUB-200": ("cub200", (5, 10, 20)),
    "Stanford Cars": ("cars", (5, 10, 20)),
}
MACRO = ("final_accuracy_macro",)
MERGES = {"RandMix": "randmix", "MaxAbs": "magmax", "Avg": "average", "TIES": "ties"}
OTHERS = {"LwF": "lwf", "EWC": "ewc", "Ours": "cmm"}
ENDS = {"Zero-shot": "zero-shot", "Joint": "joint"}
PARTS = {  # Table 4: each adds one to the row before
    "zero-shot": "zero-shot",
    "FT": "finetune",
    "FT, merge": "cmm:tangent=false,align_epochs=0",
    "FT, merge, NTK": "cmm:align_epochs=0",
    "FT, merge, NTK, bias": "cmm",
}

TARGETS = (
    Target(
        "cmm:table1",
        "Class-incremental accuracy on CIFAR-100, ImageNet-R, CUB-200 and Stanford Cars",
        "5.2",
        tuple(
            column(f"{name}, {tasks} tasks", dataset, f"--tasks {tasks}")
            for name, (dataset, counts) in SETS.items()
            for tasks in counts
        ),
        (easy("CIFAR-100, 10 tasks", protocol="full"), hard("ImageNet-R, 5 tasks", protocol="full")),
        ENDS | MERGES | OTHERS,
        MACRO,
    ),
    Target(
        "cmm:table2",
        "Fine-tuning strategies on CIFAR-100 and ImageNet-R",
        "5.2",
        (
            column("CIFAR-100, 10 tasks", "cifar100", "--tasks 10"),
            column("ImageNet-R, 10 tasks", "imagenet-r", "--tasks 10"),
        ),
        (easy("CIFAR-100, 10 tasks", protocol="full"),),
        ENDS
        | MERGES
        | {
            "iCaRL": "icarl",
            "L2P": "l2p",
            "DualPrompt": "dualprompt",
            "CODA-P": "coda",
            "PROOF": "proof",
            "Continual-CLIP": "zero-shot",
            "CoOp": "coop",
            "MaPLe": "maple",
            "AttriCLIP": "attriclip",
            "CLIP-Adapter": "clip-adapter",
            "VPT": "vpt",
        }
        | OTHERS,
        MACRO,
        rows_small={"AttriCLIP": "attriclip:bank=5,top=2"},  # ten prompts, three at a time, would take half an hour
        apart={"Continual-CLIP": "--template 'a good photo of a {}.'"},
    ),
    Target(
        "cmm:table3",
        "Domain-incremental accuracy",
        "5.3",
        (
            column("Office-Home", "office-home", "--scenario dil"),
            column("Office-31", "office31", "--scenario dil"),
            column("DomainNet", "domainnet", "--scenario dil"),
            column("ImageNet-R", "imagenet-r", "--scenario dil"),
        ),
        (domains("Office-31", protocol="full"), hard_domains("ImageNet-R", protocol="full")),
        MERGES | OTHERS,
        MACRO,
    ),
    Target(
        "cmm:table4",
        "What each part of CMM adds",
        "6",
        (column("Office-31", "office31", "--scenario dil"),),
        (domains("Office-31", protocol="full"),),
        PARTS,
        MACRO,
    ),
    Target(
        "cmm:figure1",
        "Accuracy and loss between the models of two tasks: averaging and CMM's merge, plain and linear training",
        "5.3; the paper names no data set",
        (column("CIFAR-100, 10 tasks", "cifar100", "--tasks 10"),),
        (easy("CIFAR-100, 10 tasks", protocol="full"),),
        draw="interpolate {flags}",
        also=("cmm:figure2", "cmm:figure4"),
    ),
    Target(
        "cmm:figure5",
        "Features of old classes before and after alignment",
        "6",
        (column("Stanford Cars, 10 tasks", "cars", "--tasks 10"),),
        (easy("Stanford Cars, 10 tasks", protocol="full"),),
        draw="embeddings {flags}",
        also=("cmm:figure3", "cmm:figure6", "cmm:figure7"),
    ),
)
