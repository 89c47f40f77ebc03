"""`torch.compile` of a backbone (`--compile`): the forward passes of training, evaluation and the search, and their
backward passes.

Shapes are static: a batch of another size than the usual ones, such as the last of an epoch, runs uncompiled. The head is
outside, so new classes and new tasks compile nothing. Uncompiled are the passes that the compiler does not serve: those
under the transforms of `torch.func` (tangent space) or twice differentiable attention, and the Fisher pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmerge.errors import first_line
from fastmerge.models.attention import is_differentiable

BACKEND = "inductor"


class Compiled:
    """function(name, images, ...): the one to compile. usual(n): whether n is a usual number of images. say: shows a line."""

    def __init__(self, function: Callable[..., Any], usual: Callable[[int], bool], say: Callable[[str], None]):
        self.function, self.usual, self.say = function, usual, say
        self.compiled: Callable | None = torch.compile(function, backend=BACKEND, dynamic=False)
        self._worked = False

    def __call__(self, name: str, images: Tensor, *more: Any) -> Any:
        """function(name, images, *more), compiled where that is possible. Where the compiler fails at its first use, it says
        so and never compiles."""
        inside = torch._C._functorch.maybe_get_level(images) >= 0 or torch._C._len_torch_function_stack()
        if self.compiled is None or inside or is_differentiable() or not self.usual(len(images)):
            return self.function(name, images, *more)
        if self._worked:
            return self.compiled(name, images, *more)
        try:
            result = self.compiled(name, images, *more)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the errors of dynamo, inductor, Triton and C++ compilers share no base class
            self.compiled = None
            self.say(f"warning: --compile does not work here ({first_line(error)}); the run goes on uncompiled")
            return self.function(name, images, *more)
        self._worked = True
        return result
