"""Laws of sets, of layer matching and of shared-atom codes: worked numbers, enumeration, simulation, invariances."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import itda
from itda import InputError, similarity
from itda.codes import Codes
from itda.labels import Labels
from itda.similarity import (
    INVARIANCES,
    MEASURES,
    code_cosine,
    corrected_jaccard,
    expected_jaccard,
    expected_jaccard_by_token,
    jaccard,
    match_layers,
    model_similarity,
    overlap,
    shared_atom_codes,
    shared_atoms,
    soft_overlap,
    support_overlap,
)
from itda.similarity.matching import Score

A = [{1, 2, 3, 4}, {3, 4, 5, 6}, {7, 8, 9}]
B = [{1, 2, 3}, {4, 5, 6, 10}, {3, 4, 7}]
C = [{3, 4}, {5, 6}, {8, 9, 11}]
TOY = {"A": A, "B": B, "C": C}
NAN = float("nan")


def toy() -> dict[tuple[str, str], np.ndarray]:
    return {(m, n): np.array([[jaccard(a, b) for b in TOY[n]] for a in TOY[m]]) for m in TOY for n in TOY}


def labels(token_id, position=None) -> Labels:
    """Of tokens with these ids, at position 0, 1, ... unless given."""
    counted = Labels.counted(0, len(token_id))
    position = counted.position if position is None else np.asarray(position)
    return replace(counted, position=position, token_id=np.asarray(token_id))


def rotation(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def clouds(n: int = 400, d1: int = 6, d2: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same tokens in two models that see much the same in them; neither is centred."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d1, d2))
    return x + 0.5, torch.nn.functional.pad(x, (0, d2 - d1)) @ rotation(d2, 9) + 0.1 * noise - 0.4


def plain(function: Callable) -> Callable:
    """Past the type checker of the tests, as a user would call it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# -- the worked example


def test_the_toy_has_its_matrices():
    found = {pair: np.round(matrix, 6).tolist() for pair, matrix in toy().items()}
    assert found["A", "B"] == [[0.75, 0.142857, 0.4], [0.166667, 0.6, 0.4], [0, 0, 0.2]]
    assert found["A", "C"] == [[0.5, 0, 0], [0.5, 0.5, 0], [0, 0, 0.5]]
    assert found["B", "A"] == [[0.75, 0.166667, 0], [0.142857, 0.6, 0], [0.4, 0.4, 0.2]]
    assert found["B", "C"] == [[0.25, 0, 0], [0.2, 0.5, 0], [0.666667, 0, 0]]
    assert found["C", "A"] == [[0.5, 0.5, 0], [0, 0.5, 0], [0, 0, 0.5]]
    assert found["C", "B"] == [[0.25, 0.2, 0.666667], [0, 0.5, 0], [0, 0, 0]]


def test_the_toy_matches_as_worked_out_under_both_tie_rules():
    found = match_layers(toy())
    self, cross = found.with_self, found.without_self
    assert (self.rows, cross.rows) == (27, 18)
    assert self.accuracy == pytest.approx(22 / 27, abs=1e-12)
    assert cross.accuracy == pytest.approx(13 / 18, abs=1e-12)
    assert cross.strict == pytest.approx(12 / 18, abs=1e-12)
    assert cross.ties == self.ties == 4
    assert cross.reciprocal_rank == pytest.approx((13 + 2 / 2 + 3 / 3) / 18, abs=1e-12)
    assert cross.offset == pytest.approx(9 / 18, abs=1e-12)


def test_the_toy_has_its_unions():
    found = [model_similarity(*pair) for pair in ((A, B), (A, C), (B, C))]
    assert found == pytest.approx([0.7, 0.6, 4 / 11], abs=1e-12)
    assert model_similarity(A, A) == 1
    assert math.isnan(model_similarity([set()], []))
    assert model_similarity([labels([7, 8], [3, 4])], [np.array([[0, 4], [0, 3]])]) == 1


# -- sets


