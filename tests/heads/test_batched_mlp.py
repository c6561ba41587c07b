import copy
import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from medembed.core.errors import TrainingDataError
from medembed.heads import batched_mlp as cohort_module
from medembed.heads import mlp as mlp_module
from medembed.heads import mlp_network
from medembed.heads.batched_mlp import BatchedMLP, Rows
from medembed.heads.mlp import MLPHead, gather
from medembed.heads.mlp_network import ACTIVATIONS, TENSORS, Masks, Net
from medembed.heads.scaling import Projection, Projector

TORCH_ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(n=150, d=6, seed=0, noise=1.0):
    generator = np.random.default_rng(seed)
    X = generator.normal(3, 2, size=(n, d)).astype(np.float32)
    signal = (X[:, :3] - 3).sum(axis=1) / 2
    return X, (signal + noise * generator.normal(size=n) > 0).astype(int)


X, Y = sample()
X_VAL, Y_VAL = sample(90, seed=1)


def mlp(hidden=(5,), **parameters):
    return MLPHead(
        hidden, **({"epochs": 6, "lr": 1e-2, "batch_size": 32, "patience": 99} | parameters)
    )


#: Every depth and activation, and two of each other parameter at least.
MIXED = [
    mlp(()),
    mlp((7,), activation="gelu", lr=3e-3, label_smoothing=0.2),
    mlp((7,), activation="silu", dropout=0.0, class_weight={0: 0.5, 1: 3.0}),
    mlp((4, 9), activation="tanh", weight_decay=0.5, scaling="global"),
    mlp((33, 2, 5), activation="relu", dropout=0.1, pca=3),
    mlp((8, 8), activation="gelu", dropout=0.5, pca=3, whiten=True, class_weight=None),
    mlp((3,), activation="tanh", scaling="none", patience=1, stopping="loss"),
    mlp((), pca=2, patience=None, epochs=4),
    mlp((40,), activation="relu", patience=2, lr=0.1),
    mlp((6, 6, 6), activation="silu", dropout=0.7, stopping="loss", epochs=3),
]


def together(heads, *, held=True, nets=None, X=X, y=Y, **of_all):
    """Return a cohort of copies of the heads, and the copies."""
    heads = [clone(head).set_params(**of_all) for head in heads]
    rows_held = Rows(X_VAL, None, Y_VAL) if held else None
    return gather(heads, Rows(X, None, y), rows_held, Projector(X), nets), heads


def trained(heads, until=99, **others):
    made, _ = together(heads, **others)
    made.train(until)
    return made


def assert_alike(one, other, atol=2e-5):
    """Compare two nets' whole state, to float tolerance."""
    assert (one.epoch, one.best_epoch) == (other.epoch, other.best_epoch)
    assert (one.best is None) == (other.best is None)
    for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=atol, rtol=1e-3)
    assert len(one.history) == len(other.history)
    for a, b in zip(one.history, other.history, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def assert_same_bytes(one, other):
    for name in ("epoch", "best_epoch", "best_key", "history", "failure"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.best is None) == (other.best is None)
    for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def tensors_of(net):
    return [tensor for name in TENSORS for tensor in getattr(net, name) or []]


# Company


def test_members_of_a_mixed_cohort_come_out_as_trained_alone():
    made, heads = together(MIXED)
    made.train(99)
    assert len({head.activation for head in heads}) == len(ACTIVATIONS)
    for head, net, projection in zip(heads, made.nets, made.projections, strict=True):
        alone = trained([head])
        assert_alike(net, alone.nets[0])
        head._check_training(X, Y)
        head.take(net, projection)
        fitted = clone(head).fit(X, Y, X_val=X_VAL, y_val=Y_VAL)
        assert head.best_epoch_ == fitted.best_epoch_
        np.testing.assert_allclose(
            head.predict_proba(X_VAL), fitted.predict_proba(X_VAL), atol=1e-5
        )


some_members = st.builds(
    mlp,
    st.lists(st.integers(1, 12), max_size=3).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dropout=st.sampled_from([0.0, 0.2, 0.5]),
    lr=st.sampled_from([1e-4, 1e-3, 1e-2]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    class_weight=st.sampled_from([None, "balanced", {0: 2.0, 1: 0.5}]),
    scaling=st.sampled_from(["standard", "global", "none"]),
    pca=st.sampled_from([0, 2, 9]),
    whiten=st.booleans(),
    epochs=st.integers(1, 3),
    patience=st.sampled_from([None, 1, 2]),
    stopping=st.sampled_from(["auroc", "loss"]),
)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(some_members, min_size=2, max_size=4), st.integers(3, 70), st.integers(1, 40))
def test_any_members_come_out_as_trained_alone(heads, n, batch_size):
    rows, y = X[:n], np.r_[0, 1, Y[2:n]]
    made = trained(heads, X=rows, y=y, batch_size=batch_size)
    for head, net in zip(heads, made.nets, strict=True):
        alone = trained([head], X=rows, y=y, batch_size=batch_size).nets[0]
        assert (net.epoch, net.failure) == (alone.epoch, None)
        for a, b in zip(net.params, alone.params, strict=True):
            # where a gradient is nearly nothing, AdamW makes a step of the rounding's sign
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-3)


