"""k-NN: an evaluation image takes the label that its nearest training images vote for. Nothing is learnt or tuned.

Cosine similarity of one feature an image; the max(k) nearest vote with weights softmax(similarity / temperature).
Source: Wu et al. 2018, with the protocol of DINOv2: one softmax over the largest k, of which a smaller k sums a part.
With few samples a class, drawn several times, the k are those up to that number, and the number itself.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import labelled_pair, multiple_of
from regvit_jax.evals.metrics import top_k_hits, tops
from regvit_jax.trees import Array

# Similarities in memory at once: QUERIES (a device) x BANK float32, 64 MiB. The bank is never whole on a device.
QUERIES = 1024
BANK = 16384

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(Evaluator):
    """k-nearest-neighbour accuracy on the features after the final norm. See the top of the file.

    Metrics: "top1_k10" for each k (and "top5_k10" with more than 5 classes); "top1" and "top5" are the best over k, as
    in published k-NN numbers, whose k is chosen on the evaluation set itself. With 5 samples a class they are called
    "top1_n5_k1" and "top1_n5", means over `tries` draws.
    """

    TRUTH = "label"

    k: tuple[int, ...] = option(
        (10, 20, 100, 200), "numbers of neighbours; at most as many as training samples are used"
    )
    temperature: float = option(0.07, "of the softmax over similarities that weighs the votes")
    feature: str = option("cls", "what is compared: cls | mean_patch, of the last block or another (block-4/cls)")
    n_per_class: tuple[int, ...] = option((0,), "training samples of each class that are drawn; 0: all are used")
    tries: int = option(1, "draws of n_per_class, with seeds 0, 1, …; their accuracies are averaged")

    def __post_init__(self):
        super().__post_init__()
        self.check("k", bool(self.k) and min(self.k, default=0) >= 1, "one or more numbers from 1 up")
        self.check("temperature", self.temperature > 0, "positive")
        self.check("n_per_class", bool(self.n_per_class) and min(self.n_per_class, default=0) >= 0, "0 or more, each")
        self.check("tries", self.tries >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        train, test = labelled_pair(self, model, (self.feature,), mesh)
        features = train.arrays[self.feature], train.labels, test.arrays[self.feature], test.labels
        found: dict[str, float] = {}
        for n in self.n_per_class:
            options = dict(num_classes=train.num_classes, temperature=self.temperature, mesh=mesh)
            if n:
                accuracies = few_shot_accuracy(*features, n=n, tries=self.tries, k=self.k, **options)
            else:
                accuracies = knn_accuracy(*features, k=self.k, **options)
            best: dict[str, float] = {}
            for name, value in accuracies.items():
                top = name.rpartition("_k")[0]
                best[top] = max(value, best.get(top, 0.0))
            found |= best | accuracies
        return found


def few_shot_accuracy(
    train_nd: np.ndarray, train_labels_n: np.ndarray, *test, n: int, tries: int, k: tuple[int, ...], **options
) -> dict[str, float]:
    """{"top1_n5_k1": …}: means of `knn_accuracy` over draws of `n` training samples a class with seeds 0 … tries - 1.

    The k are those of `k` up to `n`, and `n`. A class with fewer samples gives all it has.
    """
    ks = tuple(sorted({number for number in k if number <= n} | {n}))
    found = []
    for seed in range(tries):
        stopping.poll()
        drawn = draw(train_labels_n, n, seed)
        found.append(knn_accuracy(train_nd[drawn], train_labels_n[drawn], *test, k=ks, **options))
    names = {name: name.replace("_k", f"_n{n}_k") for name in found[0]}
    return {names[name]: float(np.mean([one[name] for one in found])) for name in found[0]}


def draw(labels_n: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rising places of `n` samples of every class, drawn without replacement; all of a class that has fewer."""
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels_n, kind="stable"), np.cumsum(np.bincount(labels_n))[:-1])
    few = sum(0 < len(places) < n for places in by_class)
    if few:
        _log.warning("k-NN with %d samples a class: %d classes have fewer and give all they have", n, few)
    return np.sort(np.concatenate([rng.permutation(places)[:n] for places in by_class]))


