"""The report has a reason for every block that was looked at."""

import copy
import random
import re

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from rdp_kernels.convert.report import describe

from . import nets
from .nets import DIM, DropPath, mlp, tokens


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn = nn.Linear(DIM, DIM)

    def forward(self, x, seen):
        return x + self.fn(x)


class CallsWithObjects(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Cached() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, seen=object())
        return x


class Feeds(nn.Module):
    """Nothing is added."""

    def __init__(self):
        super().__init__()
        self.fn = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.fn(x)


class AddsTwoInputs(Feeds):
    """Like BERT's output layers: another module computes the update."""

    def forward(self, x):
        return x.sin() + x


class Around(nn.Module):
    """An add around a block with a path."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = nets.Plain(), Feeds()

    def forward(self, x):
        return x + self.inner(x)


def reasons(report):
    return {b.block: b.reason for b in report.without_paths}


def test_blocks_without_a_path_are_grouped_by_class_and_reason():
    report = rdp.convert(CallsWithObjects().train(), 0.2, example_inputs=tokens())
    assert not report.rows
    assert "no path in Cached (3): it is called with object, which is neither a tensor nor a constant" in report.notes
    assert [b.block for b in report.without_paths] == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert "Cached (3)" in str(report)


def test_each_kind_of_block_without_a_path_has_its_reason():
    model = nets.Net(nets.Plain(), Around(), AddsTwoInputs())
    model.never = Feeds()
    report = rdp.convert(model, 0.2, example_inputs=tokens())
    assert reasons(report) == {
        "": "no add in its own forward",
        "blocks.1": "its residual adds stand around blocks that have paths of their own",
        "blocks.1.other": "the model doesn't call its block in an evaluation of the example",
        "blocks.2": "no add in its own forward has a summand that is computed with weights from the other",
        "never": "the model doesn't call its block in an evaluation of the example",
    }
    assert [row.block for row in report] == ["blocks.0"] * 2 + ["blocks.1.inner"] * 2


def test_a_block_in_a_branch_names_the_path_around_it():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.drop_path = Feeds(), DropPath(0.2)

        def forward(self, x):
            return x + self.drop_path(self.block(x))

    report = rdp.convert(nets.tokens_net(Inner), 0.2, example_inputs=tokens())
    (inner,) = (b for b in report.without_paths if b.block == "blocks.0.block")
    assert (inner.reason, inner.inside) == ("it lies in the branch of a path", "blocks.0.drop_path")


def test_a_drop_path_that_no_forward_calls():
    block = Feeds()
    block.drop_path = DropPath(0.2)
    report = rdp.convert(nets.tokens_net(block), example_inputs=tokens())
    assert reasons(report) == {"blocks.0": "its own forward calls none of its drop-paths"}


class Decodes(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 16, batch_first=True), 2)

    def forward(self, x, mask=None):
        return self.decoder(x, x.flip(0), tgt_mask=mask)


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()


MASK = torch.ones(6, 6).tril() == 0


@pytest.mark.parametrize(("make", "mask"), [(encoder, None), (Decodes, None), (Decodes, MASK)])
def test_the_layers_of_torch_are_looked_into(make, mask):
    """With dropout, equal to the bit; and a dropped branch doesn't run."""
    torch.manual_seed(0)
    model = make().train()
    twin, args = copy.deepcopy(model), (tokens(4), mask)  # not as many samples as tokens
    report = rdp.convert(model, 0.0, example_inputs=args)
    assert len(report.converted) == (4 if make is encoder else 6)
    outputs = []
    for one in (model, twin):
        torch.manual_seed(1)
        outputs.append(one(*args))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    model.zero_grad()
    scheme = rdp.ResidualDropPath(model, 0.5, mode="block", seed=0)
    for _ in scheme.iterations():
        model(*args).square().sum().backward()
        break
    assert {p.grad is None for p in model.parameters()} == {True, False}


def test_layers_of_torch_that_take_samples_in_dimension_1_are_named():
    report = rdp.convert(encoder(batch_first=False), 0.2, example_inputs=tokens())
    assert any(re.match(r"no path in TransformerEncoderLayer \(2\): .*differs", note) for note in report.notes)
    report = rdp.convert(encoder(), 0.2, example_inputs=(tokens(4), MASK))  # checks that the mask is a torch.Tensor
    assert report.converted or any(
        "TransformerEncoderLayer (2): its forward can't be traced" in n for n in report.notes
    )
    assert "no block has a drop-path" in str(rdp.convert(encoder(), example_inputs=tokens()))


