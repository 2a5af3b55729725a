"""k-NN: votes counted by hand, the protocol in float64 NumPy, and independence of how the work is cut."""

import numpy as np
import pytest

from regvit_jax.evals.knn import KNN, draw, few_shot_accuracy, knn_accuracy

# Angles in degrees on the unit circle: who is near whom can be read off.
BANK = np.array([0, 10, 12, 90, 95, 180])
LABELS = np.array([0, 1, 1, 2, 2, 3])


def circle(degrees, length=1.0):
    radians = np.deg2rad(np.asarray(degrees, np.float64))
    return (length * np.stack([np.cos(radians), np.sin(radians)], axis=1)).astype(np.float32)


def accuracy(queries, labels, mesh, classes=4, **options):
    return knn_accuracy(
        circle(BANK), LABELS, circle(queries), np.array(labels), num_classes=classes, mesh=mesh, **options
    )


def protocol(train, train_labels, test, test_labels, classes, ks, temperature):
    """The protocol written out: one query after the other, float64."""

    def unit(x):
        return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)

    right = {f"top{top}_k{k}": 0 for top in (1, 5) for k in ks}
    for query, label in zip(unit(test), test_labels, strict=True):
        similarity = unit(train) @ query
        nearest = np.argsort(-similarity, kind="stable")[: max(ks)]
        weights = np.exp(similarity[nearest] / temperature)
        weights /= weights.sum()
        for k in ks:
            votes = np.bincount(train_labels[nearest[:k]], weights[:k], minlength=classes)
            order = np.argsort(-votes, kind="stable")
            right[f"top1_k{k}"] += order[0] == label
            right[f"top5_k{k}"] += label in order[:5]
    return {name: count / len(test) for name, count in right.items()}


def test_the_nearest_neighbour(mesh):
    """3 degrees is nearest to 0 (class 0), 91 to 90 (class 2), 170 to 180 (class 3)."""
    assert accuracy([3, 91, 170], [0, 2, 3], mesh, k=(1,)) == {"top1_k1": 1.0}
    assert accuracy([3, 91, 170], [1, 2, 0], mesh, k=(1,)) == {"top1_k1": pytest.approx(1 / 3)}


def test_temperature_decides_between_one_near_and_two_farther(mesh):
    """From 4 degrees: class 0 at 4 (cos .99756), class 1 at 6 and 8 (.99452, .99027).

    At T = .07 the weights e^(cos/T) are .368, .352, .331 after scaling: class 1 has .683. At T = .001 they are as 1 to
    .048 and .0007: class 0 wins.
    """
    assert accuracy([4], [1], mesh, k=(3,), temperature=0.07) == {"top1_k3": 1.0}
    assert accuracy([4], [0], mesh, k=(3,), temperature=0.001) == {"top1_k3": 1.0}


def test_length_does_not_matter(mesh):
    options = dict(num_classes=4, k=(2,), mesh=mesh)
    labels = np.array([0, 2])
    small = knn_accuracy(circle(BANK, 1e-3), LABELS, circle([-5, 93], 1e4), labels, **options)
    assert small == accuracy([-5, 93], [0, 2], mesh, k=(2,))


