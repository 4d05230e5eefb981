"""Construction: exact, whatever the chunks, threads and interruptions; the published behaviour; what it refuses."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import itda
from itda import metrics
from itda.dictionary import admission, builder, folder, refine, sample, standard
from itda.labels import Labels
from itda.metrics import LOSSES
from itda.progress import Progress, Step
from itda.pursuit import LARGEST, dense, reference
from tests.untyped import untyped

# Algorithm 1 as it is printed; the mean that is subtracted by default has tests of its own.
build = functools.partial(itda.build, center=False)


def one_at_a_time(x, k, threshold, loss="relative", given=0):
    """The definition: judge each token by the dictionary grown from all before it. Float64, one token at a time."""
    atoms, rows = itda.normalize(x[:given]).double().numpy(), []
    for t, row in enumerate(x.double().numpy()[given:], given):
        _, steps, residual = reference.mp(row, atoms, k)
        norm = math.sqrt(reference.energy(row))
        repeats = bool(steps) and abs(steps[0]) >= (1 - 1e-6) * norm
        if norm and LOSSES[loss](row, row - residual) > threshold and not repeats:
            atoms = np.concatenate([atoms, (row / norm).astype(np.float32).astype(np.float64)[None]])
            rows.append(t)
    return rows


def gaussian(tokens=700, d=24, seed=0):
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))


def low_rank(tokens=1700, d=32, seed=0):
    """A few directions, some noise, a mean that dominates, and tokens that come back exactly."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, generator=g) @ torch.randn(5, d, generator=g) + 0.3 * torch.randn(tokens, d, generator=g)
    x = x + 3 * torch.randn(d, generator=g)
    x[100:1600:7] = x[3]
    x[50] = 0
    return x


@pytest.fixture(scope="module")
def real():
    """Activations of the demo model on text of the standard library."""
    from itda import demo

    stream = itda.activations(demo.model_path(), demo.corpus()[:60], layer=2, tokens=1500)
    return torch.cat([batch.activations for batch in stream])


def rows_of(model):
    return model.labels.position.tolist()


KINDS = {"gauss": (gaussian, 6, 0.3), "low_rank": (low_rank, 4, 0.02), "real": (None, 8, 0.1)}


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_is_the_definition_for_every_chunk_size(kind, real):
    make, k, threshold = KINDS[kind]
    x = make() if make else real
    want = one_at_a_time(x, k, threshold)
    assert 50 < len(want) < 0.9 * len(x)
    for chunk_size, batch in [(1, 64), (7, 500), (256, 1000), (4096, 10_000)]:
        model = build(x.split(batch), k=k, threshold=threshold, chunk_size=chunk_size)
        assert rows_of(model) == want, chunk_size


@pytest.mark.parametrize("kept_bytes", [admission.KEPT_BYTES, 0])
def test_more_new_atoms_than_a_window_has_room_for(kept_bytes, monkeypatch):
    monkeypatch.setattr(admission, "KEPT_BYTES", kept_bytes)
    known, new = gaussian(4, 64), gaussian(420, 64, seed=1)
    x = torch.cat([known[torch.arange(2500) % 4], new, new[::3] + new[1::3] + 0.1 * known[:1]])
    want = one_at_a_time(x, 2, 0.5)
    assert 4 + admission.SPARE < len(want) < 4 + 420 + 140
    sequential = admission.Sequential(64, 2, "relative")
    assert sequential.judge(x, 0.5)[0] == want


@pytest.mark.parametrize(("loss", "threshold"), [("relative", 0.2), ("cosine", 8e-3), ("squared", 4.0)])
def test_every_loss(loss, threshold):
    x = gaussian(600)
    want = one_at_a_time(x, 4, threshold, loss)
    assert 50 < len(want) < 500
    assert rows_of(build([x], k=4, threshold=threshold, loss=loss)) == want


@pytest.mark.parametrize("max_gram_bytes", [0.0, 1e5])
def test_without_a_gram_matrix(max_gram_bytes):
    x, want = gaussian(500), None
    for size in (max_gram_bytes, 4e9):
        sequential = admission.Sequential(24, 5, "relative", max_gram_bytes=size)
        rows, _ = sequential.judge(x, 0.2)
        want = want or rows
        assert rows == want


def close_calls(tokens=400, d=48, threshold=0.2):
    """Tokens whose loss lies within 1e-7 of the threshold on either side: float32 cannot tell which."""
    g = torch.Generator().manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    x = [torch.eye(d, dtype=torch.float64)[:8]]
    for t in range(tokens):
        share = threshold * (1 + 1e-7 * (2 * torch.rand(1, generator=g, dtype=torch.float64).item() - 1))
        row = torch.zeros(1, d, dtype=torch.float64)
        row[0, t % 8], row[0, 8 + t % (d - 8)] = (1 - share) ** 0.5, share**0.5
        x.append(row * (1 + t))
    return (torch.cat(x) @ q).float()


def close_choices(tokens=400, d=24):
    """Forty atoms, then tokens halfway between their two best atoms: float32 sums do not say which is ahead."""
    g = torch.Generator().manual_seed(6)
    atoms = itda.normalize(torch.randn(40, d, generator=g)).double()
    x = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    corr = x @ atoms.T
    two = corr.abs().topk(2, dim=1).indices
    signed = atoms[two] * corr.gather(1, two).sign()[:, :, None]
    apart = signed[:, 0] - signed[:, 1]
    x = x - (x * apart).sum(1, keepdim=True) / apart.square().sum(1, keepdim=True) * apart
    return torch.cat([atoms, x]).float()


@pytest.mark.parametrize(("make", "given", "threshold"), [(close_calls, 8, 0.2), (close_choices, 40, 0.6)])
def test_rounding_never_decides(make, given, threshold, monkeypatch):
    """Engineered near-ties: the result is the definition's, on one thread and on two; in float32 alone it is not."""
    x, k = make(), 3
    want = one_at_a_time(x, k, threshold, given=given)
    assert 10 < len(want) < len(x) - given

    def judged(chunk_size):
        sequential = admission.Sequential(x.shape[1], k, "relative", chunk_size=chunk_size)
        for row in x[:given]:
            sequential.add(row, math.nan)
        return [given + row for row in sequential.judge(x[given:], threshold)[0]]

    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert all(judged(chunk_size) == want for chunk_size in (1, 7, 4096))
    finally:
        torch.set_num_threads(threads)

    monkeypatch.setattr(admission, "encode", functools.partial(itda.pursuit.encode, backend="dense"))
    monkeypatch.setattr(dense, "error_bound", lambda d, norm, spent=0.0, dtype=None, entry=0.0: torch.zeros_like(norm))
    monkeypatch.setattr(admission, "error_bound", dense.error_bound)
    monkeypatch.setattr(admission, "LOSS_MARGIN", 0.0)

    def in_float32(self, trace, rows):
        indices, coefficients = trace.steps.indices[rows], trace.steps.coefficients[rows].float()
        x_hat = (coefficients[:, :, None] * self.gram.atoms[indices]).sum(1) if len(self) else torch.zeros(len(rows), 1)
        return LOSSES["relative"](trace.x[rows], x_hat).numpy(), np.zeros(len(rows), bool)

    monkeypatch.setattr(admission.Dictionary, "exact", in_float32)
    assert judged(4096) != want


