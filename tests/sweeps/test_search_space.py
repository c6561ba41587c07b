import json
import math
import tomllib
from importlib import resources

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medembed.core.errors import PathNotFoundError, TrainingDataError
from medembed.heads.registry import HEADS, head_class, make_head
from medembed.sweeps.search_space import HeadSpace, Range, default_spaces, read_spaces

#: Every head at its defaults, so that a file need not fall back on the shipped one.
BARE = {name: f"[{name}]\nconfigs = 1\n" for name in HEADS}

SET_BY_SWEEP = ("n_cells", "n_covariates", "n_jobs", "random_state")


@pytest.fixture
def read(tmp_path):
    """Write a table under the head's name and return the head's space."""

    def read_table(head, lines):
        path = tmp_path / "space.toml"
        others = "".join(table for name, table in BARE.items() if name != head)
        path.write_text(f"[{head}]\n{lines}\n{others}", encoding="utf-8")
        return read_spaces(path)[head]

    return read_table


def differ(head, configs):
    """Whether no two sets of parameters make equal heads."""
    params = [make_head(head, config).get_params() for config in configs]
    return all(a != b for i, a in enumerate(params) for b in params[:i])


# the shipped file


def test_the_shipped_file_is_valid_and_names_every_head():
    text = (resources.files("medembed.sweeps") / "default_space.toml").read_text(encoding="utf-8")
    assert set(tomllib.loads(text)) == set(HEADS)
    assert set(default_spaces()) == set(HEADS)


@pytest.mark.parametrize("name", sorted(own for own in HEADS if not head_class(own).reads_words))
def test_a_default_space_begins_with_the_default_and_grows_without_changing(name):
    space = default_spaces()[name]
    long, short = space.draw(6, seed=3), space.draw(3, seed=3)
    assert long[:3] == short
    assert len(long) == 6
    assert differ(name, long)
    default, first = make_head(name, {}).get_params(), make_head(name, long[0]).get_params()
    assert first == default | space.constants
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 20)).astype(np.float32)
    y = (X[:, 0] + generator.normal(size=60) > 0).astype(int)
    for params in space.draw(4):
        fast = {"mlp": {"epochs": 1}, "attention": {"epochs": 1}, "lightgbm": {"n_trees": 2}}
        make_head(name, params | fast.get(name, {})).fit(X, y)


