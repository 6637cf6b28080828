"""BatchNorm over the images of all processes, on any backend.

A device holds one or two 512x1024 crops, too few for BatchNorm's statistics. Synchronized BatchNorm computes them over
all processes, so R processes with batch size b are equivalent to one process with batch size R * b.
torch.nn.SyncBatchNorm has CUDA kernels only; this version uses ordinary operations and all_reduce.

With x^ = (x - mu) / sqrt(s^2 + eps):

    forward     y  = gamma x^ + beta
    backward    dx = gamma / sqrt(s^2 + eps) * (dy - sum(dy) / n - x^ sum(dy x^) / n)

mu, s^2 and both sums of the backward pass are over all processes: one all_reduce each way. The gradients of gamma and
beta stay local, as those of every parameter: DDP averages them. Each pass over x is one of PyTorch's BatchNorm kernels,
which are several times faster than elementwise operations.

Notation: B batch, C channels, H W size, R processes; per channel n values over all processes, mean mu, variance s^2.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        """x (B, C, H, W) -> y like x, and over all processes: mean (C,), biased variance (C,), n."""
        C = x.shape[1]
        if x.is_cpu:
            _, local_mean, local_inv_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            local_var = local_inv_std**-2 - eps
        else:  # where the third output may be something else
            local_var, local_mean = torch.var_mean(x.to(weight.dtype), dim=(0, 2, 3), correction=0)
        # each process fills its own row and leaves the others 0, so that the sum over processes holds every row
        rows = local_mean.new_zeros(dist.get_world_size(), 2 * C + 1)
        rows[dist.get_rank()] = torch.cat([local_mean, local_var, local_mean.new_tensor([x.numel() // C])])
        dist.all_reduce(rows)
        means, variances, counts = rows.split([C, C, 1], dim=1)  # (R, C), (R, C), (R, 1)
        n = counts.sum()
        mean = (counts * means).sum(0) / n
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / n  # within and between processes
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, n)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, n

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, weight, mean, var, n = ctx.saved_tensors
        # with mean and variance as constants: dx = gamma / sqrt(s^2 + eps) * dy, sum(dy x^), sum(dy)
        dx, dy_x_hat, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([sum_dy, dy_x_hat])
        dist.all_reduce(sums)
        # the other two terms are -(a x^ + b), a batch norm of x with other gamma and beta
        b, a = sums / n * weight * (var + ctx.eps).rsqrt()
        return dx - F.batch_norm(x, mean, var, a, b, eps=ctx.eps), dy_x_hat, sum_dy, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are over all processes. Its state_dict is the same.

    (B, C, H, W) -> (B, C, H, W). B, H and W may differ between processes. In evaluation, and in a single process, it is
    nn.BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        y, mean, var, n = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)  # unbiased
            self.num_batches_tracked += 1
        return y


def convert_sync_bn(model: nn.Module) -> nn.Module:
    """Turn every nn.BatchNorm2d of the model into a SyncBatchNorm2d, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # the same data, another forward
    return model