def test_few_tokens_need_float64():
    seen = []
    build(low_rank().split(500), k=4, threshold=0.02, progress=seen.append)
    assert 0 < seen[-2].settled < 0.1  # an entry of the Gram matrix has 15 bits, and any order of sums is allowed for


def test_zero_vectors_and_repeats_are_never_admitted():
    x = torch.zeros(6, 4)
    x[1] = x[3] = torch.tensor([1.0, 2, 3, 4])
    x[4] = -2 * x[1]
    x[5] = torch.tensor([1.0, 0, 0, 0])
    model = build([x], k=2, threshold=0.0)
    assert rows_of(model) == [1, 5]
    torch.testing.assert_close(model.norms, torch.tensor([30.0**0.5, 1.0]))
    assert model.losses[0].isnan()


def test_threshold_zero_admits_every_new_direction():
    x = gaussian(30)
    assert rows_of(build([x], k=2, threshold=0.0)) == list(range(30))


def test_max_atoms_stops_reading():
    read = []

    def stream():
        for part in gaussian(900).split(100):
            read.append(1)
            yield part

    model = build(stream(), k=3, threshold=0.1, max_atoms=120)
    whole = build([gaussian(900)], k=3, threshold=0.1)
    assert rows_of(model) == rows_of(whole)[:120]
    assert len(read) < 4


def test_max_atoms_for_any_batches():
    """What comes after the last admission was not judged, so it counts nowhere."""
    one, many = (build(gaussian(600).split(n), k=3, threshold=0.1, max_atoms=20) for n in (600, 7))
    assert one.cfg == many.cfg
    assert one.cfg["tokens"] == rows_of(one)[-1] + 1


@pytest.mark.parametrize("admission", ["sequential", "batch"])
@pytest.mark.parametrize(("loss", "threshold"), [("cosine", 4e-4), ("squared", 1e9)])
def test_the_first_token_is_the_first_atom(admission, loss, threshold):
    """Also where no loss can exceed the threshold: at this width the cosine loss of an empty dictionary is 1/3000."""
    x = gaussian(20, d=3000)
    x[0] = 0
    assert rows_of(build([x], k=2, loss=loss, threshold=threshold, admission=admission))[0] == 1


def progresses(seen):
    """How many batches a build has told of."""
    return sum(isinstance(told, Progress) for told in seen)


def test_a_resumed_wish_keeps_its_stream(tmp_path):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        settings = dict(progress=seen.append, stop=lambda: progresses(seen) == 9)
        build(gaussian(4000).split(400), k=3, n_atoms=50, checkpoint=tmp_path, **settings)
    with pytest.raises(itda.InputError, match=r"started with total = 4000, and this one has 3000"):
        build(gaussian(4000).split(400), k=3, n_atoms=50, tokens=3000, checkpoint=tmp_path)


def test_tokens_cuts_the_stream():
    x = gaussian(700)
    model = build(x.split(128), k=3, threshold=0.1, tokens=333)
    assert model.cfg["tokens"] == 333
    assert rows_of(model) == rows_of(build([x[:333]], k=3, threshold=0.1))


def test_centred():
    x = low_rank()
    model = itda.build(x.split(100), k=4, threshold=0.05)  # as it is by default
    torch.testing.assert_close(model.mean, x.mean(0))
    assert rows_of(model) == one_at_a_time(x - model.mean, 4, 0.05)
    assert torch.equal(model.atoms, build([x], k=4, threshold=0.05, center=True).atoms)


def test_the_mean_is_that_of_a_fixed_prefix(monkeypatch):
    monkeypatch.setattr(builder, "MEAN_TOKENS", 500)
    x = low_rank()
    for batch in (100, 333, 3000):
        torch.testing.assert_close(build(x.split(batch), k=4, threshold=0.1, center=True).mean, x[:500].mean(0))


def test_several_dictionaries_in_one_pass():
    x = gaussian(600)
    both = build([{"a": x[:300], "b": x[:300, :9]}, {"a": x[300:], "b": x[300:, :9]}], k=3, threshold=0.2)
    assert list(both) == ["a", "b"]
    assert rows_of(both["a"]) == rows_of(build([x], k=3, threshold=0.2))
    assert rows_of(both["b"]) == rows_of(build([x[:, :9]], k=3, threshold=0.2))