def test_every_form_of_a_set_is_the_same_set():
    dictionary = itda.build(clouds()[0][:50].float(), k=2, threshold=0.5)
    positions = dictionary.labels.position
    pairs = dictionary.labels.pairs()
    for other in (dictionary, dictionary.labels, pairs, torch.from_numpy(pairs), {(0, p) for p in positions.tolist()}):
        assert jaccard(dictionary, other) == overlap(other, dictionary) == 1
    assert jaccard(positions, positions[:5].tolist()) == 5 / len(positions)
    for wrong in ("abc", 3, np.zeros((2, 2, 2))):
        with pytest.raises(InputError, match="A set of labels"):
            jaccard(wrong, {1})


def test_overlap_and_jaccard_of_small_sets():
    assert overlap({1, 2, 3}, {3, 4}) == 1 / 2
    assert jaccard({1, 2, 3}, {3, 4}) == 1 / 4
    assert overlap({1, 2}, {1, 2, 3, 4}) == 1
    assert jaccard(set(), {1}) == 0
    assert math.isnan(overlap(set(), {1}))
    assert math.isnan(jaccard([], ()))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_expected_jaccard_is_the_mean_over_all_sets(n):
    for a in range(n + 1):
        for b in range(n + 1):
            every = [jaccard(x, y) for x in combinations(range(n), a) for y in combinations(range(n), b)]
            assert expected_jaccard(a, b, n) == pytest.approx(np.mean(every), abs=1e-12, nan_ok=True)


def test_expected_jaccard_of_large_sets_is_that_of_drawn_ones():
    assert expected_jaccard(312, 312, 4096) == pytest.approx(0.0396, abs=1e-4)
    assert expected_jaccard(40_000, 40_000, 10**7) == pytest.approx(0.004 / (2 - 0.004), rel=1e-3)
    rng = np.random.default_rng(0)
    drawn = [jaccard(*(rng.choice(300, size, replace=False) for size in (60, 90))) for _ in range(1000)]
    assert expected_jaccard(60, 90, 300) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 1000**0.5)
    for sizes in ((5, 2, 4), (2, 5, 4), (-1, 2, 4)):
        with pytest.raises(InputError, match="do not fit in 4 tokens: pass how many"):
            expected_jaccard(*sizes)


STREAM = np.repeat([4, 7, 8, 30, 31], [40, 60, 100, 30, 20])


def stratified(rng, counts: dict[int, int]) -> np.ndarray:
    """Random tokens of `STREAM`, so many of each id."""
    return np.concatenate([rng.choice(np.flatnonzero(i == STREAM), n, replace=False) for i, n in counts.items()])


def test_expected_jaccard_by_token_is_that_of_sets_drawn_by_token():
    rng = np.random.default_rng(1)
    counts = {4: 20, 7: 12, 8: 10, 30: 15}, {4: 10, 7: 30, 30: 15, 31: 20}
    drawn = [jaccard(*(stratified(rng, count) for count in counts)) for _ in range(1000)]
    ids = [np.repeat(list(count), list(count.values())) for count in counts]
    mean, deviation = expected_jaccard_by_token(*ids, STREAM)
    assert mean == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 1000**0.5)
    assert deviation == pytest.approx(np.std(drawn), rel=0.1)
    # Worked out for two ids of 4 tokens with 2 and 2 atoms: 0 to 4 in common, 1, 8, 18, 8 and 1 times of 36.
    every = np.repeat([0, 1 / 7, 2 / 6, 3 / 5, 1], [1, 8, 18, 8, 1])
    small = expected_jaccard_by_token(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.repeat([0, 1], 4))
    assert small[0] == pytest.approx(np.mean(every), abs=0.003)
    assert small[1] == pytest.approx(np.std(every), rel=0.1)
    assert mean > 1.05 * expected_jaccard(*map(len, ids), len(STREAM))


def test_expected_jaccard_by_token_is_exact_where_nothing_is_left_to_chance():
    def chance(a, b, stream):
        return expected_jaccard_by_token(np.array(a, int), np.array(b, int), np.array(stream, int))

    assert chance([1, 2, 3], [2, 3, 4], range(6)) == (0.5, 0)  # each id once
    assert chance([5] * 3, [5] * 3, [5] * 3) == (1, 0)  # all of them
    assert chance([5] * 3, [5], [5] * 3 + [6]) == (pytest.approx(1 / 3), 0)
    assert chance([1], [2], [1, 1, 2, 2]) == (0, 0)
    assert chance([], [2], [1, 2]) == (0, 0)
    assert all(map(math.isnan, chance([], [], [1])))
    for wrong in (([1, 1], [1]), ([1], [3]), ([1], [0])):
        with pytest.raises(InputError, match="more atoms of a token id than `stream` has"):
            chance(*wrong, [1, 2])