def test_a_diverging_member_fails_alone():
    others = MIXED[1:4]
    for bad in (mlp((4, 4), lr=1e30), mlp((), lr=1e30, epochs=6)):
        with np.errstate(all="raise"):
            made = trained([others[0], bad, *others[1:]])
        assert "lower lr" in made.nets[1].failure
        assert made.nets[1].epoch < 6
        with pytest.raises(TrainingDataError, match="lower lr"):
            clone(bad).take(made.nets[1], made.projections[1])
        without = trained(others)
        for net, expected in zip([made.nets[0], *made.nets[2:]], without.nets, strict=True):
            assert net.failure is None
            assert_alike(net, expected)


def test_a_member_that_stops_early_stops_alone():
    # steps so small that the first epochs' AUROC is that of the start, or so large that it falls
    hasty = mlp((6,), lr=0.5, patience=1, epochs=30, dropout=0.0)
    patient = mlp((6,), lr=1e-3, patience=None, epochs=9)
    short = mlp((6,), lr=1e-3, patience=None, epochs=2)
    made = trained([hasty, patient, short])
    stopped = made.nets[0]
    assert stopped.epoch == stopped.best_epoch + 1 < 9
    assert [net.epoch for net in made.nets[1:]] == [9, 2]
    for head, net in zip((hasty, patient, short), made.nets, strict=True):
        assert_alike(net, trained([head]).nets[0])


def test_without_validation_rows_every_member_trains_its_epochs():
    made = trained(MIXED, held=False)
    assert [net.epoch for net in made.nets] == [head.epochs for head in MIXED]
    assert all(net.best is None and set(net.history[0]) == {"train_loss"} for net in made.nets)


def test_indices_choose_the_same_rows_as_copies_of_them():
    chosen = np.random.default_rng(3).permutation(len(X))[:77]
    chosen_held = np.arange(0, 90, 2)
    heads = [clone(head) for head in MIXED[:6]]
    by_index = gather(
        heads,
        Rows(X, chosen, Y[chosen]),
        Rows(X_VAL, chosen_held, Y_VAL[chosen_held]),
        Projector(X, chosen),
    )
    copied = gather(
        heads,
        Rows(X[chosen], None, Y[chosen]),
        Rows(X_VAL[chosen_held], None, Y_VAL[chosen_held]),
        Projector(X[chosen]),
    )
    for made in (by_index, copied):
        made.train(3)
    for one, other in zip(by_index.nets, copied.nets, strict=True):
        assert_same_bytes(one, other)


