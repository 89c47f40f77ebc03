"""How a setting is declared: its default, the default for the tiny model, bounds, unit and source. Help and checks follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastmerge.errors import UserError

FP32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # the smallest normal and the largest number of fp32


@dataclass(frozen=True)
class Declaration:
    """What `setting` says besides the default.

    tiny: the default with the tiny model. derived: in words, how a default that depends on other settings is chosen.
    source: where the default comes from. unit: of a number. largest: the largest magnitude of a whole number.
    """

    help: str
    unit: str | None = None
    largest: int = 2**31 - 1
    tiny: Any = None
    derived: str | None = None
    source: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def late(self) -> bool:
        """Whether the default depends on other settings."""
        return self.tiny is not None or self.derived is not None

    def expected(self) -> str:
        """The bounds in words; empty if there are none."""
        if (self.at_least, self.at_most) == (0, 1):
            return "between 0 and 1"
        low = "" if self.at_least is None else "0 or more" if self.at_least == 0 else f"at least {self.at_least}"
        low = low if self.above is None else f"above {self.above}"
        high = "" if self.at_most is None else f"at most {self.at_most}"
        high = high if self.below is None else f"below {self.below}"
        return ", ".join(
            filter(None, (f"at least {self.at_least}" if high and self.at_least is not None else low, high))
        )

    def help_text(self) -> str:
        """What the setting does, then its unit and bounds in brackets."""
        about = ", ".join(filter(None, (self.unit, self.expected())))
        return f"{self.help} [{about}]" if about else self.help

    def default_text(self, default: Any) -> str:
        """The default in words, for the help."""
        source = f" ({self.source})" if self.source else ""
        if self.derived is not None:
            return self.derived + source
        return f"{default}{source}" + (f"; {self.tiny} with the tiny model" if self.tiny is not None else "")

    def check(self, flag: str, value: Any) -> None:
        """Raise UserError unless every number in `value` is finite and within the bounds. Skips what is not a number."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise UserError(f"{flag} {number}: expected a finite number")
            if isinstance(number, float) and number and not FP32[0] <= abs(number) <= FP32[1]:
                raise UserError(f"{flag} {number}: fp32 holds 0 and sizes from {FP32[0]:.1e} to {FP32[1]:.1e}")
            if isinstance(number, int) and abs(number) > self.largest:
                raise UserError(f"{flag} {number}: expected at most {self.largest}")
            good = (
                (self.at_least is None or number >= self.at_least)
                and (self.above is None or number > self.above)
                and (self.at_most is None or number <= self.at_most)
                and (self.below is None or number < self.below)
            )
            if not good:
                raise UserError(f"{flag} {number}: expected {self.expected()}")


def setting(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with its `Declaration`."""
    return field(default=default, metadata={"declaration": Declaration(help, **about)})