def test_corrected_jaccard_is_0_by_chance_and_1_for_equal_sets():
    rng = np.random.default_rng(2)
    drawn = [corrected_jaccard(*(rng.choice(300, 60, replace=False) for _ in "ab"), 300) for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0, abs=4 * np.std(drawn) / 400**0.5)
    assert corrected_jaccard({1, 2}, {2, 1}, 9) == plain(corrected_jaccard)({1, 2}, {2, 1}, np.int64(9)) == 1
    assert math.isnan(corrected_jaccard({1, 2}, {2, 1}, 2))
    assert corrected_jaccard({1, 2}, {3, 4}, 9) < 0


def test_corrected_jaccard_by_token_is_0_for_sets_that_share_ids_alone():
    rng = np.random.default_rng(3)
    counts = {4: 20, 7: 12, 8: 10, 30: 15}

    def drawn() -> Labels:
        positions = stratified(rng, counts)
        return labels(STREAM[positions], positions)

    found = [corrected_jaccard(drawn(), drawn(), STREAM) for _ in range(400)]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / 400**0.5)
    one, other = drawn(), drawn()
    assert corrected_jaccard(one, one, STREAM) == pytest.approx(1)
    assert corrected_jaccard(one, other, STREAM) < corrected_jaccard(one, other, len(STREAM))
    with pytest.raises(InputError, match="Token ids are needed"):
        corrected_jaccard({1}, {2}, STREAM)


def test_soft_overlap_of_a_case_worked_out_by_hand():
    # Of A, one atom in model A (3 wide), of B two in model B (2 wide); what each makes of the other's tokens.
    a, b = torch.tensor([[0.0, 2, 0]]), torch.tensor([[1.0, 0], [3, 4]])
    a_in_b, b_in_a = torch.tensor([[0.0, 5]]), torch.tensor([[0.0, 1, 0], [0, -3, 0]])
    # A's atom is nearest to (3, 4): 0.8. B's atoms are at 1 and -1 from A's only one: 0 on average.
    assert soft_overlap(a, b, a_in_b, b_in_a) == pytest.approx(0.4, abs=1e-12)
    assert soft_overlap(b, a, b_in_a, a_in_b) == pytest.approx(0.4, abs=1e-12)
    assert math.isnan(soft_overlap(a[:0], b, a_in_b[:0], b_in_a))


def test_soft_overlap_is_1_for_equal_sets_and_blind_to_rotation_and_scale():
    x, y = clouds()
    a, b = torch.arange(0, 60), torch.arange(30, 120)

    def found(x, y, a=a, b=b):
        return soft_overlap(x[a], y[b], y[a], x[b])

    assert found(x, y, a, a.flip(0)) == pytest.approx(1, abs=1e-12)
    before = found(x, y)
    assert 0.5 < before < 1
    assert found(3 * x @ rotation(6, 1), 0.1 * y @ rotation(8, 2)) == pytest.approx(before, abs=1e-12)
    assert found(x + 3, y) != pytest.approx(before, abs=1e-3)
    assert found(x, y, a, torch.cat([b, a])) > before


def test_dictionaries_of_different_streams_are_refused():
    one, other = (itda.build(clouds()[0][:50].float(), k=2, threshold=0.5) for _ in "ab")
    one.cfg = {"stream": {"hash": "1" * 64, "data": "first.txt", "tokenizer_hash": "x", "context_length": 64}}
    changes = {
        "of different text": {"data": "second.txt"},
        "made by different tokenizers": {"tokenizer_hash": "y"},
        "cut differently": {"context_length": 32},
    }
    for words, change in changes.items():
        other.cfg = {"stream": one.cfg["stream"] | {"hash": "2" * 64} | change}
        with pytest.raises(InputError, match=rf"{words}.*first.txt \(11111111\) and .*\(22222222\)"):
            jaccard(one, other)
    other.cfg = {"stream": one.cfg["stream"]}
    assert jaccard(one, other) == 1


# -- layer matching


