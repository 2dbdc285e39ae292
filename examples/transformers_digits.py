"""Train on digits under transformers' Trainer: python examples/transformers_digits.py"""

import sys

from digits import MODEL, SIZES, build, tensors
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vqmoe_vision import collect_losses, update_state

OPTIONS = dict(per_device_train_batch_size=64, learning_rate=2e-3, weight_decay=0.05)
OPTIONS |= dict(report_to='none', save_strategy='no')


class MoeTrainer(Trainer):
    """Trains with the losses of the experts too."""

    def training_step(self, model, *args):
        with collect_losses(model, update_state=False) as self.collected:
            return super().training_step(model, *args)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training:
            loss = loss + self.collected.total()
        return (loss, outputs) if return_outputs else loss


class MoveCodebooks(TrainerCallback):
    """Changes what learns without gradients, once per step of the optimizer."""

    def on_step_end(self, args, state, control, model, **kwargs):
        update_state(model)


def main(folder: str = 'work_dirs/transformers', epochs: float = 30, **more):
    names = 'pixel_values', 'labels'
    train, test = ([dict(zip(names, one, strict=True)) for one in part] for part in tensors())
    config = TimmWrapperConfig(architecture=MODEL, model_args=SIZES, num_labels=10)
    model = AutoModelForImageClassification.from_config(config)
    model.timm_model = build()[0]  # transformers begins linear layers in a way of its own
    trainer = MoeTrainer(
        model,
        TrainingArguments(folder, num_train_epochs=epochs, **{**OPTIONS, **more}),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda seen: {'accuracy': (seen[0].argmax(-1) == seen[1]).mean() * 100},
        callbacks=[MoveCodebooks()],
    )
    trainer.train()
    print(f'{trainer.evaluate()}, losses {trainer.collected.losses}')
    trainer.save_model(f'{folder}/model')
    return trainer


if __name__ == '__main__':
    main(*sys.argv[1:])
