"""What a run needs of its process, and what its result must say about the machine."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from vqmoe_vision.provenance import commit, installed, processor

# Fresh weight gradients of 20 to 80 MB are otherwise mapped and faulted in anew at every step: that
# costs every contender 10 to 25 %, some more than others.
MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4000000000',
    'MALLOC_TRIM_THRESHOLD_': '8000000000',
    'MALLOC_TOP_PAD_': '268435456',
}
# what drives cards, NVIDIA's and AMD's
DRIVERS = '/sys/module/nvidia/version', '/sys/module/amdgpu/version'
PACKAGES = ['torch', 'timm', 'vqmoe-vision', 'transformers']
PACKAGES += ['soft-moe', 'soft-moe-pytorch', 'st-moe-pytorch', 'mixture-of-experts']
_RESTARTED = 'VQMOE_BENCHMARK_RESTARTED'


def restart_prepared(threads: int) -> None:
    """Replace this process by itself with glibc's allocator and OpenMP set up, once."""
    wanted = {name: str(threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    wanted['KINETO_LOG_LEVEL'] = '99'  # the profiler, which reads memory, says nothing of itself
    if platform.libc_ver()[0] == 'glibc':
        wanted.update(MALLOC)
    missing = {k: v for k, v in wanted.items() if os.environ.get(k) != v}
    if not missing or _RESTARTED in os.environ:
        return
    print('restarting with', ' '.join(f'{k}={v}' for k, v in missing.items()), flush=True)
    environment = {**os.environ, **missing, _RESTARTED: '1'}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


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