def scored(matrix) -> Score:
    found = match_layers({("a", "b"): np.array(matrix, float)})
    assert found.with_self is None
    return found.without_self


def test_margins_and_ranks_of_a_case_worked_out_by_hand():
    score = scored([[0.9, 0.5, 0.1], [0.2, 0.4, 0.6], [0.3, 0.3, 0.3]])
    assert (score.accuracy, score.strict) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert score.reciprocal_rank == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert score.offset == pytest.approx((0 + 1 + 2) / 3)
    assert score.margin == pytest.approx((0.4 - 0.2 + 0) / 3)
    # Standard deviations: sqrt(0.32 / 3) of the first row, sqrt(0.08 / 3) of the second; the third has none.
    assert score.margin_sd == pytest.approx((0.4 / (0.32 / 3) ** 0.5 - 0.2 / (0.08 / 3) ** 0.5) / 2)
    assert (score.ties, score.rows) == (1, 3)


def test_equal_rows_go_to_the_lowest_layer():
    score = scored(np.ones((4, 4)))
    assert (score.accuracy, score.strict, score.ties, score.margin) == (0.25, 0, 4, 0)
    assert score.reciprocal_rank == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert math.isnan(score.margin_sd)


def test_unknown_similarities_are_no_hits_and_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = scored([[0.9, NAN, 0.1], [NAN, NAN, NAN], [0.5, 0.1, NAN]])
        assert score.accuracy == pytest.approx(1 / 3)
        assert score.margin == pytest.approx(0.8)
        assert math.isnan(scored(np.full((2, 2), NAN)).margin)
        assert scored([[1.0]]).accuracy == 1  # one layer has no other to be taken for
        assert math.isnan(scored([[1.0]]).margin)
    assert scored([[1.0, NAN], [NAN, 1.0]]).accuracy == 1
    assert scored([[NAN, NAN], [0.5, 1.0]]).accuracy == 0.5  # nothing known is no hit at layer 0 either


def test_an_array_and_a_dict_say_the_same_and_self_pairs_count_apart():
    array = np.random.default_rng(4).random((3, 3, 5, 5))
    found = match_layers(array, seed=5)
    assert match_layers(torch.from_numpy(array), seed=5) == found
    pairs = {(m, n): array[m, n] for m in range(3) for n in range(3)}
    assert match_layers(pairs, seed=5) == found
    cross = {pair: matrix for pair, matrix in pairs.items() if pair[0] != pair[1]}
    assert match_layers(cross, seed=5) == replace(found, with_self=None)
    assert (found.with_self.rows, found.without_self.rows) == (45, 30)
    only = match_layers({("a", "a"): np.eye(3)})
    assert (only.without_self, only.with_self.accuracy, only.interval) == (None, 1, None)
    assert set(found.to_json()) == {"without_self", "with_self", "interval"}


def test_the_order_of_models_changes_no_score():
    array = np.random.default_rng(6).random((4, 4, 3, 3)).round(1)
    order = [2, 0, 3, 1]
    assert match_layers(array[order][:, order]).without_self.__dict__ == pytest.approx(
        match_layers(array).without_self.__dict__
    )


def test_a_clear_case_is_certain_and_the_interval_holds_what_was_found():
    clear = np.broadcast_to(np.eye(4), (5, 5, 4, 4))
    found = match_layers(clear)
    assert (found.without_self.accuracy, found.interval) == (1, (1, 1))
    noisy = np.eye(4) + 2 * np.random.default_rng(7).random((5, 5, 4, 4))
    found = match_layers(noisy, seed=1)
    low, high = found.interval
    assert low < found.without_self.accuracy < high
    assert match_layers(noisy, seed=1) == found
    assert match_layers(noisy, seed=2).interval != found.interval
    assert match_layers(noisy, bootstraps=0).interval is None
    assert match_layers(noisy[:2, :2]).interval is None  # two models, one pair: nothing to draw from