@pytest.mark.parametrize("index", [None, np.random.default_rng(4).permutation(150)[:101]])
def test_tables_too_large_to_be_kept_give_the_same(index, monkeypatch):
    y = Y if index is None else Y[index]

    def train():
        made = gather(
            [clone(head) for head in MIXED],
            Rows(X, index, y),
            Rows(X_VAL, None, Y_VAL),
            Projector(X, index),
        )
        made.train(3)
        return made

    kept = train()
    monkeypatch.setattr(cohort_module, "_KEPT_BYTES", 0)
    anew = train()
    assert all(columns._kept is None for columns in anew._columns.values())
    assert all(columns._kept is not None for columns in kept._columns.values())
    for head, one, other in zip(MIXED, kept.nets, anew.nets, strict=True):
        if head.pca:
            assert_alike(one, other)
        else:
            assert_same_bytes(one, other)


def test_heads_that_cannot_share_a_cohort_are_told_why():
    for name, values in {
        "random_state": (0, 1),
        "batch_size": (None, 32),
        "precision": ("fp32", "bf16"),
    }.items():
        heads = [mlp(**{name: value}) for value in values]
        with pytest.raises(
            TrainingDataError, match=f"{name} is {values[0]} and {values[1]} in one cohort"
        ):
            gather(heads, Rows(X, None, Y), None, Projector(X))


# Arithmetic


