"""The scalars of one Adam step, computed in doubles and handed on as fp32, as torch's single-tensor
path does."""

import struct
from dataclasses import dataclass


def to_fp32(value: float) -> float:
    """The double that equals ``value`` rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


@dataclass(frozen=True, kw_only=True)
class AdamCoefficients:
    """Every field is exactly representable in fp32. Same names as in the formula of
    docs/optimizer.md."""

    grad_scale: float
    lerp_weight: float
    beta2: float
    one_minus_beta2: float
    bias_correction2_sqrt: float
    eps: float
    neg_step_size: float


def adam_coefficients(*, lr: float, beta1: float, beta2: float, eps: float, step: int,
                      grad_scale: float = 1.0) -> AdamCoefficients:
    """Coefficients of step ``step`` (the first is 1). Raises ValueError for values no Adam step can
    have."""
    check_hyperparameters(lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step)
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    return AdamCoefficients(
        grad_scale=to_fp32(grad_scale),
        lerp_weight=to_fp32(1 - beta1),
        beta2=to_fp32(beta2),
        one_minus_beta2=to_fp32(1 - beta2),
        bias_correction2_sqrt=to_fp32(bias_correction2**0.5),
        eps=to_fp32(eps),
        neg_step_size=to_fp32(-(lr / bias_correction1)),
    )


def decay_factor(lr: float, weight_decay: float) -> float:
    """What decoupled decay multiplies a parameter by; 1 where there is none, which changes no
    bit."""
    return to_fp32(1 - lr * weight_decay)


def check_hyperparameters(*, lr: float, beta1: float, beta2: float, eps: float, step: int) -> None:
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step counts from 1 (given: {step!r})")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must be in [0, 1) (given: {beta!r})")
    for name, value in (("lr", lr), ("eps", eps)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative (given: {value!r})")


def check_ranges(ranges: list[tuple[int, float]], n: int) -> None:
    """Ranges are (end element, weight decay), ends increasing, the last one ``n``."""
    previous = 0
    for end, decay in ranges:
        if end < previous:
            raise ValueError(f"range ends must not decrease (given: {end} after {previous})")
        if not 0.0 <= decay < float("inf"):
            raise ValueError(f"a weight decay must be finite and not negative (given: {decay!r})")
        previous = end
    if not ranges or previous != n:
        raise ValueError(f"the ranges must cover all {n} elements (the last one ends at {previous})")
