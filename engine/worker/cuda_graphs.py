"""CUDA graphs for `graphs.GraphedDecodes`: one memory pool, captured on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .graphs import Graph, Tensors


class CudaGraphs:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Tensors]) -> Graph:
        # Other threads (loaders, the collector of the ring) may allocate meanwhile.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = function()
        return Graph(output, graph.replay)
