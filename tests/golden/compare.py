"""What an older commit and this working tree do not do alike: to the bit, in one environment.

    python tests/golden/compare.py REV

prints a line for each difference, and 'equal' where there is none. Both are seen from outside, as
`probe.py` does: starts, answers, losses, gradients and updates of every method with every preset,
states of entry points, answers of the shipped weights, configs as they are resolved, and flags.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Seen = dict[str, dict[str, Any]]  # by what is looked at, tensors or texts by name


def model_seen(variant: str, method: str, options: dict[str, Any]) -> Seen:
    """Of a tiny classifier: its start, its answers, and some steps of a training."""
    import probe

    images = probe.waves(6, 16).float()
    model = probe.create(method, **options)
    seen: Seen = {'start': copies(model.state_dict())}
    probe.enlarge(model)
    with torch.no_grad():
        seen['answers'] = {'logits': model.eval()(images)}
    for number, losses in enumerate(probe.train(model, probe.classify, images), 1):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen[f'losses of step {number}'] = losses
        seen[f'gradients of step {number}'] = copies(gradients)
    seen['state after the steps'] = copies(model.state_dict())
    return {f'{variant}, {what}': values for what, values in seen.items()}


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def look(root: Path) -> Seen:
    """All that is compared of one version, which `import vqmoe_vision` has to find."""
    import probe
    import timm

    import vqmoe_vision

    assert Path(vqmoe_vision.__file__).is_relative_to(root), vqmoe_vision.__file__
    probe.ROOT = root
    torch.set_num_threads(1)
    seen: Seen = {}
    for variant, (method, options) in probe.variants().items():
        try:
            seen |= model_seen(variant, method, options)
        except (TypeError, ValueError) as error:  # an option that this version does not have
            seen[variant] = {'error': str(error)}
    for name in probe.entry_points():
        with torch.device('meta'):
            state = probe.shapes(timm.create_model(name))
        seen[f'{name}, state'] = {key: f'{shape} {dtype}' for key, shape, dtype in state}
    for name in ('test_vit_vqmoe', 'test_vit_dense'):
        model = timm.create_model(name, pretrained=True).eval()
        with torch.no_grad():
            seen[f'{name}, answers'] = {'logits': model(probe.waves(100, 32).float())}
    for name, config in probe.configs().items():
        seen[f'configs/{name}'] = config
    for name, found in probe.flags().items():
        seen[f'flags of {name}'] = {flag: str(about) for flag, about in found.items()}
    return seen


def look_in_process(root: Path, out: Path) -> Seen:
    """As `look`, in a process of its own that finds this version first."""
    environment = {**os.environ, 'PYTHONPATH': str(root), 'PYTHONWARNINGS': 'ignore'}
    command = [sys.executable, __file__, '--look', str(root), str(out)]
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    return torch.load(out, weights_only=True)


def main(revision: str) -> None:
    from probe import differences

    git = ['git', '-C', str(ROOT)]
    with TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / 'old'
        subprocess.run([*git, 'worktree', 'add', '-q', '--detach', str(tree), revision], check=True)
        try:
            old = look_in_process(tree, Path(folder) / 'old.pt')
            new = look_in_process(ROOT, Path(folder) / 'new.pt')
        finally:
            subprocess.run([*git, 'worktree', 'remove', '--force', str(tree)], check=True)
    print('\n'.join(differences(new, old)) or 'equal')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--look']:
        torch.save(look(Path(sys.argv[2])), sys.argv[3])
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit(__doc__)