def test_heads_that_a_file_leaves_out_are_as_by_default(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text("[logistic]\nconfigs = 2\nC = [3.0, 4.0]\n")
    spaces, default = read_spaces(path), default_spaces()
    assert set(spaces) == set(HEADS)
    assert spaces["logistic"].draw() == [{"C": 3.0}, {"C": 4.0}]
    assert all(spaces[name] == default[name] for name in HEADS if name != "logistic")


# reading


def test_a_table_says_constants_choices_ranges_rungs_and_what_comes_first(read):
    space = read(
        "mlp",
        """
        configs = 3
        rungs = [1, 3]
        hidden = [[], [8], [8, 4]]
        dropout = [0.0, 0.5]
        lr = { low = 1e-4, high = 1e-2, log = true }
        epochs = { low = 5, high = 9 }
        stopping = "loss"
        batch_size = 64
        [[mlp.first]]
        [[mlp.first]]
        hidden = [16]
        stopping = "auroc"
        """,
    )
    constants = {"stopping": "loss", "batch_size": 64}
    assert space == HeadSpace(
        head="mlp",
        n_configs=3,
        rungs=(1, 3),
        constants=constants,
        varying={
            "hidden": ([], [8], [8, 4]),
            "dropout": (0.0, 0.5),
            "lr": Range(1e-4, 1e-2, log=True),
            "epochs": Range(5, 9),
        },
        first=({}, {"hidden": [16], "stopping": "auroc"}),
    )
    assert list(space.constants) == ["stopping", "batch_size"]  # as the file has them
    assert space.draw()[:2] == [constants, {"hidden": [16], "stopping": "auroc", "batch_size": 64}]
    assert set(space.draw()[2]) == {*constants, "hidden", "dropout", "lr", "epochs"}


@pytest.mark.parametrize("value", ["[256]", "[]", "[256, 128]", "[[256]]"])
def test_a_flat_list_of_widths_is_one_constant(read, value):
    hidden = tomllib.loads(f"v = {value}")["v"]
    expected = hidden[0] if hidden == [[256]] else hidden
    assert read("mlp", f"configs = 5\nhidden = {value}").draw() == [{"hidden": expected}]


def test_a_flat_list_is_choices_where_the_default_is_a_number(read):
    assert read("lightgbm", "num_leaves = [4, 8]").draw() == [{"num_leaves": 4}, {"num_leaves": 8}]
    assert read("attention", "hidden = [4, 8]").draw() == [{"hidden": 4}, {"hidden": 8}]


def test_the_text_none_is_no_class_weight_and_elsewhere_a_text(read):
    space = read("logistic", 'class_weight = ["none", "balanced"]')
    assert space.draw() == [{"class_weight": None}, {"class_weight": "balanced"}]
    assert read("attention", 'scaling = "none"').draw() == [{"scaling": "none"}]


def test_a_table_without_configs_or_rungs_has_eight_and_none(read):
    space = read("mlp", "lr = { low = 1e-4, high = 1e-2 }")
    assert (space.n_configs, space.rungs, len(space.draw())) == (8, (), 8)


def test_a_range_of_one_number_is_a_constant(read):
    assert read("mlp", "batch_size = { low = 64, high = 64 }").draw() == [{"batch_size": 64}]


def test_whole_numbers_serve_where_the_default_is_a_fraction(read):
    assert read("logistic", "C = [1, 0.5]").draw() == [{"C": 1}, {"C": 0.5}]
    lr = [config["lr"] for config in read("mlp", "lr = { low = 1, high = 2.0 }").draw()]
    assert len(lr) == 8
    lines = "C = [1, 0.5]\n[[logistic.first]]\nC = 1.0"
    assert read("logistic", lines).draw() == [{"C": 1.0}, {"C": 0.5}]


def test_parameters_that_are_none_by_default_take_numbers(read):
    lines = "feature_fraction = [0.1, 1]\nmin_data_in_leaf = 5"
    assert [config["feature_fraction"] for config in read("lightgbm", lines).draw()] == [0.1, 1]


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text("".join(BARE.values()), encoding="utf-8-sig")
    assert set(read_spaces(path)) == set(HEADS)


# drawing

BOUNDS = st.one_of(
    st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)),
    st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)),
    st.tuples(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12)),
)


@settings(deadline=None, max_examples=200)
@given(bounds=BOUNDS, log=st.booleans(), seed=st.integers(0, 2**32))
def test_a_range_holds_what_it_draws_and_rounds_it_for_tables(bounds, log, seed):
    low, high = sorted(bounds)
    assume(low > 0 or not log)
    drawn = Range(low, high, log)
    for attempt in range(10):
        value = drawn.draw(np.random.default_rng([seed, attempt]))
        assert low <= value <= high
        assert type(value) is type(low)
        assert isinstance(value, int) or value in (low, high) or value == float(f"{value:.3g}")


def test_a_uniform_range_has_its_mean_in_the_middle_and_a_log_range_its_geometric_mean():
    generator = np.random.default_rng(0)
    flat = [Range(1.0, 100.0).draw(generator) for _ in range(4000)]
    log = [Range(1.0, 100.0, log=True).draw(generator) for _ in range(4000)]
    assert np.mean(flat) == pytest.approx(50.5, rel=0.05)
    assert np.mean(np.log10(log)) == pytest.approx(1.0, rel=0.05)


def test_each_whole_number_of_a_range_is_as_likely_as_the_next():
    generator = np.random.default_rng(0)
    values = [Range(-1, 2).draw(generator) for _ in range(4000)]
    assert np.unique(values).tolist() == [-1, 0, 1, 2]
    assert np.bincount(np.add(values, 1)) == pytest.approx(1000, rel=0.1)


