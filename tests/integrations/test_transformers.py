"""transformers' `Trainer` with the scheme equals the loop by hand, and resumes from its checkpoints."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler

import rdp_kernels as rdp

from .loops import Watch, assert_equal, by_hand, isolate

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        Data2VecVisionConfig,
        Data2VecVisionForImageClassification,
        Trainer,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )
    from transformers.utils import logging

    from rdp_kernels.integrations.distributed import check_trained
    from rdp_kernels.integrations.transformers import attach

logging.set_verbosity_error()
logging.disable_progress_bar()
SIZE, COUNT = 4, 22
isolated = pytest.fixture(autouse=True)(isolate)


class InOrder(Trainer):
    """The Trainer's own loop, on the data in order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def vit(dtype=torch.float64):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=4, patch_size=2,
        num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = ViTForImageClassification(config).to(dtype)
    rdp.convert(model, drop_prob=0.5, check=False)
    return model


def data2vec():
    """With drop-paths and dropout. The Trainer (5.18) saves a ViT's weights under names that it doesn't find when it
    loads."""
    torch.manual_seed(0)
    config = Data2VecVisionConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=4, patch_size=2,
        num_channels=1, num_labels=3, hidden_dropout_prob=0.2, drop_path_rate=0.5, attn_implementation="eager",
    )  # fmt: skip
    model = Data2VecVisionForImageClassification(config).double()
    rdp.convert(model, check=False)
    return model


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(COUNT, 1, 4, 4, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(3, (COUNT,), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def trainer_of(model, folder, **options):
    defaults = {"per_device_train_batch_size": SIZE, "max_steps": 9, "save_strategy": "no", "optim": "sgd"}
    defaults |= {"learning_rate": 0.1, "weight_decay": 0.01, "lr_scheduler_type": "linear", "max_grad_norm": 1e9}
    fixed = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **(defaults | fixed | options))
    few = data(model.dtype)
    return InOrder(model, arguments, train_dataset=few, eval_dataset=few[:4])


def fit(folder, model=None, resume=None, **options):
    model = vit() if model is None else model
    scheme = rdp.ResidualDropPath(model, seed=3)
    trainer = trainer_of(model, folder, **options)
    attach(trainer, scheme)
    trainer.train(resume_from_checkpoint=resume)
    assert scheme.phase is None, "the model is plain again"
    return model, scheme, trainer


def in_batches(dtype=torch.float64, accumulate=1):
    """The batches of each optimizer step: epochs end with a smaller batch, and a step doesn't span two epochs."""
    few = data(dtype)
    parts = [few[start : start + SIZE] for start in range(0, COUNT, SIZE)]
    batches = [{k: torch.stack([example[k] for example in part]) for k in part[0]} for part in parts]
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def hand_trained(steps, clip=None, dtype=torch.float64, autocast=False):
    """The loss of a step is the mean over all images of its batches."""
    model = vit(dtype=dtype)
    scheme = rdp.ResidualDropPath(model, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    for group in optimizer.param_groups:  # as in the Trainer: none on biases and norms
        kept = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
        group["params"] = [p for p in group["params"] if not any(p is q for q in kept)]
    optimizer.add_param_group({"params": kept, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))

    def loss(batch, total):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(batch["pixel_values"]).logits.to(dtype)
            return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum") / total

    def end_step():
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(), schedule.step(), optimizer.zero_grad()

    totals = [sum(len(batch["labels"]) for batch in step) for step in steps]
    losses = [[lambda b=b, n=n: loss(b, n) for b in step] for step, n in zip(steps, totals, strict=True)]
    return model, by_hand(scheme, losses, end_step)


def completed(phases):
    return {phase: phases.count(phase) for phase in ("drop", "reuse")}


def test_equals_the_loop_by_hand_with_evaluation_in_between(tmp_path):
    """The schedule steps once for each iteration."""
    model, scheme, trainer = fit(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    expected, phases = hand_trained((2 * in_batches())[:9])
    assert_equal(model, expected, 1e-12)
    assert scheme.state_dict()["completed"] == completed(phases)
    assert phases.count("reuse") > 2
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) > 4


def test_accumulation_and_clipping(tmp_path):
    options = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05, "max_steps": 8}
    model, scheme, _ = fit(tmp_path, **options)
    expected, phases = hand_trained(4 * in_batches(accumulate=4), clip=0.05)
    assert_equal(model, expected, 1e-12)
    assert scheme.state_dict()["completed"] == completed(phases)


def test_checkpointing_changes_nothing(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert_equal(fit(tmp_path, **options)[0], fit(tmp_path)[0], 1e-12)


def test_bfloat16(tmp_path):
    model, scheme, _ = fit(tmp_path, vit(dtype=torch.float32), bf16=True)
    expected, phases = hand_trained((2 * in_batches(torch.float32))[:9], dtype=torch.float32, autocast=True)
    assert_equal(model, expected, 1e-3)
    assert scheme.state_dict()["completed"] == completed(phases)


def test_frozen_weights_do_not_move(tmp_path):
    """With the optimizer that the Trainer makes by default: AdamW, fused."""
    model = vit()
    scheme = rdp.ResidualDropPath(model, seed=3)
    trainer = trainer_of(model, tmp_path, optim="adamw_torch_fused")
    attach(trainer, scheme)
    trainer.create_optimizer()
    watch = Watch(model, scheme, trainer.optimizer)
    trainer.train()
    assert len(watch.phases) == 9
    assert set(watch.phases) == {"drop", "reuse"}


@pytest.mark.slow
def test_goes_on_from_every_checkpoint_to_the_bit(tmp_path):
    """With momentum, dropout and the schedule."""
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole, scheme, _ = fit(tmp_path / "whole", data2vec(), **options)
    pending = []
    for step in (2, 3, 4, 6, 7):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["ResidualDropPath"]
        pending.append(saved["phase"])
        model, resumed, _ = fit(tmp_path / "resumed", data2vec(), str(checkpoint), **options)
        assert_equal(model, whole)
        assert resumed.state_dict() == scheme.state_dict()
    assert set(pending) == {"drop", "reuse"}, "there is a checkpoint in the middle of a pair"


def test_after_a_failure_and_in_another_run_it_trains_on(tmp_path):
    _, scheme, trainer = fit(tmp_path)
    assert trainer.state.global_step == 9
    completed = sum(scheme.state_dict()["completed"].values())

    def fail(*_):
        raise ZeroDivisionError

    step, trainer.training_step = trainer.training_step, fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert sum(scheme.state_dict()["completed"].values()) == completed + 9
    assert scheme.phase is None


def test_refused(tmp_path):
    model, other = vit(), vit()
    trainer = trainer_of(model, tmp_path)
    attach(trainer, rdp.ResidualDropPath(other))
    with pytest.raises(ValueError, match="scheme must belong to the model that is trained"):
        trainer.train()
    with pytest.raises(TypeError, match="scheme must be a ResidualDropPath, got ViTForImageClassification"):
        attach(trainer, model)
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got ViTForImageClassification"):
        attach(model, rdp.ResidualDropPath(model))
    with pytest.raises(ValueError, match="model must not be in DataParallel"):
        check_trained(nn.DataParallel(model), rdp.ResidualDropPath(vit()))
