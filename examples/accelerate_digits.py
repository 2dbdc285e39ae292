"""Train on digits with accelerate: python examples/accelerate_digits.py"""

import torch.nn.functional as F
from accelerate import Accelerator
from digits import accuracy, build, loader, tensors

from vqmoe_vision import collect_losses


def main(epochs: int = 30):
    accelerator = Accelerator()
    train, test = tensors()
    model, optimizer, batches = accelerator.prepare(*build(), loader(train))
    for _ in range(epochs):
        model.train()
        for images, labels in batches:
            with collect_losses(model, optimizer.optimizer) as collected:  # around both passes
                collected.add({'task': F.cross_entropy(model(images), labels)}, len(images))
                accelerator.backward(collected.total())
            optimizer.step()  # codebooks have moved when the block has ended
            optimizer.zero_grad()
    model = accelerator.unwrap_model(model)
    accelerator.print(f'accuracy {accuracy(model, test):.1f}, losses {collected.losses}')
    return model, collected


if __name__ == '__main__':
    main()