def test_labels_of_the_stream_are_kept():
    x = gaussian(50)
    labels = Labels.counted(0, 50)
    labels.prompt[:] = np.arange(50) // 10
    labels.position[:] = np.arange(50) % 10
    model = build([(x[:20], labels[:20]), itda.Batch(x[20:], labels[20:])], k=2, threshold=0.3)
    rows = one_at_a_time(x, 2, 0.3)
    assert model.labels.pairs().tolist() == [[t // 10, t % 10] for t in rows]


def test_atoms_are_activations():
    x = gaussian(200)
    model = build([x], k=3, threshold=0.2)
    torch.testing.assert_close(model.atoms * model.norms[:, None], x[rows_of(model)])
    torch.testing.assert_close(model.reconstruct(model.atoms), model.atoms)


# Worked by hand: batch admission with seeds, the rows of four batches of two prompts each.
A11 = [
    [(3, 0, 0), (0, 2, 0), (3, 0, 0), (0, 2, 2)],
    [(1, 2, 3), (4, 4, 0), (-3, 0, 0), (0, 0, 5)],
    [(2, -2, 2), (2, -2, 2), (1, 1, 1), (0, -1, 4)],
    [(2, -2, 2), (1, 0, -1), (0, 0, 5), (5, -4, 4)],
]


def a11_stream():
    for b, rows in enumerate(A11):
        labels = Labels.counted(0, 4)
        labels.prompt[:], labels.position[:] = [2 * b, 2 * b, 2 * b + 1, 2 * b + 1], [0, 1, 0, 1]
        yield torch.tensor(rows, dtype=torch.float32), labels


def test_worked_example_of_the_published_code():
    model = build(a11_stream(), k=2, threshold=0.05, loss="cosine", admission="paper")
    assert model.labels.pairs().tolist() == [[0, 0], [0, 1], [1, 1], [4, 0], [4, 1], [6, 1], [7, 0]]
    want = [math.nan, math.nan, math.nan, 0.122336, 0.122336, 0.089316, 0.058086]
    np.testing.assert_allclose(model.losses.numpy(), want, atol=1e-6)
    first = [(1, 0, 0), (0, 1, 0), (0, 0.5**0.5, 0.5**0.5)]
    np.testing.assert_allclose(model.atoms[:3].numpy(), first, atol=1e-6)


def test_worked_example_without_duplicates():
    """The strict form of the same example, from the same three atoms."""
    strict = admission.Batched(3, 2, "cosine")
    for row in [(3, 0, 0), (0, 2, 0), (0, 2, 2)]:
        strict.add(torch.tensor(row, dtype=torch.float32), math.nan)
    admitted = [strict.judge(x, 0.05)[0] for x, _ in itertools.islice(a11_stream(), 1, None)]
    assert admitted == [[], [0], [1, 2]]


def test_losses_of_the_worked_example():
    x = torch.tensor(A11[1] + A11[2], dtype=torch.float64)
    atoms = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0.5**0.5, 0.5**0.5]], dtype=torch.float64)
    x_hat = itda.pursue(x, atoms, 2).decode(atoms)
    cosine = [0.012013, 0, 0, 0, 0.122336, 0.122336, 0, 0.038839]
    relative = [0.035714, 0, 0, 0.25, 0.333333, 0.333333, 0, 0.367647]
    np.testing.assert_allclose(LOSSES["cosine"](x, x_hat).numpy(), cosine, atol=1e-6)
    np.testing.assert_allclose(LOSSES["relative"](x, x_hat).numpy(), relative, atol=1e-6)


def test_batch_admission_is_what_it_says():
    x = low_rank(1200)
    atoms, rows = np.zeros((0, 32)), []
    for start in range(0, 1200, 200):
        new = []
        for t in range(start, start + 200):
            row = x[t].double().numpy()
            _, steps, residual = reference.mp(row, atoms, 4)
            norm = math.sqrt(reference.energy(row))
            failed = norm and reference.energy(residual) / norm**2 > 0.05
            earlier = [abs(row @ a) for a in new] + [abs(c) for c in steps[:1]]
            repeats = any(cosine >= (1 - 1e-6) * norm for cosine in earlier)
            if failed and not repeats:
                new.append(row / norm)
                rows.append(t)
        atoms = np.concatenate([atoms, np.array(new).reshape(-1, 32).astype(np.float32)])
    assert 20 < len(rows) < 1000
    assert rows_of(build(x.split(200), k=4, threshold=0.05, admission="batch")) == rows


def test_batch_admission_stops_in_a_batch():
    model = build(gaussian(400).split(100), k=3, threshold=0.05, admission="batch", max_atoms=37)
    assert rows_of(model) == list(range(37))


@pytest.mark.parametrize(("wish", "make"), [(200, low_rank), (800, low_rank), (300, gaussian)])
def test_n_atoms_lands_within_a_tenth(wish, make):
    x = make(5_000)
    model = build(x.split(500), k=4, n_atoms=wish)
    assert abs(len(model) - wish) <= 0.1 * wish
    assert model.cfg["threshold"] == model.cfg["thresholds"][-1][1]
    other = build(x.split(777), k=4, n_atoms=wish, chunk_size=31)
    assert rows_of(other) == rows_of(model)


def test_n_atoms_from_a_short_stream():
    model = build([gaussian(300)], k=4, n_atoms=40)
    assert abs(len(model) - 40) <= 4


def saved(model, path):
    model.save(path)
    return [file.read_bytes() for file in sorted(path.iterdir()) if file.name != folder.CHECKPOINT]


STANDARD = dict(center=True, max_norm=5.0, scale="std")


