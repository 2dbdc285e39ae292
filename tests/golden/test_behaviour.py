"""What a user relies on. What tests elsewhere hold is named here, and must go on being there.

A test that moves is named anew, with its promise; one that is dropped leaves its promise unheld.

an option that would be ignored -> tests/engine/test_config.py::test_constructor_refuses_what_it_would_ignore
restart keeps what was frozen -> tests/moe/methods/test_stablemoe.py::test_restarting_stage_1_keeps_the_frozen_router_and_learns_on
restart where a run starts -> tests/engine/test_checkpoint.py::test_layers_begin_a_new_training_and_the_log_says_so
losses that nobody collects -> tests/models/test_citizenship.py::test_training_uncollected_is_said_once
a run's optimizer knows experts -> tests/engine/test_hooks.py::test_optimizers_are_taught_the_experts_once_before_their_state_is_loaded
an optimizer knows experts -> tests/moe/test_optimizer.py::test_every_optimizer_of_timm_updates_an_expert_as_a_matrix_or_is_refused
SIGTERM saves, and loses no gradient -> tests/engine/test_stop.py::test_a_run_that_is_stopped_goes_on_bit_for_bit
dynamic_img_size -> tests/models/test_citizenship.py::test_a_dynamic_model_equals_one_set_to_the_size
dynamic_img_pad -> tests/models/test_citizenship.py::test_odd_sizes_are_padded_below_and_right
features_only -> tests/models/test_citizenship.py::test_features_only_equals_intermediates
nothing is read back -> tests/engine/test_reads_nothing_back.py::test_a_training_step_reads_nothing_back
what is read back is found -> tests/models/test_reads_nothing_back.py::test_a_single_read_is_seen
exact upcycling -> tests/models/test_upcycle.py::test_a_model_begins_with_the_answers_of_the_dense_one
exact upcycling of other hosts -> tests/classification/test_classifier.py::test_it_begins_with_the_answers_of_dense_weights
DINOv3's names -> tests/classification/test_classifier.py::test_files_of_dinov3s_authors_are_understood
mmseg's names of a backbone -> tests/segmentation/test_segmentor.py::test_weights_of_mmsegs_own_backbone_compute_the_same
mmseg's names of a Segmenter -> tests/segmentation/test_published.py::test_files_of_mmseg_give_the_logits_of_mmseg
the authors' names of a Segmenter -> tests/segmentation/test_published.py::test_files_of_the_authors_give_their_logits
ONNX parity -> tests/models/test_export.py::test_onnxruntime_gives_the_same_and_computes_no_expert_that_was_not_chosen
ONNX parity of a Segmenter -> tests/segmentation/test_export.py::test_onnxruntime_gives_the_same_label_maps
two processes train as one -> tests/models/test_ddp.py::test_processes_that_share_a_batch_train_as_one
two processes score as one -> tests/engine/test_processes.py::test_scores_are_those_of_one_process
a resumed run by epochs -> tests/engine/test_cli.py::test_resumed_run_equals_uninterrupted_run_bit_for_bit
a resumed run by iterations -> tests/segmentation/test_cli.py::test_resumed_run_equals_an_uninterrupted_one
a kill inside a write -> tests/engine/test_checkpoint_files.py::test_a_write_that_ends_in_the_middle_leaves_the_old_file
"""  # noqa: E501  names of tests are long

import ast
import re

import pytest

from ..forked import ROOT
from .faults.table import FAULTS

HELD = re.findall(r'^(.+) -> (\S+)::(\S+)$', __doc__, re.MULTILINE)


@pytest.mark.parametrize('promise, file, name', HELD, ids=[promise for promise, *_ in HELD])
def test_a_test_elsewhere_holds_it(promise, file, name):
    body = ast.parse((ROOT / file).read_text()).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    (test,) = found
    marks = [ast.unparse(decorator) for decorator in test.decorator_list]
    assert 'pytest.mark.long' not in marks  # which is not run before a merge
    assert not any(mark.startswith(('pytest.mark.skip', 'pytest.mark.xfail')) for mark in marks)


def test_no_fault_is_lost():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 41


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_of_one_line_that_occurs_once(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, f'{fault.file} has moved on: take the fault along'
    # no error of syntax, which any test would find
    compile(text.replace(fault.old, fault.new), fault.file, 'exec')
    assert fault.old != fault.new and fault.tests
    assert all((ROOT / 'tests' / name).is_file() for name in fault.tests.split())