def test_a_model_drawn_twice_is_no_pair_of_its_own():
    """Were it one, the interval would be drawn towards the 1 that every model scores against itself."""
    wrong = np.roll(np.eye(4), 1, axis=0)
    array = np.stack([[np.eye(4) if m == n else wrong for n in range(3)] for m in range(3)])
    assert match_layers(array).interval == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({(0, 1): np.ones((4, 6))}, "have shape (4, 6)"),
        ({(0, 1): np.ones((0, 0))}, "have shape (0, 0)"),
        ({}, "is empty"),
        ({0: np.ones((2, 2))}, "has the key 0"),
        (np.ones((2, 2)), "has shape (2, 2)"),
        (np.ones((2, 3, 4, 4)), "has shape (2, 3, 4, 4)"),
        (np.ones((2, 2, 4, 5)), "have shape (4, 5)"),
    ],
)
def test_what_cannot_be_matched_is_refused(wrong, words):
    with pytest.raises(InputError) as error:
        match_layers(wrong)
    assert words in str(error.value)


# -- codes over shared atoms


def codes_of(indices, values, n_atoms=5) -> Codes:
    return Codes(torch.tensor(indices), torch.tensor(values, dtype=torch.float32), n_atoms)


def test_codes_of_a_case_worked_out_by_hand():
    # Padding stands at atom 0 with value 0, and is no use of atom 0.
    a = codes_of([[3, 0], [3, 0], [1, 2], [0, 0], [0, 1]], [[3, 0], [3, 4], [1, 1], [0, 0], [-2, 0]])
    b = codes_of([[0, 3], [3, 0], [2, 4], [1, 0], [0, 0]], [[4, 3], [5, 0], [1, 1], [1, 0], [2, 0]])
    found = support_overlap(a, b)
    assert found.tolist() == [1 / 2, 1 / 2, 1 / 3, 0, 1]
    assert support_overlap(b, a).equal(found)
    cosines = code_cosine(a, b)
    assert cosines.tolist() == pytest.approx([0.6, 0.6, 0.5, NAN, -1], nan_ok=True)
    assert torch.equal(code_cosine(b, a).nan_to_num(7), cosines.nan_to_num(7))
    empty = codes_of([[0, 0]], [[0, 0]])
    assert math.isnan(support_overlap(empty, empty))
    for other in (codes_of([[1]], [[1]], 6), codes_of([[1], [1]], [[1], [1]])):
        with pytest.raises(InputError, match="cannot be compared: encode the same tokens with the same atoms"):
            support_overlap(other, codes_of([[1]], [[1]]))


def test_codes_agree_with_those_written_out():
    x, y = clouds()
    anchors = np.arange(0, 400, 7)
    a, b = (shared_atom_codes(z, anchors, 4) for z in (x, y))
    dense_a, dense_b = a.dense().double(), b.dense().double()
    either = ((dense_a != 0) | (dense_b != 0)).sum(1)
    assert support_overlap(a, b).equal(((dense_a != 0) & (dense_b != 0)).sum(1) / either.double())
    want = torch.nn.functional.cosine_similarity(dense_a, dense_b)
    assert torch.allclose(code_cosine(a, b), want, atol=1e-12)


def test_shared_atoms_is_the_mean_over_tokens_that_are_no_atoms():
    x, y = clouds()
    atoms = np.random.default_rng(8).permutation(400)[:60]
    others = np.setdiff1d(np.arange(400), atoms)
    want = support_overlap(*(shared_atom_codes(z, atoms, 3)[others] for z in (x, y))).mean()
    assert shared_atoms(x, y, atoms, k=3) == pytest.approx(float(want), abs=1e-12)
    assert 0.1 < float(want) < 0.9
    assert shared_atoms(x.numpy(), y.float(), torch.from_numpy(atoms), k=3) == pytest.approx(float(want), abs=1e-6)
    assert shared_atoms(x, x, 60) == pytest.approx(1)
    assert plain(shared_atoms)(x, y, np.int64(60), seed=1) == shared_atoms(x, y, 60, seed=1) != shared_atoms(x, y, 60)
    x[others[0]] = y[others[0]] = 0  # which no atom resembles: such a token counts as 0
    found = support_overlap(*(shared_atom_codes(z, atoms, 3)[others] for z in (x, y)))
    assert math.isnan(found[0])
    assert shared_atoms(x, y, atoms, k=3) == pytest.approx(float(found[1:].sum()) / len(others))