@pytest.mark.parametrize(
    "settings",
    [
        dict(threshold=0.02),
        dict(threshold=0.02, center=True),
        dict(n_atoms=300),
        dict(threshold=0.1, **STANDARD),
        dict(n_atoms=300, **STANDARD),
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(tmp_path, settings, monkeypatch):
    """Stopped after every few batches and started again, to the same bytes."""
    monkeypatch.setattr(builder, "MEAN_TOKENS", 1000)
    x = low_rank(6_000)
    if "max_norm" in settings:
        x[5::90, 7] = 3e4
    batches = x.split(200)
    want = saved(build(batches, k=4, **settings), tmp_path / "whole")
    stops = 0
    while True:
        seen = []
        try:
            stop = lambda: progresses(seen) == 13 + 7 * stops  # noqa: B023, E731 (with batches that were judged before)
            how = dict(checkpoint=tmp_path / "parts", progress=seen.append, stop=stop)
            model = build(batches, k=4, **how, **settings)
            break
        except KeyboardInterrupt:
            stops += 1
            assert (tmp_path / "parts" / folder.CHECKPOINT).is_file()
    assert stops == 3
    assert saved(model, tmp_path / "parts") == want


def test_a_damaged_checkpoint_and_too_few_tokens_are_refused(tmp_path):
    asked = iter(range(99))
    with pytest.raises(KeyboardInterrupt):
        stop = lambda: next(asked) == 5  # noqa: E731
        build(gaussian(2000).split(200), k=3, threshold=0.1, checkpoint=tmp_path, stop=stop)
    with pytest.raises(itda.InputError, match="has read 1,200 tokens, more than the `tokens` = 100 given"):
        build(gaussian(2000).split(200), k=3, threshold=0.1, checkpoint=tmp_path, tokens=100)
    path = tmp_path / folder.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")  # texts of labels stand last
    with pytest.raises(itda.InputError, match="remove it to start again"):
        build(gaussian(2000).split(200), k=3, threshold=0.1, checkpoint=tmp_path)


def interrupted(stream, folder, after=4):
    with pytest.raises(KeyboardInterrupt):
        asked = iter(range(99))
        build(stream, k=3, threshold=0.2, checkpoint=folder, stop=lambda: next(asked) == after)


def test_resume_skips_what_was_judged(tmp_path, monkeypatch):
    x = gaussian(1000)
    interrupted(x.split(100), tmp_path)
    judged, update = [], builder.Builder.update
    monkeypatch.setattr(builder.Builder, "update", lambda self, x, labels: [judged.append(x), update(self, x, labels)])
    model = build(x.split(150), k=3, threshold=0.2, checkpoint=tmp_path)
    assert torch.equal(torch.cat(judged), x[500:])
    assert rows_of(model) == rows_of(build(x.split(100), k=3, threshold=0.2))


def test_resume_refuses_other_activations(tmp_path):
    x = gaussian(1000)
    interrupted(x.split(100), tmp_path)
    before = (tmp_path / folder.CHECKPOINT).read_bytes()
    other = x.clone()
    other[499, 3] += 1e-6
    for stream, said in (
        (other.split(70), "have changed in their first 500 tokens"),
        (x.double().split(100), "have changed in their first 500 tokens"),
        (x[:450].split(100), "ends after 450 tokens, and the unfinished build has read 500"),
    ):
        with pytest.raises(itda.InputError, match=said):
            build(stream, k=3, threshold=0.2, checkpoint=tmp_path)
        assert (tmp_path / folder.CHECKPOINT).read_bytes() == before
    model = build(x.numpy(), k=3, threshold=0.2, checkpoint=tmp_path)
    assert rows_of(model) == rows_of(build(x, k=3, threshold=0.2))


def test_a_checkpoint_with_one_bit_changed_is_refused(tmp_path):
    x = gaussian(1000).split(100)
    interrupted(x, tmp_path)
    path = tmp_path / folder.CHECKPOINT
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    position = data.index(b'position\\": 500')
    for place in (header + 3, len(data) // 2, len(data) - 1, position + len(b'position\\": ')):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(itda.InputError, match="remove it to start again"):
            build(x, k=3, threshold=0.2, checkpoint=tmp_path)
    path.write_bytes(data)
    (tmp_path / f".{folder.CHECKPOINT}.tmp-{'0' * 16}").write_bytes(b"of a killed writer")
    build(x, k=3, threshold=0.2, checkpoint=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [folder.CHECKPOINT]


def test_a_checkpoint_that_could_not_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(itda.InputError, match="is a file"):
        build(gaussian(100), k=3, threshold=0.2, checkpoint=tmp_path / "file")
    for name in ("../evil", "a/b", ".."):
        with pytest.raises(itda.InputError, match="name without slashes"):
            build([{name: gaussian(100)}], k=3, threshold=0.2, checkpoint=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_under_another_default_device(tmp_path):
    x = gaussian(300)
    want = build(x, k=3, threshold=0.2)
    with torch.device("meta"):
        model = build(x, k=3, threshold=0.2)
    assert torch.equal(model.norms, want.norms) and model.losses.device.type == "cpu"


def test_resume_when_one_of_several_is_full(tmp_path):
    """A dictionary that is full judges no more, but its stream goes on."""
    x = gaussian(600)
    stream = [{"a": part, "b": 0 * part + part[0]} for part in x.split(50)]
    whole = build(stream, k=3, threshold=0.2, max_atoms=40)
    asked = iter(range(99))
    with pytest.raises(KeyboardInterrupt):
        build(stream, k=3, threshold=0.2, max_atoms=40, checkpoint=tmp_path, stop=lambda: next(asked) == 6)
    model = build(stream, k=3, threshold=0.2, max_atoms=40, checkpoint=tmp_path)
    assert {name: rows_of(part) for name, part in model.items()} == {n: rows_of(part) for n, part in whole.items()}
    assert len(model["a"]) == 40 > len(model["b"])


def test_resume_refuses_other_settings(tmp_path):
    asked = iter(range(99))
    with pytest.raises(KeyboardInterrupt):
        build(gaussian(500).split(100), k=3, threshold=0.2, checkpoint=tmp_path, stop=lambda: next(asked) == 2)
    with pytest.raises(itda.InputError, match=r"started with threshold = 0\.2, and this one has 0\.3"):
        build(gaussian(500).split(100), k=3, threshold=0.3, checkpoint=tmp_path)
    path = tmp_path / folder.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(itda.InputError, match=r"cannot be read .* remove it to start again"):
        build(gaussian(500).split(100), k=3, threshold=0.2, checkpoint=tmp_path)


def test_sample_is_spaced_evenly(monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 100)
    x = gaussian(1000)
    for batch in (1, 64, 1000):
        model = build(x.split(batch), k=3, threshold=0.4)
        assert model.sample.labels.position.tolist() == list(range(0, 1000, 16))
    codes = model.encode(x[::16])
    assert torch.equal(model.sample.codes.values, codes.values)
    centred = x[::16] - x[::16].mean(0)
    fvu = (x[::16] - model.decode(codes)).square().sum() / centred.square().sum()
    assert model.cfg["fvu"] == pytest.approx(float(fvu), rel=1e-5)


def test_memory_does_not_grow_with_the_stream():
    """What a build keeps are atoms and a sample; batches are let go."""
    import gc
    import weakref

    alive = []

    def stream():
        for i in range(20):
            part = low_rank(200, seed=i)
            alive.append(weakref.ref(part))
            yield part

    held = []

    def watch(progress):
        gc.collect()
        held.append(sum(ref() is not None for ref in alive))

    build(stream(), k=3, threshold=0.3, progress=watch)
    assert max(held[1:-1]) <= 3


def test_progress_tells_how_far():
    seen = []
    build(gaussian(500).split(100), k=3, threshold=0.2, tokens=450, progress=seen.append)
    assert [p.tokens for p in seen[:-1]] == [100, 200, 300, 400, 450]
    assert seen[-1] is None
    assert seen[0].total == 450
    assert "of 450 tokens" in str(seen[0])


def test_choosing_a_threshold_is_told_and_can_be_stopped():
    seen = []
    build(gaussian(500).split(100), k=3, n_atoms=60, progress=seen.append)
    steps = [step for step in seen if isinstance(step, Step)]
    assert [step.tokens for step in steps] == list(range(len(steps))) and steps
    assert "choosing a threshold" in str(steps[0])

    def stop():
        return any(isinstance(step, Step) for step in seen)

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        build(gaussian(500).split(100), k=3, n_atoms=60, progress=seen.append, stop=stop)
    assert sum(isinstance(step, Step) for step in seen) == 1


def test_the_last_progress_has_the_atoms_that_waited_for_the_mean():
    seen = []
    model = itda.build(gaussian(500).split(100), k=3, threshold=0.2, progress=seen.append)
    assert seen[-1] is None
    assert (seen[-2].tokens, seen[-2].atoms) == (500, len(model)) and seen[-3].atoms == 0
    assert seen[-2].seconds >= seen[-3].seconds


def untyped_build(*args, **settings):
    """`itda.build` past the type checker of the tests, as a user would call it."""
    return untyped(itda.build)(*args, **settings)


BAD = [
    (dict(k=0), "`k` is 0: pass a whole number, 1 or more"),
    (dict(k=-3), "`k` is -3"),
    (dict(threshold=-0.1), "`threshold` is -0.1"),
    (dict(threshold=1.5), "`threshold` is 1.5; loss 'relative' needs one from 0 to below 1"),
    (dict(threshold=math.nan), "`threshold` is nan"),
    (dict(n_atoms=0), "`n_atoms` is 0"),
    (dict(n_atoms=31), "`n_atoms` is 31 but the stream has 30 tokens"),
    (dict(n_atoms=5, threshold=0.1), "Both `threshold` (0.1) and `n_atoms` (5)"),
    (dict(n_atoms=5, admission="batch"), "`n_atoms` works with admission 'online' and 'sequential', not"),
    (dict(loss="huber"), "`loss` is 'huber'; choose one of 'relative', 'cosine', 'squared'"),
    (dict(loss="squared"), "and no default: give a `threshold`"),
    (dict(admission="random"), "`admission` is 'random'"),
    (dict(max_atoms=0), "`max_atoms` is 0"),
    (dict(k=10**18), "pass at most 65,536 pursuit steps"),
    (dict(tokens=1.5), "`tokens` is 1.5"),
    (dict(tokens=0), "`tokens` is 0"),
    (dict(tokens=-5, n_atoms=3), "`tokens` is -5"),
    (dict(chunk_size=0), "`chunk_size` is 0"),
    (dict(max_norm=0.5), "`max_norm` is 0.5: pass how many times the median norm a token may have, 1 or more"),
    (dict(max_norm=math.inf), "`max_norm` is inf"),
    (dict(max_norm="five"), "`max_norm` is 'five'"),
    (dict(scale="variance"), "`scale` is 'variance'; choose one of 'none', 'std'"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=[s for _, s in BAD])
def test_bad_settings(settings, sentence):
    with pytest.raises(itda.InputError) as error:
        untyped_build([gaussian(30)], **settings)
    assert sentence in str(error.value)


def nan_at(t):
    x = gaussian(20)
    x[t, 3] = math.inf
    return x


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("loss", ["relative", "cosine", "squared"])
def test_losses_at_the_ends_of_float32(loss, scale):
    """Squares that float32 does not hold are taken in float64."""
    x = gaussian(200, d=8) * scale
    threshold = {"relative": 0.2, "cosine": 0.05, "squared": 4.0 * scale**2}[loss]
    want = one_at_a_time(x, 3, threshold, loss)
    assert len(want) > 5
    model = build([x], k=3, threshold=threshold, loss=loss)
    assert rows_of(model) == want
    assert loss == "squared" or bool(torch.isfinite(model.sample.losses).all())


STREAMS = [
    ([], "The stream is empty"),
    ([torch.zeros(0, 4)], "no valid token"),
    ([gaussian(20), nan_at(7)], "prompt 0, position 27 is not finite (entry 3 is inf)"),
    (
        [gaussian(20), gaussian(20, d=5)],
        "has shape (20, 5), but those before it had d = 24: pass those of one hook point",
    ),
    ([gaussian(20).int()], "torch.int32 of shape (20, 24)"),
    ([gaussian(20)[0]], "torch.float32 of shape (24,): pass a floating-point tensor (tokens, d)"),
    ([(gaussian(20), Labels.counted(0, 19))], "20 activations but 19 labels: pass one for each"),
    ([gaussian(20).double() * 1e300], "prompt 0, position 0 is too large"),
    ([torch.zeros(5, 0)], "torch.float32 of shape (5, 0)"),
    ([torch.tensor(1.0)], "An item of the stream is of type Tensor"),
    ([gaussian(20).tolist()], "An item of the stream is of type list: pass activations (tokens, d)"),
    ([(5, Labels.counted(0, 5))], "An item of the stream is of type tuple"),
    (5, "The stream is of type int: pass an iterable of activations"),
    ([{}], "The stream is empty"),
    ([{"a": gaussian(9), "b": gaussian(7)}], "{'a': 9, 'b': 7} tokens by hook point"),
    ([{"a": gaussian(9), "b": gaussian(9)}, {"a": gaussian(9)}], "pass as many at each of ['a', 'b']"),
    ([{"a": gaussian(9)}, gaussian(9)], "pass as many at each of ['a']"),
]


@pytest.mark.parametrize(("stream", "sentence"), STREAMS, ids=[s for _, s in STREAMS])
def test_bad_streams(stream, sentence):
    with pytest.raises(itda.InputError) as error:
        untyped_build(stream, k=3)
    assert sentence in str(error.value)


def test_n_atoms_of_nothing():
    with pytest.raises(
        itda.InputError, match="first 30 activations came as zero, so no threshold can be chosen: pass `threshold`"
    ):
        build([torch.zeros(30, 4)], n_atoms=5)


def test_n_atoms_needs_the_length_of_the_stream():
    with pytest.raises(itda.InputError, match="give `tokens`"):
        build((part for part in gaussian(100).split(10)), n_atoms=5)


@pytest.mark.parametrize(("d", "k", "tokens", "wish"), [(8, 2, 2000, 700), (32, 4, 3000, 1000), (64, 8, 5000, 2500)])
def test_a_wished_size_is_met_on_short_streams(d, k, tokens, wish):
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(1))
    assert abs(len(build(x, k=k, n_atoms=wish)) / wish - 1) < 0.1


def test_a_stream_may_use_its_memory_again():
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))

    def stream():
        buffer = torch.empty(100, 16)
        for part in x.split(100):
            buffer.copy_(part)
            yield buffer

    found = build(stream(), k=3, threshold=0.3, center=True)
    assert torch.equal(found.atoms, build(x.split(100), k=3, threshold=0.3, center=True).atoms)


def test_labels_must_be_as_many_as_activations():
    for n in (9, 11):
        with pytest.raises(itda.InputError, match=f"10 activations but {n} labels"):
            itda.build([(torch.randn(10, 4), itda.Labels.counted(0, n))], k=2)


def test_settings_from_numpy():
    x = torch.randn(60, 4)
    want = itda.build(x, k=2, threshold=0.2, max_atoms=9)
    found = untyped_build(x, k=np.int64(2), threshold=np.float64(0.2), max_atoms=np.int32(9), chunk_size=np.int64(7))
    assert torch.equal(want.atoms, found.atoms) and type(found.k) is int


@pytest.mark.parametrize(
    "settings", [{"k": None}, {"chunk_size": None}, {"center": "no"}, {"checkpoint_seconds": float("nan")}], ids=str
)
def test_settings_of_another_type(settings):
    with pytest.raises(itda.InputError, match=f"`{next(iter(settings))}` is"):
        untyped_build(torch.randn(60, 4), **settings)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 300), (torch.float32, 1e-25), (torch.float32, 1e25)])