def knn_accuracy(
    train_nd: np.ndarray,
    train_labels_n: np.ndarray,
    test_md: np.ndarray,
    test_labels_m: np.ndarray,
    *,
    num_classes: int,
    k: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    mesh: Mesh,
    queries: int = QUERIES,
    bank: int = BANK,
) -> dict[str, float]:
    """{"top1_k10": share in [0, 1], …} of the test rows; equal similarities rank by place in the training set.

    Args:
      train_nd, test_md: features of any length, the same on every process; normalised here, part by part, so that there
        is never a second copy of them: they may be files mapped into memory, of any float type.
      queries, bank: rows of test (for each device) and of train that are compared at once.
    """
    n = len(train_nd)
    ks = tuple(sorted({min(number, n) for number in k}))
    if max(k) > n:
        _log.warning("k-NN with k=%d, but the training set has %d samples: k is clipped to it", max(k), n)
    classes = max(num_classes, int(train_labels_n.max()) + 1, int(test_labels_m.max()) + 1)
    rows = multiple_of(mesh, min(queries * mesh.shape["data"] * mesh.shape["fsdp"], len(test_md)))
    bank = min(bank, n)
    with jax.set_mesh(mesh):
        unit_queries = [sharding.replicate(_unit(part), mesh) for part in _parts(test_md, rows)]
        # No neighbour yet: a similarity below all, whose softmax weight is zero.
        empty = np.full((rows, ks[-1]), -np.inf, np.float32), np.zeros((rows, ks[-1]), np.int32)
        nearest = [sharding.replicate(empty, mesh) for _ in unit_queries]
        # Each part of the training set travels once; it meets all queries before the next one comes.
        for start in range(0, n, bank):
            stopping.poll()
            unit_bd = _unit(_padded(train_nd[start : start + bank], bank))
            labels_b = _padded(train_labels_n[start : start + bank].astype(np.int32), bank)
            part = sharding.replicate((unit_bd, labels_b, np.int32(min(bank, n - start))), mesh)
            before = nearest
            nearest = [_merge(found, query, *part) for found, query in zip(nearest, unit_queries, strict=True)]
            # The next part travels while this one is compared; without this all would, and lie on the devices together.
            jax.block_until_ready(before)
        hits = []
        for found, start in zip(nearest, range(0, len(test_md), rows), strict=True):
            labels = _padded(test_labels_m[start : start + rows].astype(np.int32), rows)
            valid = np.arange(start, start + rows) < len(test_md)
            hits.append(_vote(found, *sharding.replicate((labels, valid), mesh), classes, ks, temperature))
        counts = sharding.gather(hits)
    return {name: sum(int(count[name]) for count in counts) / len(test_md) for name in _names(ks, classes)}


@jax.jit
def _merge(
    nearest: tuple[Array, Array], unit_qd: Array, unit_bd: Array, labels_b: Array, valid: Array
) -> tuple[Array, Array]:
    """The k best of (similarities, labels), both (Q, k), and of the first `valid` rows of one more part of the bank."""
    similarity_qk, labels_qk = nearest
    unit_qd = sharding.constrain(unit_qd, sharding.BATCH)
    # The default precision of an accelerator rounds to bfloat16, which changes who is nearest.
    similarity_qb = jnp.matmul(unit_qd, unit_bd.T, precision=jax.lax.Precision.HIGHEST)
    similarity_qb = jnp.where(jnp.arange(len(labels_b)) < valid, similarity_qb, -jnp.inf)
    k = similarity_qk.shape[1]
    # Found earlier stands first: top_k keeps the first of equals, so that the order does not depend on the parts.
    best_qj, where_qj = jax.lax.top_k(similarity_qb, min(k, similarity_qb.shape[1]))
    candidates = jnp.concatenate([similarity_qk, best_qj], axis=1)
    labels = jnp.concatenate([labels_qk, labels_b[where_qj]], axis=1)
    best_qk, where_qk = jax.lax.top_k(candidates, k)
    best = best_qk, jnp.take_along_axis(labels, where_qk, axis=1)
    return jax.tree.map(lambda x: sharding.constrain(x, sharding.BATCH), best)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vote(nearest, labels_q, valid_q, classes: int, ks: tuple[int, ...], temperature: float) -> dict[str, Array]:
    """{"top1_k10": number of valid rows that are right} of neighbours (similarities, labels), (Q, k), best first."""
    similarity_qk, votes_qk = nearest
    weights_qk = jax.nn.softmax(similarity_qk / temperature, axis=1)
    hits = {}
    scores_qc = jnp.zeros((len(labels_q), classes))
    done = 0
    for k in ks:
        scores_qc = scores_qc.at[jnp.arange(len(labels_q))[:, None], votes_qk[:, done:k]].add(weights_qk[:, done:k])
        done = k
        hits |= {f"{top}_k{k}": count for top, count in top_k_hits(scores_qc, labels_q, valid_q).items()}
    return hits


def _names(ks, classes):
    return [f"top{top}_k{k}" for top in tops(classes) for k in ks]


def _unit(x_nd):
    """Rows of length 1, float32; a row of zeros stays."""
    x_nd = x_nd.astype(np.float32)
    return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)


def _parts(x, rows):
    return [_padded(x[start : start + rows], rows) for start in range(0, len(x), rows)]


def _padded(x, rows):
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


EVALUATOR = KNN