def test_choices_are_equally_likely(read):
    lines = "configs = 4000\ndropout = [0.0, 0.1, 0.3, 0.5]\nlr = { low = 1e-6, high = 1.0 }"
    _, counts = np.unique([c["dropout"] for c in read("mlp", lines).draw()], return_counts=True)
    assert counts == pytest.approx(1000, rel=0.1)


@st.composite
def spaces(draw):
    varying = {}
    if draw(st.booleans()):
        widths = st.lists(st.integers(1, 512), max_size=3)
        choices = draw(st.lists(widths, min_size=2, max_size=4, unique_by=tuple))
        varying["hidden"] = tuple(choices)
    if draw(st.booleans()):
        varying["dropout"] = (0.0, 0.3, 0.5)
    if draw(st.booleans()):
        low = draw(st.integers(1, 100))
        varying["epochs"] = Range(low, low + draw(st.integers(1, 5)))
    if draw(st.booleans()):
        varying["lr"] = Range(1e-4, 1e-2, log=draw(st.booleans()))
    firsts = st.sampled_from([{}, {"hidden": [256]}, {"dropout": 0.3}, {"lr": 1e-3, "epochs": 3}])
    return HeadSpace(
        head="mlp",
        n_configs=draw(st.integers(1, 30)),
        constants=draw(st.sampled_from([{}, {"batch_size": 64, "class_weight": None}])),
        varying=varying,
        first=tuple(draw(st.lists(firsts, max_size=3))),
    )


def number_of(values):
    if isinstance(values, tuple):
        return len(values)
    return values.high - values.low + 1 if isinstance(values.low, int) else math.inf


@settings(deadline=None, max_examples=80)
@given(space=spaces(), seed=st.integers(0, 2**32), shorter=st.integers(1, 30))
def test_draws_differ_stay_in_their_space_and_begin_with_the_shorter_list(space, seed, shorter):
    configs = space.draw(seed=seed)
    assert configs == space.draw(seed=seed)
    n = min(shorter, space.n_configs)
    assert space.draw(n, seed) == configs[:n]
    assert differ("mlp", configs)
    size = math.prod(map(number_of, space.varying.values()))
    assert min(space.n_configs, size) <= len(configs) <= min(space.n_configs, size + 3)
    assert json.loads(json.dumps(configs, allow_nan=False)) == configs
    firsts = [{**space.constants, **params} for params in space.first]
    for config in configs:
        assert space.constants.items() <= config.items()
        if config in firsts:
            continue
        assert set(config) == {*space.constants, *space.varying}
        for name, values in space.varying.items():
            if isinstance(values, tuple):
                assert config[name] in values
            else:
                assert values.low <= config[name] <= values.high


def test_another_seed_draws_others(read):
    space = read("mlp", "lr = { low = 1e-4, high = 1e-2, log = true }")
    assert not [config for config in space.draw(seed=1) if config in space.draw(seed=2)]


def test_the_order_of_lines_does_not_matter(read):
    lines = ["dropout = [0.0, 0.1, 0.3]", "lr = { low = 1e-4, high = 1e-2 }"]
    assert read("mlp", "\n".join(lines)).draw() == read("mlp", "\n".join(lines[::-1])).draw()


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        ("dropout = [0.0, 0.1, 0.3]\nhidden = [[], [4], [4, 4], [8]]", 12),
        ("dropout = [0.0, 0.1, 0.3]\nepochs = { low = 1, high = 20, log = true }", 60),
        ("epochs = { low = 10, high = 900 }", 891),
        ("dropout = 0.1", 1),
        ("", 1),
    ],
)
def test_a_finite_space_is_given_to_its_last_and_no_further(read, lines, size):
    configs = read("mlp", lines).draw(1000)
    assert len(configs) == size
    assert differ("mlp", configs)


def test_a_range_too_narrow_for_three_digits_ends_early(read):
    configs = read("mlp", "lr = { low = 0.10001, high = 0.10002 }").draw()
    assert configs == [{"lr": 0.10001}]