def test_atoms_code_themselves():
    x, _ = clouds()
    codes = shared_atom_codes(x, np.array([17, 3, 200]), 2)[[17, 3, 200]]
    assert codes.indices[:, 0].tolist() == [0, 1, 2]
    assert codes.l0().tolist() == [1, 1, 1]
    assert torch.allclose(codes.values[:, 0], x[[17, 3, 200]].norm(dim=1).float())


def test_the_order_of_tokens_changes_nothing():
    x, y = clouds()
    atoms, order = np.arange(50, 130), np.random.default_rng(9).permutation(400)
    moved = np.argsort(order)[atoms]  # where the atoms are now
    assert shared_atoms(x[order], y[order], moved) == pytest.approx(shared_atoms(x, y, atoms), abs=1e-12)
    assert shared_atoms(x[order], y, atoms) < shared_atoms(x, y, atoms) / 2


def test_centred_codes_are_blind_to_translation_too():
    x, y = (z - z.mean(0) for z in clouds())
    anchors = np.arange(60)

    def found(x, y, center):
        return float(support_overlap(*(shared_atom_codes(z, anchors, 4, center=center)[60:] for z in (x, y))).mean())

    moved = 0.1 * x @ rotation(6, 3) + 2
    assert found(moved, y, True) == pytest.approx(found(x, y, True), abs=1e-12)
    assert found(x, y, False) == pytest.approx(found(x, y, True), abs=1e-3)
    assert found(moved, y, False) < found(x, y, False) / 2


def test_what_cannot_be_coded_is_refused():
    x, y = clouds()
    for atoms in (0, -3, np.array([400]), np.array([-1]), np.array([], int)):
        with pytest.raises(InputError, match="numbers of some of the tokens"):
            shared_atoms(x, y, atoms)
    with pytest.raises(InputError, match="All 400 tokens are atoms"):
        shared_atoms(x, y, 1500)
    with pytest.raises(InputError, match=r"`X` has shape \(400, 6\) and `Y` \(399, 8\)"):
        plain(shared_atoms)(x, y[:399])
    with pytest.raises(InputError, match="finite"):
        shared_atoms(x.index_fill(0, torch.tensor(7), NAN), y, 50)


def test_shared_atoms_read_any_array_of_real_numbers_and_refuse_all_else():
    x, y = clouds()
    want = shared_atoms(x.half(), y, 50, 3)
    other = x.half().numpy()
    for same in (
        other.astype(">f2"),
        other[:, ::-1].copy()[:, ::-1],
        np.asfortranarray(other),
        other.astype(np.longdouble),
    ):
        assert plain(shared_atoms)(same, y, 50, 3) == want
    coded = plain(shared_atom_codes)
    for wrong, said in (
        (None, "type NoneType"),
        (x > 0, "torch.bool"),
        (x.cfloat(), "complex"),
    ):
        with pytest.raises(InputError, match=said):
            plain(shared_atoms)(wrong, y, 50)
        with pytest.raises(InputError, match=said):
            coded(wrong, np.arange(5))
    for atoms in (True, 1.5, [1, 2.5], np.ones(400, bool), np.arange(4).reshape(2, 2)):
        with pytest.raises(InputError, match=r"shared atoms are .* of the tokens, 0 to 399, were wanted"):
            plain(shared_atoms)(x, y, atoms)
    for tokens in ([400], [0.5], []):
        with pytest.raises(InputError, match=r"tokens to encode are .* 0 to 399, were wanted"):
            coded(x, np.arange(5), tokens=tokens)


# -- what measures are blind to


def changed(name: str, x: torch.Tensor, seed: int) -> torch.Tensor:
    """`x` after one of the changes in `INVARIANCES`."""
    generator = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    numbers = torch.randn(d, generator=generator, dtype=torch.float64)
    return {
        "orthogonal": lambda: x @ rotation(d, seed),
        "scale": lambda: x * 7.5,
        "translation": lambda: x + 3 * numbers,
        "column_scale": lambda: x * (1 + 5 * numbers.abs()),
        "linear": lambda: x @ (rotation(d, seed) * (1 + 5 * numbers.abs()) + 0.5),
        "linear_x": lambda: x @ (rotation(d, seed) * (1 + 5 * numbers.abs()) + 0.5) + numbers,
    }[name]()


