"""P&M: "Train with Perturbation, Infer after Merging" (Tables 2-7, Figures 1-3).

Numbers are means of three runs (section 4.1). LoRA has rank 10 on the key and value projections in the rows of LoRA and of
merging; the other methods train what their papers do. Accuracy is the mean over tasks.
"""

from __future__ import annotations

from functools import partial

from fastmerge.reproduce.small import easy_linear, hard_linear
from fastmerge.reproduce.target import Target, of_paper

column = partial(of_paper, "pam", "strict")
INR = {tasks: column(f"ImageNet-R, {tasks} tasks", "imagenet-r", f"--tasks {tasks}") for tasks in (5, 10, 20)}
INA = column("ImageNet-A, 10 tasks", "imagenet-a", "--tasks 10")
CIFAR = column("CIFAR-100, 10 tasks", "cifar100", "--tasks 10")
CUB = column("CUB-200, 10 tasks", "cub200", "--tasks 10")
DN = column("DomainNet, 5 tasks", "domainnet", "--tasks 5")
DN_200 = column("DomainNet (200 classes), 5 tasks", "domainnet", "--tasks 5 --top-classes 200")
SIX = (INR[10], INR[20], INA, DN_200, CIFAR, CUB)
BOTH = ("final_accuracy_macro", "aaa_macro")
MACRO = BOTH[:1]
LORA = "lora_rank=10"
LEARNERS = {
    "Full Fine-Tuning": "finetune",
    "L2P": "l2p",
    "DualPrompt": "dualprompt",
    "CODA-Prompt": "coda",
    "HiDe-Prompt": "hide",
    "InfLoRA": "inflora",
    "SD-LoRA": "sdlora",
    "LoRA": f"finetune:{LORA}",
    "LoRA-P&M": "pam",
}
WITHOUT_HIDE = {row: method for row, method in LEARNERS.items() if row != "HiDe-Prompt"}
MERGES = {  # Table 3
    "LoRA": f"finetune:{LORA}",
    "w/ Model Averaging": f"average:{LORA}",
    "w/ DARE": f"dare:{LORA}",
    "w/ CoMA": f"coma:{LORA}",
    "w/ CoFIMA": f"cofima:{LORA}",
    "w/ P&M": "pam",
}
PARTS = {  # Table 4
    "LoRA": f"finetune:{LORA}",
    "LoRA-M": "pam:perturb=none",
    "LoRA-M w/ gauss noise": "pam:perturb=gauss",
    "LoRA-P&M": "pam",
}
P0 = {f"p0 = {p:g}": f"pam:p0={p:g}" for p in (0, 0.2, 0.33, 0.5, 0.8)}
EPSILON = {f"epsilon = {e:g}": f"pam:epsilon={e:g}" for e in (0.1, 0.3, 0.5, 0.7, 0.9)}

TARGETS = (
    Target(
        "pam:table2",
        "Class-incremental accuracy on ImageNet-R",
        "4.2",
        tuple(INR.values()),
        (hard_linear("ImageNet-R, 10 tasks"),),
        LEARNERS,
        BOTH,
    ),
    Target(
        "pam:table3",
        "P&M and other merges of LoRA",
        "4.2",
        SIX,
        (hard_linear("ImageNet-R, 10 tasks"), easy_linear("CIFAR-100, 10 tasks")),
        MERGES,
        MACRO,
    ),
    Target(
        "pam:table4",
        "What merging and perturbation add",
        "4.3",
        SIX,
        (hard_linear("ImageNet-R, 10 tasks"), easy_linear("CIFAR-100, 10 tasks")),
        PARTS,
        MACRO,
    ),
    Target(
        "pam:table5",
        "Class-incremental accuracy on ImageNet-A and DomainNet",
        "B",
        (INA, DN),
        (hard_linear("ImageNet-A, 10 tasks"),),
        LEARNERS | {"SD-LoRA-RR": "sdlora:variant=rr", "SD-LoRA-KD": "sdlora:variant=kd"},
        BOTH,
    ),
    Target(
        "pam:table6",
        "Class-incremental accuracy on CIFAR-100 and CUB-200",
        "B",
        (CIFAR, CUB),
        (easy_linear("CIFAR-100, 10 tasks"),),
        WITHOUT_HIDE,
        BOTH,
    ),
    Target(
        "pam:table7",
        "Memory, time and accuracy",
        "B",
        (INR[10], CIFAR),
        (hard_linear("ImageNet-R, 10 tasks"), easy_linear("CIFAR-100, 10 tasks")),
        {"LoRA": f"finetune:{LORA}", "LoRA-P&M": "pam"},
        ("peak_memory_gb", "hours", *MACRO),
    ),
    Target(
        "pam:figure1",
        "Accuracy, forgetting and plasticity of LoRA and P&M",
        "4.3",
        (INR[10], INA, CIFAR, CUB),
        (hard_linear("ImageNet-R, 10 tasks"), easy_linear("CIFAR-100, 10 tasks")),
        {"LoRA": f"finetune:{LORA}", "LoRA-P&M": "pam"},
        ("final_accuracy_macro", "forgetting", "plasticity"),
        draw="bars {results}",
    ),
    Target(
        "pam:figure2",
        "The loss around the merge, with and without perturbation",
        "4.3",
        (INR[10], CUB),
        (hard_linear("ImageNet-R, 10 tasks"),),
        draw="landscape {flags} --after 4 7 --both",
        draw_small="landscape {flags} --after 2 4 --both",
    ),
    Target(
        "pam:figure3",
        "Accuracy against the probability of no perturbation",
        "B",
        (INA,),
        (hard_linear("ImageNet-A, 10 tasks"),),
        P0,
        MACRO,
        draw="sweep {runs} --x pam.p0 --metric final_accuracy_macro --rows {labels}",
    ),
    Target(
        "pam:figure3-epsilon",
        "Accuracy against the size of the perturbation",
        "B",
        (INA,),
        (hard_linear("ImageNet-A, 10 tasks"),),
        EPSILON,
        MACRO,
        draw="sweep {runs} --x pam.epsilon --metric final_accuracy_macro --rows {labels}",
    ),
)
