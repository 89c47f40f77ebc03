"""Settings of the methods that merge, of their rules, and of the first baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmerge.declaration import setting


@dataclass
class TRMSettings:
    replace: Literal["anchored", "literal", "none"] = setting(
        "anchored",
        "Reading of the random replacement. `literal` (the paper's words) diverges over tasks: see methods/trm.py.",
    )
    replace_ratio: float = setting(
        0.6,
        "Share of replaced entries (paper, Fig. 7).",
        unit="fraction",
        at_least=0,
        at_most=1,
    )
    lambda0: float = setting(
        1.0,
        "Weight of the task loss (1 in eq. 14; 0 gives rows c, d and g of the paper's Table 3).",
        at_least=0,
    )
    lambda1: float = setting(
        0.1,
        "Weight of prediction consistency (eq. 14).",
    )
    lambda2: float = setting(
        0.01,
        "Weight of the gradient energy (eq. 14).",
    )
    teacher: Literal["mean", "current", "previous"] = setting(
        "mean",
        "Whose class tokens prediction consistency asks for: the mean of both models' (eq. 7), those of the model trained on "
        "this task, or those of the merged model before it.",
    )
    scale: Literal["absolute", "relative"] = setting(
        "absolute",
        "The terms of eq. 14 as they are, or each divided by its size on the first batch of the search, so that the lambdas "
        "mean the same for every model and task.",
    )
    energy: Literal["square", "bounded"] = setting(
        "square",
        "The gradient energy E as it is (eq. 13), which has no lower bound, or E / (E + E at the start of the search).",
    )
    space: Literal["line", "span"] = setting(
        "line",
        "Search along the new task vector (eq. 4), or in the span of the new and the merged task vector, the plane that the "
        "paper speaks of: gamma moves the model towards or away from the starting weights, which are then kept.",
    )
    per: Literal["model", "block"] = setting(
        "model",
        "One pair of coefficients (alpha, beta) for the model (eq. 4), or one for every transformer block and one for the "
        "other weights. The last step of a search logs them.",
    )
    layer_b: int | None = setting(
        None,
        "b of eq. 7, counted from 1. The paper leaves it open.",
        unit="layer",
        at_least=1,
        derived="half the layers",
    )
    alpha: float = setting(
        0.5,
        "Start of the search; 0 is the previous model, 1 the new one. The paper leaves it open.",
    )
    beta: float = setting(
        0.0,
        "Start of the orthogonal coefficient. The paper leaves it open.",
        unit="units of theta",
    )
    lr: float = setting(
        0.01,
        "Adam step of alpha and beta (constant). The paper leaves it open.",
        at_least=0,
    )
    direction: Literal["task", "epoch"] = setting(
        "task",
        "One random direction P per task, or a new one per search epoch (beta then restarts). The paper "
        "leaves it open.",
    )
    curvature: Literal["exact", "difference"] = setting(
        "exact",
        "Gradient of eq. 13 by the exact Hessian-vector product, or by a difference of gradients: half the memory, in "
        "full fp32. Its step is checked against the exact product at the start of every search; where none is right to 5 %, "
        "that search is exact (curvature_step 0 in metrics.jsonl).",
    )
    merge_first: bool = setting(
        False,
        "Also merge after the first task (the paper's two phases are for tasks t > 0).",
    )


@dataclass
class TaskArithmeticSettings:
    scale: float = setting(
        0.4,
        "Factor of the summed task vectors (Ilharco et al., without validation).",
        above=0,
    )


@dataclass
class TiesSettings:
    density: float = setting(
        0.2,
        "Share of the entries that trimming keeps (paper).",
        unit="fraction",
        above=0,
        at_most=1,
    )
    scope: Literal["global", "tensor"] = setting(
        "global",
        "Trim over the whole vector (paper, released code) or each tensor separately (mergekit, peft).",
    )
    keep: Literal["exactly", "at least"] = setting(
        "exactly",
        "Of the entries at the threshold keep as many as the density asks for, or all (released code).",
    )
    zero: Literal["majority", "positive", "negative"] = setting(
        "majority",
        "The sign where the mass is exactly zero: the majority's (released code) or positive (mergekit, peft).",
    )
    merge: Literal["mean", "sum"] = setting(
        "mean",
        "Of the values of the elected sign take the mean (paper), or the sum (dis-sum of the released code, mergekit's "
        "normalize: false).",
    )
    scale: float = setting(
        1.0,
        "Factor of the merged task vector; 1 without validation (paper), 0.55 in MagMax's code.",
        above=0,
    )


@dataclass
class DareSettings:
    p: float = setting(
        0.1,
        "Probability of dropping an entry (released code).",
        at_least=0,
        below=1,
    )
    scale: float = setting(
        1.0,
        "Factor of the averaged task vectors (released code). dare-ties does not use it.",
        above=0,
    )


@dataclass
class DellaSettings:
    p: float = setting(
        0.2,
        "Mean probability of dropping an entry, chosen on held-out images of the default run (docs/LOG.md); mergekit drops "
        "nothing by default, the paper searches it.",
        at_least=0,
        below=1,
    )
    epsilon: float = setting(
        0.15,
        "How far above and below p the probabilities of a row go (mergekit); half the epsilon of the paper.",
        at_least=0,
        below=1,
    )
    scope: Literal["row", "tensor", "global"] = setting(
        "row",
        "Where an entry is ranked: in the weights of one output (paper), in its tensor, or in the whole vector.",
    )
    rescale: Literal["probability", "norm"] = setting(
        "probability",
        "Divide what stays by the probability of staying (paper), or keep the L1 norm of every tensor (mergekit).",
    )
    scale: float = setting(
        1.0,
        "Factor of the merged task vector (mergekit; the paper searches it).",
        above=0,
    )


@dataclass
class MagMaxSettings:
    scale: float = setting(
        0.5,
        "Factor of the merged task vector (released code).",
        above=0,
    )
    ties: Literal["later", "earlier"] = setting(
        "later",
        "Which task wins where two entries have the same magnitude; later in the released code.",
    )


@dataclass
class FisherSettings:
    accumulate: Literal["sum", "ema", "last"] = setting(
        "sum",
        "What --method fisher keeps of past Fishers: their sum (Matena & Raffel), their moving average, or the "
        "last one.",
    )
    lam: float = setting(
        0.5,
        "Weight of the new model under --fisher.accumulate ema and last.",
        at_least=0,
        at_most=1,
    )
    labels: Literal["model", "data"] = setting(
        "model",
        "For fisher, cofima, ewc and became (P&M has --pam.labels): labels drawn from the model's prediction, which gives "
        "the Fisher information, or the labels of the data, which give the empirical Fisher (CoFiMA).",
    )
    per: Literal["sample", "batch"] = setting(
        "sample",
        "For fisher, cofima, ewc, pam and became: mean of the squared gradients of single images, or squared mean gradients "
        "of batches (released CoFiMA).",
    )
    images: int | None = setting(
        None,
        "For fisher, cofima, ewc, pam and became: use this many images of a task, drawn at random.",
        unit="images",
        at_least=1,
        derived="all",
    )
    floor: float = setting(
        0.0,
        "For fisher, cofima, ewc, pam and became: a constant added to every entry (1e-6 in MergeLM). With 0, models are "
        "averaged where all Fishers are 0.",
        at_least=0,
    )


@dataclass
class CofimaSettings:
    accumulate: Literal["last", "ema", "sum"] = setting(
        "last",
        "The last two Fishers (released code), or the accumulated Fisher (the paper's equation).",
    )
    lam: float = setting(
        0.5,
        "Weight of the new model (released code's effective value).",
        at_least=0,
        at_most=1,
    )


@dataclass
class ComaSettings:
    lam: float = setting(
        0.5,
        "Weight of the new model.",
        at_least=0,
        at_most=1,
    )


@dataclass
class EMASettings:
    weight: float = setting(
        0.5,
        "Weight of the new model.",
        at_least=0,
        at_most=1,
    )


@dataclass
class WiseFTSettings:
    alpha: float = setting(
        0.5,
        "Weight of the fine-tuned model (paper's recommendation without validation).",
        at_least=0,
        at_most=1,
    )


@dataclass
class CMMSettings:
    lam: float = setting(
        0.4,
        "Weight of the new model (released default; the paper sweeps 0.3 to 0.6).",
        at_least=0,
        at_most=1,
    )
    tangent: bool = setting(
        True,
        'Train in the tangent space of the starting weights ("NTK" in Table 4).',
    )
    merge: Literal["fisher", "average", "none"] = setting(
        "fisher",
        "Weight by AdamW's second moments (eq. 4), interpolate with equal weights in all entries, or do not merge.",
    )
    fisher: Literal["adam", "adam-raw"] = setting(
        "adam",
        "The second moment with bias correction, or without (released code).",
    )
    align_epochs: int = setting(
        1,
        'Epochs of representation alignment ("Bias" in Table 4); 1 in the released code, 0 switches it off.',
        at_least=0,
    )
    align_lr: float = setting(
        1e-7,
        "AdamW step of the last projection.",
        tiny=1e-4,
        at_least=0,
        source="released script",
    )
    align_loss: Literal["l1", "l2"] = setting(
        "l2",
        "Mean absolute or mean squared difference of the features (l2 in the released script).",
    )
    inference: Literal["linearised", "plain"] = setting(
        "linearised",
        "Evaluate f_lin (released code) or f at the merged weights. The table also shows the other one.",
    )


@dataclass
class PAMSettings:
    rank: int = setting(
        10,
        "Rank of LoRA on the key and value projections (paper); 0 trains and merges all weights.",
        at_least=0,
    )
    lr: float = setting(
        1e-3,
        "Peak learning rate of LoRA (paper).",
        at_least=0,
    )
    epsilon: float = setting(
        0.5,
        "Size of the perturbation (paper).",
        unit="task vectors",
        at_least=0,
        at_most=1,
    )
    p0: float = setting(
        1 / 3,
        "Probability of no perturbation; the rest is split evenly between the two signs (paper).",
        at_least=0,
        at_most=1,
    )
    perturb: Literal["task", "gauss", "none"] = setting(
        "task",
        "Perturb along the task vector, by Gaussian noise of the same norm (Table 4), or not at all (LoRA-M).",
    )
    merge: bool = setting(
        True,
        "Merge by the closed form; without it alpha is 1 (LoRA).",
    )
    labels: Literal["data", "model"] = setting(
        "data",
        "Labels of the Fisher: those of the data (eq. 9), or drawn from the model's prediction. P&M also reads "
        "the fisher group's images, per and floor.",
    )


@dataclass
class BecameSettings:
    project: bool = setting(
        True,
        "Train in two stages, the first in the input space that old tasks leave free, and merge these two models; without "
        "it one stage, and the merge is with the model before the task.",
    )
    threshold: float = setting(
        0.99,
        "Share of the inputs of a layer that the memory must cover, of fourth powers: see methods/dual_gpm.py.",
        unit="fraction",
        above=0,
        at_most=1,
    )


@dataclass
class CLIPAdapterSettings:
    ratio: float = setting(
        0.2,
        "Share of the adapter's output in the features; the rest is the frozen feature (paper).",
        at_least=0,
        at_most=1,
    )
    reduction: int = setting(
        4,
        "The bottleneck is this many times narrower than the features (released code).",
        at_least=1,
    )
    lr: float = setting(
        1e-5,
        "Peak learning rate of Adam.",
        tiny=1e-2,
        at_least=0,
        source="paper",
    )


@dataclass
class EWCSettings:
    lam: float = setting(
        1000.0,
        "Weight of the penalty lam/2 sum F (theta - theta_{t-1})^2. F is a mean over images, so 1 gives the "
        "Laplace approximation for tasks of equal size. The default was chosen on held-out images of the "
        "default run (docs/LOG.md).",
        at_least=0,
    )
    decay: float = setting(
        1.0,
        "Factor of the older tasks' Fisher at every task (gamma of online EWC); 1 keeps their sum.",
        at_least=0,
        at_most=1,
    )


@dataclass
class LwFSettings:
    lam: float = setting(
        1.0,
        "Weight of the distillation loss (paper); 0.3 in MagMax's code.",
        at_least=0,
    )
    temperature: float = setting(
        2.0,
        "Temperature of both predictions (paper).",
        above=0,
    )


@dataclass
class RegMeanSettings:
    alpha: float = setting(
        0.9,
        "Factor of the off-diagonal entries of X^T X (paper; 1 leaves them, 0 averages with weights per input).",
        at_least=0,
        at_most=1,
    )


@dataclass
class IsoCSettings:
    scale: float = setting(
        1.0,
        "Factor of the merged task vector; the paper chooses it on validation data.",
        above=0,
    )


@dataclass
class TSVSettings:
    scale: float = setting(
        1.0,
        "Factor of the merged task vector (paper).",
        above=0,
    )


@dataclass
class OPCMSettings:
    alpha: float = setting(
        0.5,
        "The leading directions of the merged task vector that new ones must avoid: with this share of the sum of its "
        "singular values (paper).",
        at_least=0,
        at_most=1,
    )


@dataclass
class BreadcrumbsSettings:
    density: float = setting(
        0.14,
        "Share of a tensor's entries that is kept.",
        unit="fraction",
        above=0,
        at_most=1,
    )
    gamma: float = setting(
        0.01,
        "Share of a tensor's largest entries that is dropped (mergekit).",
        unit="fraction",
        at_least=0,
        below=1,
    )
    scale: float = setting(
        0.3,
        "Factor of the summed task vectors. It does not shrink with the number of tasks: choose it on held-out images.",
        above=0,
    )


@dataclass
class SCESettings:
    density: float = setting(
        0.1,
        "Share of a tensor's entries that is selected, those with the largest variance over the models (paper).",
        unit="fraction",
        above=0,
        at_most=1,
    )