@pytest.mark.skipif(not installed("transformers"), reason="transformers is not installed")
def test_language_models_of_transformers():
    import_torchvision()
    import transformers as t

    small = {"vocab_size": 50, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
    bert = t.BertModel(t.BertConfig(**small, intermediate_size=32, max_position_embeddings=16))
    llama = t.LlamaModel(t.LlamaConfig(**small, intermediate_size=32, num_key_value_heads=2))
    gpt2 = t.GPT2Model(t.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                    bos_token_id=0, eos_token_id=0))  # fmt: skip
    ids = {"input_ids": torch.arange(12).reshape(2, 6)}
    for model, kind in ((gpt2, "GPT2Block"), (llama, "LlamaDecoderLayer")):
        report = rdp.convert(model, 0.2, example_inputs=ids)
        wanted = f"no path in {kind} (2): it is called with DynamicCache, .*: convert and train with use_cache=False"
        assert any(re.match(re.escape(wanted).replace(r"\.\*", ".*"), note) for note in report.notes), str(report)
        assert len(rdp.convert(model, 0.2, example_inputs={**ids, "use_cache": False}).converted) == 4
    report = rdp.convert(bert, 0.2, example_inputs=ids)
    assert {b.block_class: b.reason for b in report.without_paths}["BertOutput"].startswith(
        "no add in its own forward has a summand"
    )
    assert not report.rows


class NoCopies(Feeds):
    """It can't be copied, and so it can't be checked; its error has no text."""

    def __init__(self):
        super().__init__()
        self.drop_path = DropPath(0.2)

    def __deepcopy__(self, memo):
        raise StopIteration

    def forward(self, x):
        return x + self.drop_path(self.fn(x))


class StopsInTraining(NoCopies):
    def forward(self, x):
        if self.training:
            next(iter(()))
        return x + self.drop_path(self.fn(x))


def test_an_error_without_words_has_a_place():
    (row,) = rdp.convert(nets.tokens_net(StopsInTraining()), example_inputs=tokens()).refused
    assert re.search(r"StopIteration in forward \(.*test_report\.py:\d+\)", row.refused), row.refused
    (row,) = rdp.convert(nets.tokens_net(NoCopies()), example_inputs=tokens()).refused
    assert re.fullmatch(r"it raises StopIteration in __deepcopy__ \(.*test_report\.py:\d+\)", row.refused), row.refused
    assert describe(KeyError()) == "KeyError"
    assert describe(ValueError("first\nsecond")) == "ValueError: first"


def test_on_the_meta_device_the_check_needs_numbers():
    with torch.device("meta"):
        model = nets.tokens_net(nets.Shared)
        x = torch.empty(4, 6, DIM)
    report = rdp.convert(model, example_inputs=x)
    assert len(report.refused) == 1
    assert re.search(r"meta device, and the check needs numbers: .*check=False", report.refused[0].refused)
    assert len(rdp.convert(model, example_inputs=x, check=False).converted) == 2


def test_a_block_with_two_names():
    block = nets.Concat()
    model = nets.tokens_net(block, block)
    report = rdp.convert(model, example_inputs=tokens())
    assert [row.block for row in report] == ["blocks.0"]
    assert "blocks.0 is blocks.1 too: one block, whose paths are dropped in all its calls or in none" in report.notes
    scheme = rdp.ResidualDropPath(model, 0.5)
    assert len(scheme.paths) == 1
    for _ in scheme.iterations():
        model(tokens()).sum().backward()


# Side products of branches


class Leaves(nn.Module):
    """Leaves attributes, a counter, a list and a buffer; in training only."""

    def __init__(self):
        super().__init__()
        self.fn, self.calls, self.features, self.fixed = mlp(), 0, [], torch.ones(DIM)
        self.register_buffer("mean", torch.zeros(DIM))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.norm(self.fn(x) * self.fixed)
        if self.training:
            self.calls += 1
            self.features.append(y)
            self.last = y.detach()
            self.mean = y.detach().mean((0, 1))
        return y


class Holds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.fn, self.inner, self.drop_path = nn.Linear(DIM, DIM), inner, DropPath(0.2)

    def forward(self, x):
        return x + self.drop_path(self.inner(self.fn(x)))


def test_what_a_branch_leaves_on_its_modules_is_reported():
    model = nets.tokens_net(Holds(Leaves()), Holds(mlp()))
    state = torch.get_rng_state(), random.getstate()
    # the check alone decides whether a buffer may move
    report = rdp.convert(model, example_inputs=tokens(), check=False)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    first, second = report.converted
    assert set(first.side_products) == {"inner.calls", "inner.features", "inner.last", "inner.mean"}
    assert "sets inner.calls, inner.features" in first.what
    assert "of its last run and the rows of that" in first.what
    assert not second.side_products
    again = rdp.convert(model, example_inputs=tokens())
    assert [row.side_products for row in again.already] == [first.side_products, ()]
    assert model.blocks[0].inner.calls == 0
    assert model.blocks[0].inner.features == []


def test_weights_that_are_made_for_each_call_are_no_side_product():
    model = nets.tokens_net(Holds(mlp()))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.blocks[0].fn)
    model.blocks[0].fn.weight = model.blocks[0].fn.weight.detach()  # otherwise it can't be copied
    (row,) = rdp.convert(model, example_inputs=tokens()).converted
    assert not row.side_products