def test_measures_do_not_depend_on_the_scale_or_the_dtype(dtype, scale):
    x = (torch.randn(100, 32).double() * scale).to(dtype)
    x_hat = (x.double() * 0.9).to(dtype)
    assert metrics.fvu(x, x_hat) == pytest.approx(0.01, rel=0.05)
    assert float(metrics.relative_error(x, x_hat).mean()) == pytest.approx(0.01, rel=0.05)
    assert float(metrics.cosine(x, x_hat).mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 20])
def test_fvu_is_of_all_tokens_however_many_are_held(tokens, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)
    x, x_hat = torch.randn(2, tokens, 5).double() + 3
    spread = (x - x.mean(0)).square().sum()
    whole = float((x - x_hat).square().sum() / spread) if spread > 1e-20 else math.nan
    assert metrics.fvu(x, x_hat) == pytest.approx(whole, rel=1e-12, nan_ok=True)
    assert metrics.fvu(x.numpy(), x_hat.numpy()) == pytest.approx(whole, rel=1e-12, nan_ok=True)
    assert math.isnan(metrics.fvu(x[:0], x_hat[:0]))


# -- massive tokens, and coordinates over their deviations ------------------------------------------------------------


def massive(tokens=1700, every=90):
    """`low_rank` with one coordinate at some 10^4 times the others in a few tokens, as language models have them."""
    x = low_rank(tokens)
    x[5::every, 7] = 3e4
    return x, np.delete(np.arange(tokens), np.arange(5, tokens, every))


