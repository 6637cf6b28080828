"""The learning rate schedule."""


def poly_lr(lr: float, t: int, T: int, min_lr: float = 1e-4, power: float = 0.9) -> float:
    """Polynomial decay from ``lr`` in iteration t = 0 to ``min_lr`` in the last, t = T - 1.

    As mmengine's PolyLR, which divides by T - 1. The paper's schedule ends at 0.

    >>> [round(poly_lr(0.01, t, T=40_000), 5) for t in (0, 20_000, 39_999)]
    [0.01, 0.00541, 0.0001]
    """
    return (lr - min_lr) * (1 - t / max(T - 1, 1)) ** power + min_lr