def measured(name: str, x: torch.Tensor, y: torch.Tensor) -> float:
    if name != "shared_atoms":
        return MEASURES[name].function(built(x), built(y))
    return shared_atoms(x, y, 60)


DICTIONARIES: dict[bytes, itda.ITDA] = {}


def built(x: torch.Tensor) -> itda.ITDA:
    """A dictionary of some of the tokens, built once."""
    key = x.numpy().tobytes()
    if key not in DICTIONARIES:
        DICTIONARIES[key] = itda.build(x.float(), k=3, threshold=0.15, center=False)
        assert 10 < len(DICTIONARIES[key]) < len(x) - 10
    return DICTIONARIES[key]


@pytest.mark.parametrize("change", INVARIANCES)
@pytest.mark.parametrize("name", ["shared_atoms", "jaccard", "overlap"])
def test_declared_invariances_hold_and_others_do_not(name, change):
    x, y = clouds(d1=10, d2=12)
    before = measured(name, x, y)
    assert 0.1 < before < 0.95
    one, other = changed(change, x, 1), y if change == "linear_x" else changed(change, y, 2)
    after = measured(name, one, other)
    if change in MEASURES[name].invariances:
        assert after == pytest.approx(before, abs=1e-9)
    else:
        assert abs(after - before) > 1e-3


@pytest.mark.parametrize("name", ["shared_atoms", "jaccard", "overlap"])
def test_measures_are_symmetric_and_1_for_equal_clouds(name):
    x, y = clouds(d1=10, d2=12)
    assert MEASURES[name].symmetric
    assert measured(name, x, y) == pytest.approx(measured(name, y, x), abs=1e-12)
    assert measured(name, x, x @ rotation(10, 4)) == pytest.approx(1)


def test_chance_is_exact_out_of_any_number_of_tokens():
    for a, b, n in ((30, 40, 100), (30, 30, 10**12), (5, 40, 10**14), (30, 30, 2**53), (90, 80, 100)):
        common = range(max(0, a + b - n), min(a, b) + 1)
        want = sum(Fraction(math.comb(a, c) * math.comb(n - a, b - c) * c, a + b - c) for c in common)
        assert expected_jaccard(a, b, n) == pytest.approx(float(want / math.comb(n, b)), rel=1e-12, abs=0)


def test_sets_that_do_not_fit_are_refused():
    x, y = clouds()
    soft = plain(soft_overlap)
    for four, said in (((x, y, x, y), "`a_in_b` has shape"), ((x, y, y, x[:3]), "`b_in_a` has shape")):
        with pytest.raises(InputError, match=said):
            soft(*four)
    with pytest.raises(InputError, match="`a` must be finite"):
        soft(x * NAN, y, y, x)
    assert soft(x.numpy(), y.numpy(), y.numpy(), x.numpy()) == pytest.approx(1)
    with pytest.raises(InputError, match="unhashable"):
        jaccard([[1], [2]], [[1]])
    with pytest.raises(InputError, match="a list of these, one per layer"):
        plain(model_similarity)(built(x), built(y))


def test_models_of_different_streams_have_no_similarity():
    one, other = (replace(built(x), cfg={"stream": {"hash": name}}) for x, name in zip(clouds(), "ab", strict=True))
    assert model_similarity([one], [one, one]) == 1
    for a, b in (([one], [other]), ([{1}, one], [{1}, other]), ([one, other], [{1}])):
        with pytest.raises(InputError, match="different text"):
            model_similarity(a, b)


def test_similarities_that_are_no_numbers_are_refused():
    half = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    assert match_layers({("a", "b"): half}).without_self.accuracy == 1
    for wrong in ("x", {("a", "b"): "x"}, [1, [2]]):
        with pytest.raises(InputError, match="`similarities` cannot be read as numbers"):
            match_layers(wrong)
    assert match_layers(np.random.default_rng(0).random((3, 3, 2, 2)), bootstraps=-1).interval is None


def test_everything_named_is_there():
    assert all(hasattr(similarity, name) for name in similarity.__all__)
    assert list(similarity.__all__) == sorted(similarity.__all__, key=lambda name: (not name.isupper(), name))
    assert all(a <= b for a, b in pairwise(n for n in similarity.__all__ if n.islower()))
    assert all(measure.invariances <= set(INVARIANCES) for measure in MEASURES.values())