def test_massive_tokens_do_not_move_the_mean():
    x, usual = massive()
    model = itda.build(x.split(100), k=4, threshold=0.05)
    torch.testing.assert_close(model.mean, x[torch.from_numpy(usual)].mean(0))
    assert model.cfg["massive"] | {"norm": 0} == {"norm": 0, "left_out_of_mean": 19, "left_out": None}
    assert 5 in rows_of(model)  # it is still an atom
    # Where none is massive, the mean is the plain one to the last bit, and nothing is said.
    plain = itda.build(low_rank().split(100), k=4, threshold=0.05)
    assert torch.equal(plain.mean, torch.from_numpy(low_rank().double().numpy().mean(axis=0)).float())
    assert not {"massive", "max_norm", "scale"} & set(plain.cfg) and plain.scale is None


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "settings", [dict(), dict(admission="batch"), dict(scale="std"), dict(scale="sqrt"), dict(loss="cosine")], ids=str
)
def test_tokens_beyond_max_norm_are_as_if_they_were_not_there(center, settings):
    x, usual = massive()
    how = dict(k=4, threshold=2e-3 if "loss" in settings else 0.05, center=center, **settings)
    batches = x.split(100 if "admission" not in settings else len(x))
    model, without = build(batches, max_norm=5.0, **how), build([x[torch.from_numpy(usual)]], **how)
    assert rows_of(model) == usual[rows_of(without)].tolist() and 5 not in rows_of(model)
    assert torch.equal(model.atoms, without.atoms) and model.cfg["massive"]["left_out"] == 19
    assert model.cfg["tokens"] == len(x) and model.cfg["sample_tokens"] == len(x)
    if center:
        assert torch.equal(model.mean, without.mean)


@pytest.mark.parametrize(
    "settings", [dict(threshold=0.05), dict(n_atoms=300), dict(threshold=0.05, max_atoms=77)], ids=str
)
def test_standardised_and_without_massive_tokens_for_every_chunk_size(settings):
    x, usual = massive(2600)
    found = [
        build(x.split(batch), k=4, chunk_size=chunk, **STANDARD, **settings)
        for chunk, batch in [(1, 64), (37, 500), (4096, 10_000)]
    ]
    for model in found[1:]:
        assert rows_of(model) == rows_of(found[0]) and torch.equal(model.atoms, found[0].atoms)
        assert model.cfg["massive"] == found[0].cfg["massive"] and model.cfg["tokens"] == found[0].cfg["tokens"]
    assert set(rows_of(found[0])) <= set(usual)
    if "threshold" in settings:
        rest = found[0].standardised(x)[torch.from_numpy(usual)]
        want = usual[one_at_a_time(rest, 4, 0.05)].tolist()
        assert rows_of(found[0]) == want[: settings.get("max_atoms")]
    else:
        assert abs(len(found[0]) - 300) <= 30


def test_a_wished_size_is_met_where_half_of_the_stream_is_left_out():
    x = gaussian(5000)
    model = build(x.split(500), k=4, n_atoms=400, max_norm=1.0)
    assert 2300 < model.cfg["massive"]["left_out"] < 2700 and abs(len(model) - 400) <= 40
    assert rows_of(build(x.split(777), k=4, n_atoms=400, max_norm=1.0, chunk_size=31)) == rows_of(model)


def test_which_tokens_are_beyond_is_not_a_matter_of_rounding():
    x = gaussian(64, d=700)
    size = metrics.norms(x)
    exact = [math.sqrt(math.fsum(row * row)) for row in x.double().numpy()]
    assert size == pytest.approx(exact, rel=1e-14)
    assert (metrics.norms(x[3:4]) == size[3:4]).all() and (metrics.norms(x.numpy()) == size).all()
    for row in range(64):
        assert row in standard.within(x, size[row]) and row in standard.within(x[[row, row]], size[row]) + row
        assert row not in standard.within(x, np.nextafter(size[row], 0))