def layers_for_autograd(net, n_columns):
    return [
        (torch.tensor(w, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        for w, b in net.layers(n_columns)
    ]


def plain_logits(layers, values, activation, keeps=None, keep=1.0):
    """Return logits (m,); `keeps` are 0 or 1 of shape (m, width) per hidden layer."""
    for k, (weight, bias) in enumerate(layers):
        values = values @ weight + bias
        if k < len(layers) - 1:
            values = TORCH_ACTIVATIONS[activation](values)
            if keeps is not None:
                values = values * keeps[k] / keep
    return values[:, 0]


def plain_loss(logits, y, member, reduction="mean"):
    targets = y * (1 - member.label_smoothing) + member.label_smoothing / 2
    weights = torch.where(y == 1, member.class_weights[1], member.class_weights[0])
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, weights, reduction=reduction
    )


def gradients_of_first_step(member, monkeypatch, bf16=False):
    """Return the net, what its first step hands to AdamW, and its loss; nothing is updated."""
    made = BatchedMLP(
        [member],
        Rows(X, None, Y),
        {member.kind: Projector(X).learn(*member.kind[:2], whiten=member.kind[2])},
        seed=5,
        batch_size=len(X),
        bf16=bf16,
    )
    handed = []
    monkeypatch.setattr(
        mlp_network,
        "_take_step",
        lambda member, net, gradients: handed.extend(g.clone() for g in gradients),
    )
    made.train(1)
    return made, handed


def expected_gradients(made, member, dtype=torch.float32):
    projection = made.projections[0]
    order = np.random.default_rng([5, cohort_module._EPOCHS, 1]).permutation(len(X))
    values = torch.from_numpy(projection.apply(X[order], np.float64))
    y = torch.from_numpy(Y[order].astype(np.float64))
    layers = layers_for_autograd(made.nets[0], projection.n_columns)
    dropped = round(member.dropout * 256)
    masks = Masks((5, cohort_module._DROPOUT, 1, 0), len(X), dtype)
    masks.reserve(dict(enumerate(member.hidden)))
    keeps = [(masks.of(k, width, dropped) != 0).T.double() for k, width in enumerate(member.hidden)]
    for pair in layers:
        for tensor in pair:
            tensor.requires_grad_()
    logits = plain_logits(layers, values, member.activation, keeps, 1 - dropped / 256)
    loss = plain_loss(logits, y, member)
    loss.backward()
    first, *rest = [(weight.grad.T, bias.grad) for weight, bias in layers]
    padding = torch.zeros(len(first[0]), made.nets[0].params[0].shape[1] - projection.n_columns - 1)
    joint = torch.cat([first[0], first[1][:, None], padding], dim=1)
    return [joint, *(tensor for pair in rest for tensor in pair)], float(loss.detach())


def as_member(hidden, activation, **others):
    head = mlp(hidden, activation=activation, class_weight={0: 0.7, 1: 1.9}, **others)
    return head.as_member(Y)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5), (40, 3, 6)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_pass_is_that_of_autograd(activation, hidden, dropout, monkeypatch):
    member = as_member(hidden, activation, dropout=dropout, label_smoothing=0.1)
    made, found = gradients_of_first_step(member, monkeypatch)
    expected, loss = expected_gradients(made, member)
    assert len(found) == len(expected) == 1 + 2 * len(hidden)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 1e-4
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6, rtol=1e-4)
    assert made.nets[0].history[0]["train_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_backward_pass_in_bfloat16_points_where_autograd_does(activation, monkeypatch):
    member = as_member((30, 9), activation, dropout=0.4)
    made, found = gradients_of_first_step(member, monkeypatch, bf16=True)
    expected, loss = expected_gradients(made, member, torch.bfloat16)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.05
    assert made.nets[0].history[0]["train_loss"] == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("hidden", [(), (9,), (9, 4)])
def test_full_batches_train_as_torchs_own_adamw_and_average(hidden):
    head = mlp(hidden, dropout=0.0, activation="silu", weight_decay=0.3, batch_size=len(X))
    member = head.as_member(Y)
    made, _ = together([head], held=False)
    n_columns = made.projections[0].n_columns
    parameters = [
        tensor.float().requires_grad_()
        for pair in layers_for_autograd(made.nets[0], n_columns)
        for tensor in pair
    ]
    made.train(5)
    values = torch.from_numpy(made.projections[0].apply(X, np.float32))
    y = torch.from_numpy(Y.astype(np.float32))
    optimizer = torch.optim.AdamW(parameters, lr=member.lr, weight_decay=member.weight_decay)
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    averages = AveragedModel(
        torch.nn.ParameterList(parameters),
        avg_fn=lambda average, latest, n: average + (latest - average) * 9 / (n + 9),
    )
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = plain_loss(plain_logits(layers, values, "silu"), y, member)
        loss.backward()
        optimizer.step()
        averages.update_parameters(torch.nn.ParameterList(parameters))
        losses.append(float(loss.detach()))
    found = [array for pair in made.nets[0].layers(n_columns) for array in pair]
    for a, b in zip(found, averages.module, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)
    assert [epoch["train_loss"] for epoch in made.nets[0].history] == pytest.approx(losses)


def test_padding_fills_32_columns_and_stays_zero():
    made = trained(MIXED)
    for net, projection in zip(made.nets, made.projections, strict=True):
        first = net.params[0]
        assert first.shape[1] == 32
        assert not first[:, projection.n_columns + 1 :].any()
        assert first[:, : projection.n_columns + 1].all()
    for n_columns, padded in ((31, 32), (32, 64)):  # beside the column of ones
        wide = np.random.default_rng(0).normal(size=(60, n_columns)).astype(np.float32)
        made, _ = together([mlp((3,))], held=False, X=wide, y=Y[:60])
        made.train(1)
        assert made.nets[0].params[0].shape == (3, padded)


@pytest.mark.parametrize("held", [False, True])
def test_flop_of_a_one_layer_member_is_what_arithmetic_says(held):
    made = trained([mlp((5,), dropout=0.0, epochs=2)], held=held)
    width, columns = 5, 32  # six of data, one of ones, and padding
    forward = 2 * width * columns + 2 * width
    # the gradients of both weights, and of what the second is multiplied with
    step = forward + 2 * width * columns + 2 * width + 2 * width
    n_rows = 5 * 32  # whole batches, of at least the 150 rows
    assert made.flop == 2 * (step * n_rows + held * forward * len(X_VAL))


def test_flop_is_what_torchs_own_counter_counts():
    made, _ = together(MIXED[:7])
    with FlopCounterMode(display=False) as counter:
        made.train(2)
    assert made.flop == counter.get_total_flops()


# Going on


def numpy_copy(net):
    """Return a net of fresh tensors that went through numpy."""
    fields = {field.name: getattr(net, field.name) for field in dataclasses.fields(Net)}
    for name in TENSORS:
        if fields[name] is not None:
            fields[name] = [torch.from_numpy(tensor.numpy().copy()) for tensor in fields[name]]
    return Net(**fields | {"history": [dict(epoch) for epoch in net.history]})


GOING_ON = [
    mlp(()),
    mlp((7,), activation="gelu", patience=2, lr=0.1),
    mlp((5, 9), activation="tanh", pca=3, dropout=0.5),
    mlp((6,), activation="silu", patience=None, epochs=5),
    mlp((8,), activation="relu", patience=None, epochs=2),
]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("carry", [lambda net: net, numpy_copy, copy.deepcopy])
def test_going_on_gives_the_bytes_of_training_straight_on(carry, bf16):
    precision = "bf16" if bf16 else "fp32"
    straight = trained(GOING_ON, 6, precision=precision)
    begun = trained(GOING_ON, 3, precision=precision)
    assert [net.epoch for net in begun.nets] == [3, 3, 3, 3, 2]
    went_on = trained(GOING_ON, 6, precision=precision, nets=[carry(net) for net in begun.nets])
    assert [net.epoch for net in straight.nets[2:]] == [6, 5, 2]
    for one, other in zip(went_on.nets, straight.nets, strict=True):
        assert_same_bytes(one, other)


@pytest.mark.parametrize("carry", [numpy_copy, copy.deepcopy])
def test_copies_that_go_on_leave_the_nets_they_were_made_of(carry):
    begun = trained(GOING_ON, 3)
    before = [[tensor.clone() for tensor in tensors_of(net)] for net in begun.nets]
    trained(GOING_ON, 6, nets=[carry(net) for net in begun.nets])
    assert max(net.epoch for net in begun.nets) == 3
    for net, kept in zip(begun.nets, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(net), kept, strict=True))


