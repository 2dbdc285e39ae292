"""What a run needs of its process, and what its result must say about the machine."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from vqmoe_vision.provenance import commit, installed, processor

from .restart import MALLOC

# what drives cards, NVIDIA's and AMD's
DRIVERS = '/sys/module/nvidia/version', '/sys/module/amdgpu/version'
PACKAGES = ['torch', 'timm', 'vqmoe-vision', 'transformers']
PACKAGES += ['soft-moe', 'soft-moe-pytorch', 'st-moe-pytorch', 'mixture-of-experts']


def computes(dtype: str) -> bool:
    """Whether this processor's matrix products have instructions for a dtype."""
    if dtype == 'float32':
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe_machine(device: str) -> dict[str, Any]:
    """Machine, threads, versions and commit of a run, by name."""
    card: dict[str, Any] = {'device': 'cpu'}
    if device.startswith('cuda'):
        found = torch.cuda.get_device_properties(device)
        card = {
            'device': torch.cuda.get_device_name(device),
            'capability': f'{found.major}.{found.minor}',  # by which the kernel is chosen
            'memory_gib': round(found.total_memory / 2**30, 1),
            # metadata of PyPI's builds do not name CUDA
            'torch_build': torch.__version__,
            'cuda': torch.version.cuda or torch.version.hip,
            'triton': installed('triton'),
            'driver': ' '.join(f.read_text().strip() for f in map(Path, DRIVERS) if f.is_file()),
        }
    return {
        'machine': processor(),
        'cores': os.cpu_count(),
        'load_average': round(os.getloadavg()[0], 2),
        **card,
        'isa': torch.backends.cpu.get_cpu_capability(),
        'threads': torch.get_num_threads(),
        'allocator': {name: os.environ.get(name) for name in MALLOC},
        'omp_wait_policy': os.environ.get('OMP_WAIT_POLICY'),
        'python': platform.python_version(),
        'versions': {name: version for name in PACKAGES if (version := installed(name))},
        'commit': commit(),
    }
