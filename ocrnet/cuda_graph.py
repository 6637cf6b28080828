"""A function of tensors as one CUDA graph, and its parts side by side.

A step of HRNet launches thousands of small kernels, and the host needs longer to launch most of them than the card to
run them. A CUDA graph records the kernels once and then launches all of them together
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

WARM_UP = 2  # ordinary calls with inputs of a shape before they are recorded
MAX_GRAPHS = 8  # other shapes are not recorded


class CudaGraph:
    """``function``, recorded at its third call with inputs of a shape and type, and replayed from then on.

    A replay runs the same kernels on the same memory. What changes from call to call must come from the inputs, from
    tensors that are changed in place (weights, statistics of BatchNorm), or from the random seed. So the function must
    not read a value from the device (``.item()``) and not make a tensor from numbers of the host. It starts with
    gradients of None if it computes gradients. Each call overwrites the outputs and gradients of the one before.
    Parameters that are replaced (``p.data = x``) instead of changed (``p.data.copy_(x)``) and a change of the model's
    mode (``train``, ``eval``) are not seen.

    Args:
        function: tensors -> a tensor or a tuple of them.
        device: on which it runs. Its inputs may be elsewhere.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device = function, device
        self.stream, self.pool = stream_and_pool(device)
        self.calls, self.graphs = Counter(), {}

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self.graphs:
            self.calls[shapes] += 1
            if self.calls[shapes] <= WARM_UP or len(self.graphs) == MAX_GRAPHS:
                return self.run(inputs)
            self.graphs[shapes] = self.record(inputs)
        graph, graph_inputs, outputs = self.graphs[shapes]
        for graph_input, x in zip(graph_inputs, inputs):
            graph_input.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """An ordinary call, on a stream of its own, as recording requires of the calls before it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def record(self, inputs: tuple[Tensor, ...]) -> tuple:
        """Record a call without running it. Returns the graph, its inputs and its outputs."""
        graph_inputs = [x.to(self.device, copy=True) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # thread_local: the data loader's thread for pinned memory also calls CUDA
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = self.function(*graph_inputs)
        return graph, graph_inputs, outputs


@lru_cache
def stream_and_pool(device: torch.device) -> tuple:
    """The stream that records, and the memory that all graphs share, those of training and of validation.

    One graph runs at a time, and each keeps its inputs and outputs.
    """
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()


@lru_cache
def side_streams(count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream() for _ in range(count)]


def in_parallel(functions: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor | list[Tensor]]) -> list[Tensor]:
    """[function(x), ...]. In a CUDA graph the functions run side by side, and so do their backward passes.

    Kernels of small feature maps fill a part of the card only.
    """
    first = inputs[0][0]  # of the list, or of the batch
    if not first.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return [function(x) for function, x in zip(functions, inputs)]
    current, streams, outputs = torch.cuda.current_stream(), side_streams(len(inputs)), []
    for function, x, stream in zip(functions, inputs, streams):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs.append(function(x))
        # memory is free for the next tensor of its own stream once Python is done with it; another stream may not be
        for tensor in x if isinstance(x, list) else [x]:
            tensor.record_stream(stream)
        outputs[-1].record_stream(current)
    for stream in streams:
        current.wait_stream(stream)
    return outputs