def test_survivors_keep_their_numbers_where_others_are_dropped():
    straight = trained(GOING_ON, 6)
    begun = trained(GOING_ON, 3)
    chosen = [3, 0, 2]
    survivors = trained(
        [GOING_ON[i] for i in chosen], 6, nets=[numpy_copy(begun.nets[i]) for i in chosen]
    )
    for i, net in zip(chosen, survivors.nets, strict=True):
        assert_alike(net, straight.nets[i])


def test_members_at_different_epochs_catch_up():
    heads = [GOING_ON[i] for i in (0, 2, 3)]
    straight = trained(heads, 4)
    ahead, behind = trained(heads, 3), trained(heads, 1)
    mixed = trained(heads, 4, nets=[behind.nets[0], ahead.nets[1], behind.nets[2]])
    assert [net.epoch for net in mixed.nets] == [4, 4, 4]
    for one, other in zip(mixed.nets, straight.nets, strict=True):
        assert_alike(one, other)


def test_training_to_where_one_is_changes_nothing():
    made = trained(GOING_ON, 3)
    before, flop = [numpy_copy(net) for net in made.nets], made.flop
    made.train(3)
    made.train(1)
    assert made.flop == flop
    for one, other in zip(made.nets, before, strict=True):
        assert_same_bytes(one, other)


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_has_the_same_random_bytes_whatever_the_width(dtype):
    def drawn(widths):
        masks = Masks((1, 2, 3, 4), 37, dtype)
        masks.reserve(widths)
        return masks

    narrow, wide = drawn({0: 5}), drawn({0: 301, 1: 9, 2: 1})
    for dropped in (1, 77, 200):
        assert torch.equal(narrow.of(0, 5, dropped), wide.of(0, 5, dropped))
        assert torch.equal(narrow.of(0, 3, dropped), wide.of(0, 301, dropped)[:3])
    assert not torch.equal(wide.of(0, 9, 77), wide.of(1, 9, 77))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [1, 26, 77, 128, 230, 255])