def test_one_list_is_tried_in_its_order_after_what_comes_first(read):
    lines = "C = [3.0, 0.01, 0.5, 1]\n[[logistic.first]]\n[[logistic.first]]\nC = 0.5"
    # the empty table is the head at its default, C = 0.01
    expected = [{}, {"C": 0.5}, {"C": 3.0}, {"C": 1}]
    assert read("logistic", lines).draw(seed=5) == expected
    assert read("logistic", lines).draw(3, seed=6) == expected[:3]


def test_what_is_drawn_is_the_callers_own(read):
    space = read("mlp", "hidden = [[4], [8]]\n[[mlp.first]]\nhidden = [2]")
    for config in space.draw():
        config["hidden"].append(1)
    assert space.draw() == [{"hidden": [2]}, {"hidden": [4]}, {"hidden": [8]}]


@pytest.mark.parametrize("n", [0, -3])
def test_a_draw_of_nothing_is_refused(read, n):
    with pytest.raises(TrainingDataError, match=f"{n} configurations of mlp asked for; ask for 1"):
        read("mlp", "").draw(n)


# refusals

REFUSALS = {
    "configs = 0": "configs must be at least 1, not 0",
    "configs = true": "configs must be a whole number, not True",
    "configs = 2.0": "configs must be a whole number, not 2.0",
    "rungs = 2": "rungs must be a list, not 2",
    "rungs = [2, 2]": "rungs must be rising, such as [2, 4, 8], not [2, 2]",
    "rungs = [0, 2]": "rungs[0] must be at least 1, not 0",
    "rungs = [2, 4.0]": "rungs[1] must be a whole number, not 4.0",
    "droput = 0.1": "unknown key 'droput'; did you mean 'dropout'?",
    "config = 8": "unknown key 'config'; did you mean 'configs'?",
    "dropout = []": "dropout must be a list of length at least 1, not []",
    "dropout = [0.1, 0.3, 0.1]": "dropout lists 0.1 twice",
    'dropout = "0.1"': "dropout must be a number, not '0.1'",
    "dropout = [0.1, true]": "dropout[1] must be a number, not True",
    "epochs = 2.5": "epochs must be a whole number, not 2.5",
    "epochs = { low = 1, high = 2.5 }": "epochs.high must be a whole number, not 2.5",
    "epochs = true": "epochs must be a whole number, not True",
    f"epochs = {10**400}": "epochs is too large to be exact: stay within 9007199254740992",
    f"lr = {10**400}": "lr is too large to be exact: stay within 9007199254740992",
    "stopping = 3": "stopping must be text, not 3",
    'batch_size = "64"': "batch_size must be a number, not '64'",
    "lr = nan": "lr must be a finite number, not nan",
    "lr = [0.1, -inf]": "lr[1] must be a finite number, not -inf",
    "lr = { low = 0.1, high = inf }": "lr.high must be a finite number, not inf",
    "lr = { low = 0.1 }": "lr.high is missing",
    "lr = {}": "lr.low, lr.high are missing",
    "lr = { low = 0.1, hgih = 1.0 }": "unknown key 'hgih'; did you mean 'high'?",
    "lr = { low = 0.2, high = 0.1 }": "lr has low above high",
    "lr = { low = 0.0, high = 0.1, log = true }": "lr has a logarithm of low: raise low above 0",
    "lr = { low = 0.1, high = 0.2, log = 1 }": "lr.log must be true or false, not 1",
    'lr = { low = "a", high = 0.2 }': "lr.low must be a number, not 'a'",
    "lr = 1979-05-27": "lr must be a number, not datetime.date(1979, 5, 27)",
    "lr = [[0.1]]": "lr[0] must be a number, not [0.1]",
    "stopping = { low = 1, high = 2 }": "stopping must be one value or a list of values",
    "hidden = { low = 1, high = 2 }": "hidden must be one value or a list of values",
    "class_weight = { low = 1, high = 2 }": "class_weight must be one value or a list of values",
    'class_weight = "balance"': "class_weight must be 'balanced' or 'none', not 'balance'",
    "hidden = 256": "hidden must be a list, not 256",
    "hidden = [256, [128]]": "hidden[0] must be a list, not 256",
    "hidden = [2.5]": "hidden[0] must be a whole number, not 2.5",
    "batch_size = [32, 64]": "batch_size holds several values, but all members of a cohort",
    "batch_size = { low = 32, high = 64 }": "batch_size holds several values, but all members",
    'precision = ["fp32", "bf16"]': "precision holds several values, but all members of a cohort",
    "first = 3": "first must be a list, not 3",
    "[mlp.first]": "first must be a list, not {}",
    **{
        f"{name} = 1": f"{name} = 1 is set by the sweep itself: delete the line"
        for name in SET_BY_SWEEP
    },
}