@pytest.mark.parametrize(("scale", "power"), [("std", 1.0), ("sqrt", 0.5)])
def test_each_coordinate_is_over_its_deviation_or_the_root_of_that(tmp_path, scale, power):
    x = low_rank()
    x[:, 3] *= 1000  # which would be nearly all of the norm
    model = itda.build(x.split(100), k=4, threshold=0.1, scale=scale)
    torch.testing.assert_close(model.scale, x.std(0, correction=0) ** power)
    rest = (x - model.mean) / model.scale
    assert rows_of(model) == one_at_a_time(rest, 4, 0.1) != rows_of(itda.build([x], k=4, threshold=0.1))
    model.save(tmp_path / "d")
    for d in (model, itda.ITDA.load(tmp_path / "d"), model.to("cpu")):
        assert torch.equal(d.scale, model.scale) and "standardised" in repr(d) and d.cfg["scale"] == scale
        codes = d.encode(x)
        assert torch.equal(codes.indices, itda.pursue(rest, d.atoms, k=4).indices)
        torch.testing.assert_close(d.decode(codes), codes.decode(d.atoms) * d.scale + d.mean)
        own = d.encode(x[rows_of(d)])
        assert own.indices[:, 0].tolist() == list(range(len(d))) and own.values[:, 0].numpy() == pytest.approx(d.norms)
    both = refine.refine(model, x, passes=1, labels=Labels.counted(0, len(x)))
    chosen = refine.select(model, x, 20, labels=Labels.counted(0, len(x)))
    assert torch.equal(both.scale, model.scale) and torch.equal(chosen.scale, model.scale)
    assert both.cfg["fvu_standardised"] < model.cfg["fvu_standardised"] < chosen.cfg["fvu_standardised"]


def test_a_unit_of_measure_changes_nothing_where_coordinates_are_over_their_deviations():
    x = low_rank()
    units = 2.0 ** torch.randint(-9, 9, (x.shape[1],), generator=torch.Generator().manual_seed(1))
    one, other = (itda.build([y], k=4, threshold=0.1, scale="std") for y in (x, x * units))
    assert rows_of(one) == rows_of(other) and torch.equal(one.atoms, other.atoms)


def test_coordinates_that_hardly_move_are_not_blown_up():
    x = gaussian(500, 12)
    x[:, 2] = 3.0
    x[:, 5] *= 1e-6
    model = itda.build([x], k=3, threshold=0.3, scale="std")
    assert model.scale[2] == model.scale[5] > 1e-4 and not model.atoms[:, [2, 5]].abs().max() > 0.01
    same = itda.build([x[:1].expand(40, -1)], k=3, threshold=0.3, scale="std", center=False)
    assert (same.scale == 1).all()
    x[400, 2] = 0.9 * LARGEST[torch.float32]
    with pytest.raises(itda.InputError, match=r"Coordinate 2 of an activation is .* deviations from its mean"):
        itda.build([x], k=3, threshold=0.3, scale="std")


def test_where_the_variance_lies_is_said():
    x, usual = massive()
    model = itda.build([x], k=4, threshold=0.05)
    found = model.cfg["variance"]
    spread = (x - x.mean(0)).square().sum(1)
    assert (found["massive"], found["tokens"]) == (19, 1700)
    assert found["massive_share"] == pytest.approx(float(spread[5::90].sum() / spread.sum()), rel=1e-5)
    said = metrics.concentrated(found)
    assert said.startswith("19 of 1,700 tokens hold 99% of the variance (|x| beyond 5 times the median, ")
    rest = x[torch.from_numpy(usual)]
    assert model.cfg["fvu_robust"] == pytest.approx(metrics.fvu(rest, model.reconstruct(rest)), rel=1e-4)
    assert model.cfg["fvu"] < 1e-5 < 1e-3 < model.cfg["fvu_robust"]
    inner = model.standardised(x)
    error = metrics.relative_error(inner, model.encode(x).decode(model.atoms))
    assert model.cfg["relative_error"] == pytest.approx(float(error.mean()))
    assert model.cfg["median_error"] == pytest.approx(float(np.median(error)))


def test_one_coordinate_that_holds_most_of_the_variance_is_said():
    x = gaussian(800, 20)
    x[:, 4] *= 9
    found = metrics.reconstruction(x, x * torch.where(torch.arange(20) == 4, 0.95, 0.5))
    single = [metrics.fvu(x[:, [i]], x[:, [i]] * (0.95 if i == 4 else 0.5)) for i in range(20)]
    assert found["fvu"] == found["fvu_robust"] < 0.06 < found["fvu_standardised"]
    assert found["fvu_standardised"] == pytest.approx(np.mean(single))
    assert metrics.concentrated(found["variance"]).startswith("coordinate 4 of 20 holds 8")
    assert metrics.concentrated(metrics.variance(gaussian(800, 20))) is None
    few = gaussian(800, 20) + 60
    few[3] = -60.0  # no longer than the others, but on the other side of the mean
    assert metrics.concentrated(metrics.variance(few)).startswith("1 of 800 tokens holds")
    for forged in ({}, {"massive_share": "x", "few_share": None}, {"massive_share": 0.9}):
        assert metrics.concentrated(forged) is None or "0 of 0" in metrics.concentrated(forged)


# -- interrupted again, while it recovers -----------------------------------------------------------------------------


def stopped(stream, folder, after, **how):
    """Build, stopped after so many items; the dictionary if it was done before."""
    asked = itertools.count(1)
    try:
        return build(stream, checkpoint=folder, stop=lambda: next(asked) == after, **how)
    except KeyboardInterrupt:
        return None


PLAIN = {
    "a list": lambda parts: parts,
    "arrays": lambda parts: [part.numpy() for part in parts],
    "pairs": lambda parts: [(part, Labels.counted(20 * i, len(part))) for i, part in enumerate(parts)],
    "a generator": iter,
    "two places": lambda parts: [{"a": part, "b": -2 * part + 1} for part in parts],
    "one full early": lambda parts: [{"a": part, "b": 0 * part + parts[0][:1]} for part in parts],
}


@pytest.mark.parametrize("kind", PLAIN)
def test_stopped_again_while_it_recovers(tmp_path, kind, monkeypatch):
    """A second stop at any item, those passed over included, loses nothing; a third call ends as if undisturbed."""
    monkeypatch.setattr(builder, "MEAN_TOKENS", 45)
    how = {"k": 2, "threshold": 0.2, "center": True} | ({"max_atoms": 20} if kind == "one full early" else {})
    parts = list(gaussian(200, d=8).split(20))
    made = PLAIN[kind]
    want = build(made(parts), **how)
    want = want if isinstance(want, dict) else {"": want}
    path = folder.CHECKPOINT
    for first, second in [(1, 1), (2, 1), (2, 4), (5, 1), (5, 4), (5, 5), (5, 6), (8, 3)]:
        place = tmp_path / f"{first}-{second}"
        assert stopped(made(parts), place, first, **how) is None
        kept = {p: p.stat().st_size for p in place.rglob(path)}
        assert kept and all(kept.values())  # also before the first token was judged
        found = stopped(made(parts), place, second, **how)
        found = build(made(parts), checkpoint=place, **how) if found is None else found
        found = found if isinstance(found, dict) else {"": found}
        assert {name: rows_of(part) for name, part in found.items()} == {n: rows_of(p) for n, p in want.items()}