def test_the_share_dropped_is_what_was_asked(dropped, dtype):
    masks = Masks((1, 2, 3, 4), 500, dtype)
    masks.reserve({0: 400})
    mask = masks.of(0, 400, dropped)
    assert set(mask.unique().tolist()) <= {0, -1}
    share = dropped / 256
    deviation = np.sqrt(share * (1 - share) / mask.numel())
    assert float((mask == 0).double().mean()) == pytest.approx(share, abs=5 * deviation)


def test_dropout_counts_to_the_nearest_256th():
    asked, nearest, next_one = (
        trained([mlp((9,), dropout=dropout)], 2).nets[0] for dropout in (0.3, 77 / 256, 78 / 256)
    )
    assert_same_bytes(asked, nearest)
    assert not torch.equal(asked.params[0], next_one.params[0])
    nothing, next_to_nothing = (
        trained([mlp((9,), dropout=dropout)], 2).nets[0] for dropout in (0.0, 0.0019)
    )
    assert_same_bytes(nothing, next_to_nothing)


def test_every_dropout_below_one_trains():
    for dropout in (0.99, 0.997, 0.999):
        head = mlp((64,), dropout=dropout, epochs=2).fit(X, Y)
        assert np.isfinite(head.predict_proba(X)).all(), dropout


def test_steps_epochs_and_layers_drop_other_units():
    seen = []
    for stream in ((0, 1, 1, 0), (0, 1, 1, 1), (0, 1, 2, 0), (1, 1, 1, 0)):
        masks = Masks(stream, 64, torch.float32)
        masks.reserve({0: 8, 1: 8})
        seen += [masks.of(layer, 8, 128) for layer in (0, 1)]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert 0.3 < float((one == other).double().mean()) < 0.7