@pytest.mark.parametrize(("queries", "bank"), [(1000, 1000), (7, 1000), (1000, 5), (3, 4)])
def test_equals_the_protocol_however_it_is_cut(queries, bank, mesh, mesh8):
    """Banks smaller than k, parts that do not divide, 8 devices that share 50 queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(7, 16))
    train_labels, test_labels = rng.integers(7, size=83), rng.integers(7, size=50)
    train = (centres[train_labels] + 1.5 * rng.normal(size=(83, 16))).astype(np.float32)
    test = (centres[test_labels] + 1.5 * rng.normal(size=(50, 16))).astype(np.float32)
    want = protocol(train, train_labels, test, test_labels, 7, (5, 10, 20), 0.07)
    assert 0.3 < want["top1_k5"] < 0.95 and len(set(want.values())) > 3, "the data must tell the numbers apart"
    options = dict(num_classes=7, k=(20, 5, 10), queries=queries, bank=bank)
    for where in (mesh, mesh8) if queries != 7 else (mesh,):
        assert knn_accuracy(train, train_labels, test, test_labels, mesh=where, **options) == pytest.approx(want)


def test_equal_neighbours_rank_by_place_however_the_bank_is_cut(mesh):
    """All bank rows are the same: k = 3 are the first three, classes 0, 1, 1, in one part or in six."""
    same = np.ones((6, 2), np.float32)
    for bank in (1, 2, 6):
        got = knn_accuracy(same, LABELS, same[:1], np.array([1]), num_classes=4, k=(3, 1), bank=bank, mesh=mesh)
        assert got == {"top1_k1": 0.0, "top1_k3": 1.0}


def test_more_neighbours_than_samples(mesh, caplog):
    got = accuracy([3, 91], [1, 2], mesh, k=(2, 10, 20))
    assert set(got) == {"top1_k2", "top1_k6"}
    assert "k=20" in caplog.text and "6 samples" in caplog.text


def test_evaluator_names_the_best_k(model, mesh, make_npz, tmp_path):
    """Coloured noise is told apart even by an untrained network."""
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 6, test=[0, 1, 2, 3] * 2)
    knn = KNN(data=f"npz:{path}", eval_data=f"npz:{path}#test", k=(1, 24), batch_size=8, feature="mean_patch")
    got = knn.run(model, mesh=mesh, out_dir=tmp_path)
    assert set(got) == {"top1", "top1_k1", "top1_k24"}
    assert got["top1"] == max(got["top1_k1"], got["top1_k24"]) == 1.0
    assert all(type(value) is float for value in got.values())


def test_banks_may_be_files_of_half_precision(mesh, tmp_path):
    """Mapped into memory and read part by part: the numbers of the same values in memory."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    x = (rng.normal(size=(60, 8)) + np.eye(4, 8)[labels]).astype(np.float16)
    np.save(tmp_path / "bank.npy", x)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    options = dict(num_classes=4, k=(5, 10), bank=16, mesh=mesh)
    got = knn_accuracy(mapped[:40], labels[:40], mapped[40:], labels[40:], **options)
    want = protocol(x[:40], labels[:40], x[40:], labels[40:], 4, (5, 10), 0.07)
    assert got == {name: want[name] for name in ("top1_k5", "top1_k10")}


def test_samples_are_drawn_by_class_and_seed():
    labels = np.array([2, 0, 2, 2, 0, 1, 2])
    first = draw(labels, 2, seed=0)
    assert (np.bincount(labels[first]) == [2, 1, 2]).all(), "class 1 has only one"
    assert (np.diff(first) > 0).all() and (draw(labels, 2, seed=0) == first).all()
    drawn = {tuple(draw(labels, 2, seed=seed)) for seed in range(40)}
    assert len(drawn) == 6, "two of the four of class 2"
    assert (draw(labels, 9, seed=0) == np.arange(7)).all()


def test_few_shots_are_means_over_draws_with_the_k_up_to_their_number(mesh):
    """k of 1, 2, 10 with 3 a class become 1, 2, 3, and the softmax runs over 3 neighbours."""
    rng = np.random.default_rng(1)
    centres, labels, test_labels = rng.normal(size=(6, 5)), np.arange(48) % 6, np.arange(30) % 6
    train = (centres[labels] + rng.normal(size=(48, 5))).astype(np.float32)
    test = (centres[test_labels] + rng.normal(size=(30, 5))).astype(np.float32)
    got = few_shot_accuracy(train, labels, test, test_labels, n=3, tries=2, k=(1, 2, 10), num_classes=6, mesh=mesh)
    draws = [draw(labels, 3, seed) for seed in (0, 1)]
    each = [protocol(train[d], labels[d], test, test_labels, 6, (1, 2, 3), 0.07) for d in draws]
    assert each[0] != each[1]
    want = {name.replace("_k", "_n3_k"): (value + each[1][name]) / 2 for name, value in each[0].items()}
    assert got == pytest.approx(want)


def test_evaluator_with_few_shots_and_with_all(model, mesh, make_npz, tmp_path):
    path = make_npz("colours.npz", train=[0, 1, 2, 3] * 6, test=[0, 1, 2, 3] * 2)
    data = dict(data=f"npz:{path}", eval_data=f"npz:{path}#test", batch_size=8, feature="mean_patch")
    got = KNN(**data, k=(1, 4), n_per_class=(0, 2), tries=3).run(model, mesh=mesh, out_dir=tmp_path)
    assert list(got) == ["top1", "top1_k1", "top1_k4", "top1_n2", "top1_n2_k1", "top1_n2_k2"]
    assert got["top1_n2"] == max(got["top1_n2_k1"], got["top1_n2_k2"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(k=()), "k must be one or more"),
        (dict(k=(0,)), "k must be one or more"),
        (dict(k=5), "k takes a tuple"),
        (dict(k=(1.5,)), r"k\[0\] takes a int"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(n_per_class=()), "n_per_class must be 0 or more"),
        (dict(tries=0), "tries must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(workers=True), "workers takes a int"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        KNN(**options)


def test_options_survive_json():
    assert KNN(k=[5, 7], temperature=1) == KNN(k=(5, 7), temperature=1.0)
