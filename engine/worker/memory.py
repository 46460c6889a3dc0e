"""How much memory is free: of a CUDA device, or of this machine within its cgroup."""

from __future__ import annotations

import torch

from ..host_memory import available_host_bytes


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_host_bytes()