def test_every_step_of_every_epoch_has_a_stream_of_its_own(monkeypatch):
    streams = []

    class Listed(Masks):
        def __init__(self, stream, *others):
            streams.append(stream)
            super().__init__(stream, *others)

    monkeypatch.setattr(cohort_module, "Masks", Listed)
    begun = trained(GOING_ON, 2, held=False)
    trained(GOING_ON, 4, held=False, nets=begun.nets)
    steps = -(-len(X) // 32)
    assert len(streams) == len(set(streams)) == 4 * steps
    again, streams[:] = list(streams), []
    trained(GOING_ON, 4, held=False)
    assert streams == again


@pytest.mark.parametrize(
    ("batch_size", "shape"), [(3, (20, 3)), (40, (1, 40)), (150, (1, 150)), (1000, (1, 150))]
)
def test_epochs_take_whole_batches_of_pass_after_pass(batch_size, shape, monkeypatch):
    monkeypatch.setattr(cohort_module, "EPOCH_ROWS", 60)
    made = together([mlp((3,), batch_size=batch_size)], held=False)[0]
    epochs = [made._order(epoch) for epoch in range(1, 16)]
    assert {epoch.shape for epoch in epochs} == {shape}
    passes = np.concatenate(epochs).ravel()[: 3 * 150].reshape(-1, 150)
    assert [sorted(rows) for rows in passes] == len(passes) * [list(range(150))]
    assert len(set(map(tuple, passes))) == len(passes) > 1


def test_a_small_tables_epoch_is_a_pass_to_whole_batches():
    made = together([mlp((3,), batch_size=40)], held=False)[0]
    assert made._order(1).shape == (4, 40)


@pytest.mark.parametrize(("n", "batch"), [(20, 20), (300, 32), (945, 64), (3000, 192), (9999, 256)])
def test_batches_are_a_sixteenth_of_the_rows_within_limits(n, batch):
    X, y = sample(n)
    made = together([MLPHead((2,))], held=False, X=X, y=y)[0]
    assert made._order(1).shape[1] == batch


def test_fewer_rows_than_columns_train_on_as_many_columns_as_there_are_rows():
    wide = np.hstack([X, np.random.default_rng(3).normal(size=(len(X), 300))]).astype(np.float32)
    wide_val = np.hstack([X_VAL, np.ones((len(X_VAL), 300))]).astype(np.float32)
    head = mlp((5,), n_covariates=2)
    cohort = gather(
        [head],
        Rows(wide, None, Y),
        Rows(wide_val, None, Y_VAL),
        Projector(wide, n_covariates=2),
    )
    assert cohort.nets[0].params[0].shape[1] == 160, "150 rows, 2 covariates, the bias, padding"
    cohort.train(3)
    head.classes_, head.n_features_in_ = np.array([0, 1]), wide.shape[1]
    head.take(cohort.nets[0], cohort.projections[0])
    assert (head.weights_[0].shape, head.projection_.components) == ((306, 5), None)
    np.testing.assert_allclose(
        head.predict_logit(wide_val), cohort.nets[0].best_logits, rtol=1e-3, atol=1e-4
    )


# The start


def test_the_start_is_uniform_and_that_of_equal_shapes_is_equal():
    made, _ = together([mlp((400, 50)), mlp((400, 50), lr=1.0), mlp((30,))], held=False)
    first, second, narrow = made.nets
    for a, b in zip(first.params, second.params, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.params[0][:30], narrow.params[0])
    n_columns = X.shape[1]
    for (weight, bias), before in zip(first.layers(n_columns), (6, 400, 50), strict=True):
        bound = 1 / np.sqrt(before)
        assert max(np.abs(weight).max(), np.abs(bias).max()) <= bound
        assert np.abs(weight).max() > 0.9 * bound
        spread = bound / np.sqrt(3)  # of a uniform draw
        assert weight.std() == pytest.approx(spread, rel=5 / np.sqrt(weight.size))


def test_another_seed_gives_another_start_order_and_dropout():
    one, other = (trained([mlp((9,), random_state=seed)], 1).nets[0] for seed in (0, 1))
    assert not torch.equal(one.params[0], other.params[0])


# The best epoch


def better(epoch, stopping):
    return (epoch["auroc"], -epoch["loss"]) if stopping == "auroc" else (-epoch["loss"],)


@pytest.mark.parametrize("stopping", ["auroc", "loss"])
def test_the_best_epoch_is_the_argmax_of_the_validation_score(stopping):
    generator = np.random.default_rng(0)
    noisy = generator.integers(0, 2, len(Y_VAL))
    heads = [mlp((h,), lr=lr, stopping=stopping, epochs=9) for h in (3, 20) for lr in (0.003, 0.1)]
    made = gather(heads, Rows(X, None, Y), Rows(X_VAL, None, noisy), Projector(X))
    made.train(9)
    best = [net.best_epoch for net in made.nets]
    assert len(set(best)) > 1
    for head, net, projection in zip(heads, made.nets, made.projections, strict=True):
        keys = [better(epoch, stopping) for epoch in net.history]
        assert net.best_epoch == 1 + max(range(9), key=keys.__getitem__)
        head._check_training(X, Y)
        head.take(net, projection)
        expected = net.history[net.best_epoch - 1]["auroc"]
        assert roc_auc_score(noisy, head.predict_proba(X_VAL)[:, 1]) == pytest.approx(
            expected, abs=1e-3
        )


@pytest.mark.parametrize("stopping", ["auroc", "loss"])
def test_of_equal_epochs_the_first_is_the_best(stopping):
    still = mlp((4,), lr=1e-30, weight_decay=0.0, patience=2, stopping=stopping)
    net = trained([still]).nets[0]
    assert net.history[0]["loss"] == net.history[-1]["loss"]
    assert (net.best_epoch, net.epoch) == (1, 3)


def test_validation_loss_is_weighted_and_unsmoothed():
    head = mlp((4,), class_weight={0: 0.5, 1: 3.0}, label_smoothing=0.3, epochs=1)
    made = trained([head])
    layers = layers_for_autograd(made.nets[0], X.shape[1])
    values = torch.from_numpy(made.projections[0].apply(X_VAL, np.float64))
    member = dataclasses.replace(head.as_member(Y), label_smoothing=0.0)
    logits = plain_logits(layers, values, head.activation)
    expected = float(plain_loss(logits, torch.from_numpy(Y_VAL.astype(float)), member))
    assert made.nets[0].history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda y: len(set(y)) == 2),
    st.integers(0, 9),
    st.integers(1, 6),
)
def test_auroc_is_scikit_learns_with_ties_at_one_half(y, seed, n_values):
    y = np.array(y, np.float32)
    scores = np.random.default_rng(seed).integers(0, n_values, (3, len(y))).astype(np.float32)
    found = cohort_module._aurocs(y, scores)
    expected = [roc_auc_score(y, row) for row in scores]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_auroc_stays_exact_where_ranks_pass_float32():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 30_001).astype(np.float32)
    scores = generator.normal(size=(1, len(y))).astype(np.float32)
    found = cohort_module._aurocs(y, scores)[0]
    assert found == pytest.approx(roc_auc_score(y, scores[0]), abs=1e-12)


