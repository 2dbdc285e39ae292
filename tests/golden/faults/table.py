"""Forty faults of one line, each of which a user would have to live with, and the tests of it.

A fault moves along with its code: the same sentence, another line. It is not replaced by one that
is easier to find.

Four lines say its name, its room and what would be wrong for a user; its file, and the tests below
`tests/` that should find it; part of a line that occurs once; what stands in its place.
"""

import re
from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    room: str
    sentence: str
    file: str
    tests: str
    old: str
    new: str


TABLE = r"""
balance-has-no-gradient [moe] The balance loss is in the log and in the total, and balances nothing.
  vqmoe_vision/moe/losses.py: moe/test_routing.py moe/methods/test_smoe.py
  - torch.stack([load, token_mean(probs)])
  + torch.stack([load, token_mean(probs.detach())])
capacity-off-by-one [moe] An expert takes one token more than its capacity.
  vqmoe_vision/moe/routing.py: moe/test_routing.py moe/methods/test_smoe.py
  - scatter(0, order, place < capacity)
  + scatter(0, order, place <= capacity)
dead-below-a-share-of-all [moe] Codes with a hundredth of all tokens count as dead, though even usage of many is less.
  vqmoe_vision/moe/codebooks/ema.py: moe/test_codebook_revival.py moe/test_codebook.py
  - dead = self.usage * self.num_codes < self.dead_code_threshold
  + dead = self.usage < self.dead_code_threshold
usage-of-one-process [moe] Each process moves its codebook by its own tokens, and the copies drift apart.
  vqmoe_vision/moe/codebooks/usage.py: moe/test_codebook_processes.py models/test_ddp.py
  - sums = sum_over_ranks(torch.cat([self.counts[..., None], self.token_sums], dim=-1))
  + sums = torch.cat([self.counts[..., None], self.token_sums], dim=-1)
commitment-moves-codes [moe] The commitment pulls codes to tokens, and no token to its code.
  vqmoe_vision/moe/codebooks/__init__.py: moe/test_codebook.py moe/methods/test_vqmoe.py
  - error = _mean_squared(compared, chosen.detach())
  + error = _mean_squared(compared.detach(), chosen)
loss-gradient-over-processes [moe] On N processes auxiliary losses have an N-th of their gradient.
  vqmoe_vision/moe/losses.py: moe/test_collect.py models/test_ddp.py
  - sums = sums + size * (own - own.detach())
  + sums = sums + own - own.detach()
gates-left-out [moe] The gate is learned and logged, but both branches count in full.
  vqmoe_vision/moe/dispatch.py: moe/methods/test_vqmoe.py
  - weights = weights * gates
  + pass
code-of-another-expert [methods] A code belongs to the expert after its own, so that saved models answer otherwise.
  vqmoe_vision/moe/methods/vqmoe.py: moe/methods/test_vqmoe.py
  - experts = quantized.indices % self.experts.num_experts
  + experts = (quantized.indices + 1) % self.experts.num_experts
always-renormalized [methods] The weights of the chosen experts sum to 1 though V-MoE does not renormalise them.
  vqmoe_vision/moe/methods/smoe.py: moe/methods/test_smoe.py moe/test_recorded.py
  - if config.renormalize:
  + if config.renormalize or config.top_k > 1:
frozen-router-goes-on [methods] In the second stage of StableMoE weight decay and momentum still move the frozen router.
  vqmoe_vision/moe/methods/stablemoe.py: moe/methods/test_stablemoe.py
  - return torch.where(frozen, getattr(self, f'frozen_{name}'), getattr(self, name)).float()
  + return getattr(self, name).float()
temperature-upside-down [methods] Scores of XMoE are multiplied by the temperature, so that gates are almost even.
  vqmoe_vision/moe/methods/xmoe.py: moe/methods/test_xmoe.py moe/test_recorded.py
  - scaled = scores * torch.exp(-self.log_temperature.float())
  + scaled = scores * torch.exp(self.log_temperature.float())
softmax-over-the-other-side [methods] SoftMoE mixes tokens by the softmax over slots, and answers by that over tokens.
  vqmoe_vision/moe/methods/softmoe.py: moe/methods/test_softmoe.py moe/test_recorded.py
  - for dim in (1, 2))
  + for dim in (2, 1))
positions-on-their-side [models] Positions of images that are no squares are read with height and width exchanged.
  vqmoe_vision/models/fitting.py: models/test_transfer.py models/test_weight_files.py
  - grid = (height // patch[0], width // patch[1])
  + grid = (width // patch[1], height // patch[0])
split-experts-answer-too-little [models] Experts that split an MLP answer a fraction of what the dense model does.
  vqmoe_vision/models/upcycle.py: models/test_upcycle.py
  - value.t()[units].transpose(1, 2) * (dense / hidden)
  + value.t()[units].transpose(1, 2)
discrete-saved-as-full [models] A model built with form='full' and made discrete is saved as a full one.
  vqmoe_vision/models/convert.py: models/test_convert.py models/test_saved.py
  - module._model_args = {**module._model_args, **changed}
  + module._model_args = {**changed, **module._model_args}
sums-in-place-of-means [models] Sharded over N processes, routers have N times the gradient of everything else.
  vqmoe_vision/models/sharding.py: models/test_sharding.py
  - flat /= dist.get_world_size()
  + pass
experts-start-by-method [models] At one seed the experts of two rows start differently: seeds are no pairs.
  vqmoe_vision/models/create.py: models/test_create.py
  -                             layer.init_weights()
  +                             pass
resume-takes-the-oldest [engine] A run that resumes goes on from the oldest checkpoint and loses what came after.
  vqmoe_vision/engine/checkpoint_files.py: engine/test_checkpoint_files.py engine/test_checkpoint_hook.py
  - for _, path in sorted((one for one in found if one[0][0] > after), reverse=True):
  + for _, path in sorted(one for one in found if one[0][0] > after):
same-augmentation-every-epoch [engine] A training image is cropped and flipped in the same way in every epoch.
  vqmoe_vision/engine/seeding.py: engine/test_seeding.py
  - _seeded(index, self.seed, self.epoch, index, _SAMPLES) for index in super().__iter__()
  + _seeded(index, self.seed, 0, index, _SAMPLES) for index in super().__iter__()
state-moves-at-every-batch [engine] Where gradients accumulate, codebooks move at every batch in place of every step.
  vqmoe_vision/engine/hooks.py: engine/test_hooks.py engine/test_seeding.py
  - if runner.optim_wrapper.should_update():
  + if True:
shortest-key-wins [engine] Of two custom_keys in a name the general one sets the learning rate, not the special one.
  vqmoe_vision/engine/optim.py: engine/test_config.py
  - ordered = sorted(sorted(custom_keys), key=len, reverse=True)
  + ordered = sorted(sorted(custom_keys), key=len)
saved-without-optimizer [engine] A run that resumes begins with an optimizer that has forgotten its averages.
  vqmoe_vision/engine/checkpoint_hook.py: engine/test_checkpoint_hook.py engine/test_cli.py
  - save_optimizer=self.save_optimizer,
  + save_optimizer=False,
dev-in-train [classification] Images of dev are trained on: what is chosen by them is chosen by the training.
  vqmoe_vision/classification/datasets.py: classification/test_datasets.py
  - train = np.sort(train)
  + train = np.arange(len(targets))
validation-on-test [classification] Validation looks at the test images, and the best checkpoint is chosen by them.
  configs/_base_/datasets/recipe.py: test_configs.py classification/test_datasets.py
  - split='dev', transform=dict(type='timm'
  + split='test', transform=dict(type='timm'
crop-without-margin [classification] The random crop is the whole image: the light augmentation only flips.
  vqmoe_vision/classification/transforms.py: classification/test_normalization.py
  - transforms.RandomCrop(input_size, padding),
  + transforms.RandomCrop(input_size),
head-called-tail [classification] Accuracies of frequent and of rare classes have exchanged their names.
  vqmoe_vision/classification/evaluation.py: classification/test_datasets.py
  - key=lambda label: -counts[label])
  + key=lambda label: counts[label])
void-counts [segmentation] What is predicted for void pixels counts as wrong, and lowers every mIoU.
  vqmoe_vision/segmentation/mmseg_patches.py: segmentation/test_metrics.py
  - labelled = label != ignore_index
  + labelled = label >= 0
label-map-not-augmented [segmentation] The image is flipped and cropped, its label map is not.
  vqmoe_vision/segmentation/transforms.py: segmentation/test_transforms.py
  - results['gt_seg_map'] = outputs['mask']
  + results['gt_seg_map'] = inputs['mask']
mean-in-the-other-order [segmentation] Red is normalised with the numbers of blue where normalisation follows the weights.
  vqmoe_vision/segmentation/preprocessor.py: segmentation/test_normalization.py
  - levels = [value * _WHITE for value in getattr(weights, name)]
  + levels = [value * _WHITE for value in getattr(weights, name)[::-1]]
padding-is-class-0 [segmentation] What fills a crop up to whole patches is learned as the first class.
  vqmoe_vision/segmentation/segmentor.py: segmentation/test_segmentor.py
  - filled = F.pad(labels, sides, value=self._ignored_by_all())
  + filled = F.pad(labels, sides, value=0)
sky-is-void [segmentation] Labels of CamVid are reduced by one: sky is ignored, and every class has another name.
  vqmoe_vision/segmentation/datasets.py: segmentation/test_own_data.py segmentation/test_configs.py
  - img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, reduce_zero_label=False, **kw
  + img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, reduce_zero_label=True, **kw
difference-with-other-sign [comparison] A row that is better than the reference is shown as worse.
  vqmoe_vision/comparison/statistics.py: comparison/test_statistics.py comparison/test_report.py
  - differences = a - b
  + differences = b - a
normal-in-place-of-t [comparison] Intervals of few seeds are those of a known noise, and much too narrow.
  vqmoe_vision/comparison/statistics.py: comparison/test_statistics.py comparison/test_report.py
  - spread = stats.t(freedom, found.mean, noise / math.sqrt(found.pairs))
  + spread = stats.norm(found.mean, noise / math.sqrt(found.pairs))
holm-falls-again [comparison] A row with a larger p than another passes the correction where that one does not.
  vqmoe_vision/comparison/statistics.py: comparison/test_statistics.py comparison/test_report.py
  - np.minimum(np.maximum.accumulate(corrected[order] * factors), 1)
  + np.minimum(corrected[order] * factors, 1)
other-data-beside [comparison] A row that was trained on as many other images stands in the table.
  vqmoe_vision/comparison/store.py: comparison/test_store.py comparison/test_report.py
  - yield split, f'{data["samples"]:,} samples ({data["digest"]})'
  + yield split, f'{data["samples"]:,} samples'
new-option-unnoticed [comparison] A row from before the config got an option counts as one that had it.
  vqmoe_vision/comparison/spec.py: comparison/test_store.py
  - counting = {name: value for name, value in config.items() if name not in _LEFT_OUT}
  + counting = {n: v for n, v in config.items() if n not in {*_LEFT_OUT, 'train_cfg'}}
information-not-normalized [analysis] Normalised mutual information is in nats, and grows with the number of classes.
  vqmoe_vision/analysis/measures.py: analysis/test_measures.py analysis/test_survey.py
  - return mutual_information(counts) / most if most > 0 else 0.0
  + return mutual_information(counts) if most > 0 else 0.0
dropped-tokens-in-load [analysis] The load of a survey counts tokens that the capacity has dropped.
  vqmoe_vision/analysis/record.py: analysis/test_record.py analysis/test_survey.py
  - indices, weights = indices.masked_fill(~kept, -1), weights.masked_fill(~kept, 0)
  + weights = weights.masked_fill(~kept, 0)
colours-of-the-next-expert [analysis] Patches have the colour that the legend gives to the expert before theirs.
  vqmoe_vision/analysis/pictures.py: analysis/test_report.py
  - palette = torch.cat([expert_colours(num_experts), NO_EXPERT])
  + palette = torch.cat([NO_EXPERT, expert_colours(num_experts)])
chance-forgotten [analysis] What chance gives counts: random routing seems to follow the image.
  vqmoe_vision/analysis/verdicts.py: analysis/test_verdicts.py
  - image = max(repeated - position, 0.0) if repeated > most + 1e-9 else 0.0
  + image = max(repeated - position, 0.0)
mirror-not-turned-back [analysis] After a flip the left patch is compared with the right one: routing seems to change.
  vqmoe_vision/analysis/shifts.py: analysis/test_measures.py
  - lambda before, after: (before, after.flip(-1)),
  + lambda before, after: (before, after),
"""  # noqa: E501  code is as long as it is there
FAULTS = tuple(
    Fault(*found)
    for found in re.findall(r'(.+) \[(.+)\] (.+)\n  (.+): (.+)\n  - (.+)\n  \+ (.+)\n', TABLE)
)