def test_one_that_is_ahead_of_the_others_keeps_its_checkpoint(tmp_path):
    """Killed between the checkpoints of two dictionaries, then again before the first has caught up."""
    x = gaussian(200, d=8)
    parts = [{"a": part, "b": -2 * part + 1} for part in x.split(20)]
    how = {"k": 2, "threshold": 0.2, "center": False}
    want = build(parts, **how)
    stopped(parts, tmp_path, 3, **how)
    early = (tmp_path / "a" / folder.CHECKPOINT).read_bytes()
    stopped(parts, tmp_path, 8, **how)
    late = (tmp_path / "b" / folder.CHECKPOINT).read_bytes()
    (tmp_path / "a" / folder.CHECKPOINT).write_bytes(early)
    for after in (1, 2, 5, 7):
        stopped(parts, tmp_path, after, **how)
        assert after >= 7 or (tmp_path / "b" / folder.CHECKPOINT).read_bytes() == late
    model = build(parts, checkpoint=tmp_path, **how)
    assert {name: rows_of(part) for name, part in model.items()} == {n: rows_of(p) for n, p in want.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("admission", ["sequential", "batch", "paper"])
def test_the_first_tokens_are_kept(tmp_path, dtype, admission):
    """Stopped before the mean is known: nothing is read again, and batches stay what they were."""
    x, read = gaussian(200, d=8).to(dtype), []

    class Stream:
        hook_points, single, hash, skipped, skipped_hash = ("here",), True, None, 0, None

        def __iter__(self):
            for part in x[self.skipped :].split(20):
                read.append(len(part))
                yield part

        def skip(self, tokens):
            self.skipped = tokens
            return self

    how = {"k": 2, "threshold": 0.2, "admission": admission, "center": True}
    want = build(list(x.split(20)), **how)
    assert stopped(Stream(), tmp_path, 5, **how) is None
    read.clear()
    model = build(Stream(), checkpoint=tmp_path, **how)
    assert sum(read) == 100
    assert rows_of(model) == rows_of(want) and torch.equal(model.mean, want.mean)


def test_stopped_while_it_chooses_a_threshold(tmp_path):
    how = {"k": 2, "n_atoms": 30}
    parts, seen = list(gaussian(200, d=8).split(40)), []
    want = build(parts, **how)

    def stop():
        return any(isinstance(step, Step) for step in seen)

    with pytest.raises(KeyboardInterrupt):
        build(parts, checkpoint=tmp_path, progress=seen.append, stop=stop, **how)
    assert (tmp_path / folder.CHECKPOINT).exists()
    assert rows_of(build(parts, checkpoint=tmp_path, **how)) == rows_of(want)


def test_a_checkpoint_of_other_versions_is_refused(tmp_path):
    class Stream(list):
        pass

    stream: Any = Stream(gaussian(500).split(100))
    stream.provenance = {"model": {}, "stream": {}, "versions": {"torch": "2.13.0", "transformers": "4.57"}}
    stopped(stream, tmp_path, 3, k=3, threshold=0.2)
    stream.provenance = {**stream.provenance, "versions": {"torch": "2.12.1", "transformers": "4.57"}}
    said = "was started with torch 2.13.0, and this is torch 2.12.1, whose activations may differ in their last bits"
    with pytest.raises(itda.InputError, match=f"{said}: install the former version to go on, or remove .* to start"):
        build(stream, k=3, threshold=0.2, checkpoint=tmp_path)
    stream.provenance = {"model": {}, "stream": {}}  # as of versions that did not take them down
    build(stream, k=3, threshold=0.2, checkpoint=tmp_path)


def test_a_checkpoint_of_another_processor_is_refused(tmp_path):
    class Stream(list):
        provenance: Any

    stream = Stream(gaussian(500).split(100))
    stream.provenance = {"model": {}, "stream": {}, "versions": {"torch": "2", "processor": "GenuineIntel AVX512 AMX"}}
    stopped(stream, tmp_path, 3, k=3, threshold=0.2)
    stream.provenance = {**stream.provenance, "versions": {"torch": "2", "processor": "AuthenticAMD AVX512"}}
    said = (
        "started with processor GenuineIntel AVX512 AMX, and this is processor AuthenticAMD AVX512, whose activations"
    )
    with pytest.raises(
        itda.InputError, match=f"{said} may differ in their last bits: go on with the former kind, or remove"
    ):
        build(stream, k=3, threshold=0.2, checkpoint=tmp_path)
    stream.provenance = {**stream.provenance, "versions": {"torch": "2"}}  # as of before it was taken down
    build(stream, k=3, threshold=0.2, checkpoint=tmp_path)


def test_two_builds_with_one_checkpoint(tmp_path):
    parts = gaussian(500).split(100)

    def nested():
        yield parts[0]
        with ThreadPoolExecutor(1) as thread, pytest.raises(itda.InputError, match="Another process is building into"):
            thread.submit(build, parts, k=3, threshold=0.2, checkpoint=tmp_path).result()
        yield from parts[1:]

    build(nested(), k=3, threshold=0.2, checkpoint=tmp_path)


def test_what_was_left_out_of_admission_is_left_out_of_choosing_and_moving_atoms():
    x, usual = massive()
    some = torch.from_numpy(usual)
    model = itda.build([x], k=4, threshold=0.05, max_norm=5.0)
    labels = Labels.counted(0, len(x))
    for better in (
        lambda y, **how: refine.refine(model, y, passes=1, **how),
        lambda y, **how: refine.select(model, y, 30),
    ):
        found, without = better(x, labels=labels), better(x[some])
        assert torch.equal(found.atoms, without.atoms)
    assert found.cfg["selected"]["tokens"] == len(usual)
    assert refine.refine(model, x, passes=1, labels=labels).cfg["variance"]["massive"] == 19  # they are measured
    with pytest.raises(itda.InputError, match="19 activations came, and none within the"):
        refine.refine(model, x[5::90])
