"""The report of a reparametrization: which modules' LoRA trains in the wavelet domain, and what stays plain."""

from __future__ import annotations

from dataclasses import dataclass

from ..messages import first_few


@dataclass(frozen=True)
class ReparametrizedModule:
    """A module whose LoRA is reparametrised.

    Attributes:
        name: the module's name.
        rank: R.
        before, after: numbers of LoRA's parameters and of coefficients.
        lost: ‖ΔW − ΔW'‖ / ‖ΔW‖, where ΔW' is what is kept; 0 unless projected.
    """

    name: str
    rank: int
    before: int
    after: int
    lost: float = 0.0


@dataclass(frozen=True)
class Reparametrization:
    """What `reparametrize_lora` did; printing it shows it.

    Attributes:
        modules: the modules of which the LoRA is reparametrised.
        left: reasons by name of the modules whose LoRA stays plain.
    """

    modules: list[ReparametrizedModule]
    left: dict[str, str]

    @property
    def before(self) -> int:
        """Number of parameters of these modules' LoRA."""
        return sum(module.before for module in self.modules)

    @property
    def after(self) -> int:
        """Number of their coefficients."""
        return sum(module.after for module in self.modules)

    def __str__(self) -> str:
        lines = [
            f"{len(self.modules)} modules train in the wavelet domain: {self.after:,} parameters in place of "
            f"{self.before:,} ({self.after / self.before:.0%})."
        ]
        lost = max(self.modules, key=lambda module: module.lost)
        if lost.lost:
            lines.append(f"Projection lost {lost.lost:.1%} of ΔW at most, in {lost.name!r}.")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(repr(name))
        lines += [f"Left as LoRA: {first_few(names)} ({reason})." for reason, names in reasons.items()]
        return "\n".join(lines)