@pytest.mark.parametrize("lines", REFUSALS)
def test_a_refusal_names_the_file_the_table_the_key_the_value_and_the_way_out(read, lines):
    with pytest.raises(TrainingDataError) as caught:
        read("mlp", lines)
    head, _, rest = str(caught.value).partition("space.toml, [mlp]: ")
    assert head.startswith("/")
    assert REFUSALS[lines] in rest


REFUSALS_IN_FIRST = {
    "droput = 0.1": "has an unknown key 'droput'; did you mean 'dropout'?",
    "configs = 8": "has an unknown key 'configs'; known: ",
    "random_state = 1": "random_state = 1 is set by the sweep itself: delete the line",
    "dropout = [0.1, 0.2]": "dropout must be a number, not [0.1, 0.2]",
    "lr = { low = 0.1, high = 0.2 }": "lr must be a number, not {",
    "hidden = [[4], [8]]": "hidden[0] must be a whole number, not [4]",
    'precision = "fp32"': "precision = 'fp32' is shared by all members of a cohort: it is for [ml",
    "batch_size = 64": "batch_size = 64 is shared by all members of a cohort: it is for [mlp]",
}


@pytest.mark.parametrize("lines", REFUSALS_IN_FIRST)
def test_what_comes_first_is_held_to_single_known_values(read, lines):
    with pytest.raises(TrainingDataError) as caught:
        read("mlp", f"[[mlp.first]]\n[[mlp.first]]\n{lines}")
    _, found, rest = str(caught.value).partition("space.toml, [mlp]: first[1]")
    assert found
    assert REFUSALS_IN_FIRST[lines] in rest


@pytest.mark.parametrize("head", sorted(set(HEADS) - {"mlp"}))
@pytest.mark.parametrize("rungs", ["[2, 4]", "[]"])
def test_rungs_are_for_mlp_alone(read, head, rungs):
    with pytest.raises(TrainingDataError) as caught:
        read(head, f"rungs = {rungs}")
    assert (
        f"[{head}]: rungs = {rungs} is for heads that train by epochs, as mlp does: delete"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[lightgmb]\n", r"space.toml: unknown head \[lightgmb\]; did you mean lightgbm\?"),
        ("mlp = 3\n", r"space.toml: mlp = 3 is not a table; begin one with the line \[mlp\]"),
        ("[[mlp]]\n", r"space.toml: mlp = \[{}\] is not a table; begin one"),
        ("[mlp]\nlr = \n", r"space.toml is not TOML: Invalid value \(at line 2, column 6\)"),
        ("[mlp]\nlr = 1\nlr = 2\n", r"is not TOML: Cannot overwrite a value \(at line 3"),
        ("a = " + "[" * 5000, "space.toml is not TOML: "),
    ],
)
def test_a_file_that_is_no_space_is_refused_with_the_place(tmp_path, text, message):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(TrainingDataError, match=message):
        read_spaces(tmp_path / "space.toml")


@pytest.mark.parametrize("name", ["none.toml", "", "file/none.toml"])
def test_a_path_without_a_file_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(PathNotFoundError, match=f"no file {tmp_path / name} with a search space"):
        read_spaces(tmp_path / name)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "space.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainingDataError, match=r"space\.toml cannot be read as a search space: "):
        read_spaces(tmp_path / "space.toml")


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "space.toml"
    path.symlink_to(path)  # a loop: unreadable for root too
    with pytest.raises(TrainingDataError, match=r"space\.toml cannot be read as a search space: "):
        read_spaces(path)
