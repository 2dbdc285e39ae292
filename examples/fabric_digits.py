"""Train on digits with Lightning Fabric: python examples/fabric_digits.py"""

import torch.nn.functional as F
from digits import accuracy, build, loader, tensors
from lightning_fabric import Fabric

from vqmoe_vision import collect_losses


def main(epochs: int = 30):
    fabric = Fabric()
    fabric.launch()
    train, test = tensors()
    model, optimizer = fabric.setup(*build())
    batches = fabric.setup_dataloaders(loader(train))
    for _ in range(epochs):
        model.train()
        for images, labels in batches:
            with collect_losses(model, optimizer.optimizer) as collected:  # around both passes
                collected.add({'task': F.cross_entropy(model(images), labels)}, len(images))
                fabric.backward(collected.total())
            optimizer.step()  # codebooks have moved when the block has ended
            optimizer.zero_grad()
    fabric.print(f'accuracy {accuracy(model.module, test):.1f}, losses {collected.losses}')
    return model.module, collected


if __name__ == '__main__':
    main()
