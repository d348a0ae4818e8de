"""A function of tensors as one CUDA graph: its launches are recorded once and replayed with new inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: what is chosen or allocated once, is by then


class Graphed:
    """Calls `work` as it is `WARM_UP` times, then records it and replays the record, on inputs of the same shapes.

    `work` must not wait for the device nor bind a tensor it keeps anew; what it keeps outlives calls in place.
    """

    def __init__(self, work: Callable[..., None]) -> None:
        self.work, self.calls = work, 0
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: list[Tensor] = []
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> None:
        """Do the same work on these inputs, which are copied."""
        if not self.inputs:
            self.inputs = [given.clone() for given in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.work(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.calls == WARM_UP + 1:
            # Threads that pin or decode meanwhile may allocate: they are not part of the record.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.work(*self.inputs)
        self.graph.replay()