def test_scores_that_are_no_numbers_leave_the_others_alone():
    y = np.array([0, 1, 0, 1], np.float32)
    scores = np.array([[0, 1, 2, 3], [np.nan, 1, 2, 3], [0, 1, 0, np.inf]], np.float32)
    found = cohort_module._aurocs(y, scores)
    assert (found[0], found[2]) == (0.75, 1.0)


# bfloat16


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bfloat16_stays_near_float32(activation):
    head = mlp((16, 8), activation=activation, dropout=0.2, epochs=8)
    fine, coarse = (
        clone(head).set_params(precision=precision).fit(X, Y, X_val=X_VAL, y_val=Y_VAL)
        for precision in ("fp32", "bf16")
    )
    aurocs = [roc_auc_score(Y_VAL, one.predict_proba(X_VAL)[:, 1]) for one in (fine, coarse)]
    assert min(aurocs) > 0.85
    assert aurocs[0] == pytest.approx(aurocs[1], abs=0.02)
    assert not np.array_equal(fine.weights_[0], coarse.weights_[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bytes(precision):
    first, second = (trained(MIXED, 3, precision=precision) for _ in "ab")
    for one, other in zip(first.nets, second.nets, strict=True):
        assert_same_bytes(one, other)


def test_members_in_bfloat16_are_near_those_trained_alone():
    heads = MIXED[:6]
    for head, net in zip(heads, trained(heads, 3, precision="bf16").nets, strict=True):
        alone = trained([head], 3, precision="bf16").nets[0]
        for a, b in zip(net.params, alone.params, strict=True):
            assert float((a - b).norm() / b.norm()) < 0.02


def test_auto_is_bfloat16_only_where_the_processor_says_so(monkeypatch):
    for flags, expected in (
        (set(), "fp32"),
        ({"avx2", "avx512f"}, "fp32"),
        ({"avx512f", "avx512_bf16"}, "bf16"),
        ({"amx_bf16"}, "bf16"),
    ):
        monkeypatch.setattr(mlp_module, "processor_flags", lambda flags=flags: flags)
        assert mlp_module.resolve_precision("auto") == expected
    assert mlp_module.resolve_precision("bf16") == "bf16"


# Shapes that leave little


@pytest.mark.parametrize("batch_size", [1, 149, 150, 1000])
def test_batches_of_one_row_or_of_all_are_trained(batch_size):
    made = trained(MIXED[1:4], 1, batch_size=batch_size)
    assert all(net.failure is None and net.epoch == 1 for net in made.nets)


def test_rows_in_float64_train_as_in_float32():
    fine = X.astype(np.float64)
    for head in MIXED[:5]:
        one, other = (clone(head).fit(rows, Y).predict_proba(rows) for rows in (X, fine))
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_layers_are_weights_before_by_after_and_biases():
    member = as_member((5, 3), "relu")
    made = BatchedMLP(
        [member],
        Rows(X, None, Y),
        {member.kind: Projection(np.zeros(6), np.ones(6))},
        seed=0,
        batch_size=32,
        bf16=False,
    )
    shapes = [(w.shape, b.shape) for w, b in made.nets[0].layers(6)]
    assert shapes == [((a, b), (b,)) for a, b in pairwise([6, 5, 3, 1])]
