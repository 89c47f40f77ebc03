"""TRM: "Trajectory Regularized: Reducing Storage Dependency in Model Merging for Continual Learning" (Tables 1-3,
Figures 2-4, 6, 7), and the sensitivities of its later version (arXiv 2605.08311, Figures 6 and 7).

All methods run under the strict protocol, as the paper's do. Its Table 1 was set with merged cells; the text of it gives
LwF's and EWC's accuracy on Stanford Cars in one line, read here as LwF 65.2, 61.7, 57.5 and EWC 65.8, 61.3, 58.0. The paper
does not say how many runs a number is the mean of.
"""

from __future__ import annotations

from functools import partial

from fastmerge.reproduce.small import domains, easy, hard, hard_domains
from fastmerge.reproduce.target import Target, of_paper

column = partial(of_paper, "trm", "strict")
INR = column("ImageNet-R, 10 tasks", "imagenet-r", "--tasks 10")
TERMS = {  # Table 3: which of L_init, L_rep, L_curv
    "b": "trm:lambda1=0,lambda2=0",
    "c": "trm:lambda0=0,lambda2=0",
    "d": "trm:lambda0=0,lambda1=0",
    "e": "trm:lambda2=0",
    "f": "trm:lambda1=0",
    "g": "trm:lambda0=0",
    "k": "trm",
}
CIL = {"LwF": "lwf", "EWC": "ewc", "Model Stock": "stock", "TIES": "ties", "MagMax": "magmax", "Ours": "trm"}
PROMPTS = {"L2P": "l2p", "DualPrompt": "dualprompt", "CODAPrompt": "coda", "RAPF": "rapf", "CLG-CBM": "clg-cbm"}
RATIOS = {f"{ratio:g}": f"trm:replace_ratio={ratio:g}" for ratio in (0, 0.2, 0.4, 0.6, 0.8, 1)}
WEIGHTS = {
    f"{one:g}, {two:g}": f"trm:lambda1={one:g},lambda2={two:g}" for one in (0.01, 0.1, 1) for two in (0.001, 0.01, 0.1)
}
SEARCHES = {str(epochs): f"trm:merge_epochs={epochs}" for epochs in (1, 3, 5)}

TARGETS = (
    Target(
        "trm:table1",
        "Class-incremental accuracy on CIFAR-100, ImageNet-R and Stanford Cars",
        "Experimental Results",
        tuple(
            column(f"{name}, {tasks} tasks", dataset, f"--tasks {tasks}")
            for name, dataset in (("CIFAR-100", "cifar100"), ("ImageNet-R", "imagenet-r"), ("Stanford Cars", "cars"))
            for tasks in (5, 10, 20)
        ),
        (easy("CIFAR-100, 5 tasks"), hard("ImageNet-R, 5 tasks")),
        {"Zero-shot": "zero-shot", "Joint": "joint"} | PROMPTS | {"PM": "pam"} | CIL,
        needs={"CLG-CBM": "--clg-cbm.concepts"},
    ),
    Target(
        "trm:table2",
        "Class- and domain-incremental accuracy on DomainNet and ImageNet-R",
        "Experimental Results",
        (
            column("DomainNet, class-incremental", "domainnet", "--tasks 6"),
            column("DomainNet, domain-incremental", "domainnet", "--scenario dil"),
            column("ImageNet-R, class-incremental", "imagenet-r", "--tasks 15"),
            column("ImageNet-R, domain-incremental", "imagenet-r", "--scenario dil"),
        ),
        (
            easy("DomainNet, class-incremental"),
            domains("DomainNet, domain-incremental"),
            hard("ImageNet-R, class-incremental"),
            hard_domains("ImageNet-R, domain-incremental"),
        ),
        CIL,
    ),
    Target(
        "trm:table3",
        "Which terms of the search's objective are needed",
        "Ablation Study",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        {"a": "randmix"} | TERMS,
    ),
    Target(
        "trm:figure2",
        "Loss of a task between the models before and after it, and where merges lie",
        "Analysis",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        draw="trajectory {flags}",
    ),
    Target(
        "trm:figure3",
        "How far merging moves the class tokens of every layer",
        "Analysis",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        draw="drift {flags}",
    ),
    Target(
        "trm:figure4",
        "How the gradient of the next task turns along its training",
        "Analysis",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        draw="gradients {flags}",
    ),
    Target(
        "trm:figure6",
        "Accuracy over the 100 tasks of ImageNet-1k",
        "Large Scale Dataset; the paper names no number, and its picture not every method",
        (column("ImageNet-1k, 100 tasks", "imagenet1k", "--tasks 100"),),
        (easy("ImageNet-1k, 100 tasks", tasks=10),),
        {"Model Stock": "stock", "TIES": "ties", "MagMax": "magmax", "Ours": "trm"},
        draw="accuracy {results}",
        seeds=1,
    ),
    Target(
        "trm:figure7",
        "Accuracy against the share of replaced parameters: mean, least, largest of ten runs",
        "The Ration of Replaced Parameters",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        RATIOS,
        draw="sweep {runs} --x trm.replace_ratio --rows {labels}",
        seeds=10,
    ),
    Target(
        "trm:sensitivity",
        "Accuracy against lambda1, a line for each lambda2",
        "Figure 6 of arXiv 2605.08311",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        WEIGHTS,
        draw="sweep {runs} --x trm.lambda1 --lines trm.lambda2 --rows {labels}",
        seeds=1,
    ),
    Target(
        "trm:epochs",
        "Accuracy against the epochs of the search",
        "Figure 7 of arXiv 2605.08311",
        (INR,),
        (easy("ImageNet-R, 10 tasks"),),
        SEARCHES,
        draw="sweep {runs} --x merge_epochs --rows {labels}",
    ),
)
