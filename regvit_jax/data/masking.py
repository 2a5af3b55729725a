"""Which patches of which crops are masked: random blocks, drawn inside jit, with static shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax.sharding import constrain
from regvit_jax.trees import Array

# Of one block: the least area wished for, the range of height / width, and how often another is tried where one does
# not fit.
MIN_AREA = 4.0
ASPECT = (0.3, 1 / 0.3)
TRIES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """Masked patches of G groups of C crops of P patches, and a list of them of static length M = `upper_bound`.

    Attributes:
      mask: (G, C, P) bool, True where masked.
      index: (G, M) int32, ascending, into the C * P patches of the group; padding repeats the last patch of the group.
      weight: (G, M) float32, 1 / (masked patches of that crop), 0 for padding: the weights of a crop sum to 1.
      valid: (G, M) bool, False for padding.
    """

    mask: Array
    index: Array
    weight: Array
    valid: Array


jax.tree_util.register_dataclass(Masks, data_fields=["mask", "index", "weight", "valid"], meta_fields=[])


def max_block_area(image_size: int, patch_size: int) -> int:
    """The most patches that one block may add, from sizes in pixels: 98 for 224 / 16, 128 for 224 / 14.

    It is half of the grid's area, rounded as the reference rounds: down after every division.
    """
    return int(0.5 * image_size // patch_size * image_size // patch_size)


def upper_bound(crops: int, patches: int, *, probability: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)) -> int:
    """M: no draw masks more patches of `crops` crops than this."""
    return int(_most(crops, patches, probability, ratio).sum())


def block_masks(
    key: Array,
    *,
    groups: int,
    crops: int,
    grid: tuple[int, int],
    max_area: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Masks:
    """Draws the masks of one step.

    In every group int(crops * probability) crops are masked, in random order. The i-th of these n wants a share of its
    patches drawn uniformly from the i-th of n equal parts of `ratio`, so that the sizes of a group are spread evenly
    and their sum has a bound. Then rectangles are added, of random area, aspect and place, until the share is reached.
    A rectangle is drawn up to 10 times until it fits inside and adds at least one patch and not more than are wanted;
    if none of these does, the crop keeps what it has.

    Every device computes all of it, from draws at global shape: nothing is sent, and no mesh changes a mask.

    Args:
      key: randomness of this step.
      groups: G.
      crops: C, the global crops of one group (both views of its images).
      grid: (h, w) of the patches of a crop, P = h * w.
      max_area: the most patches that one block may add: `max_block_area`.
      probability: share of the crops that are masked.
      ratio: range of the masked share of a masked crop.

    Raises:
      ValueError: for a ratio or probability that is no share.

    Source: BEiT (Bao et al. 2022), algorithm 1; what is drawn for a batch, DINOv2's code.
    """
    height, width = grid
    patches, most_n = height * width, _most(crops, height * width, probability, ratio)
    masked = len(most_n)
    key_size, key_blocks, key_order = jax.random.split(key, 3)
    edges = np.linspace(*ratio, masked + 1)
    share = jax.random.uniform(key_size, (groups, masked)) * (edges[1:] - edges[:-1]) + edges[:-1]
    wanted_gn = jnp.minimum((patches * share).astype(jnp.int32), most_n)
    blocks = constrain(_draw(key_blocks, constrain(wanted_gn), height, width, max_area))
    empty = jnp.zeros((groups, crops - masked, patches), bool)
    mask_gcp = jnp.concatenate([blocks.reshape(groups, masked, patches), empty], axis=1)
    order_gc = jnp.argsort(jax.random.uniform(key_order, (groups, crops)), axis=1)
    mask_gcp = constrain(jnp.take_along_axis(mask_gcp, order_gc[..., None], axis=1))
    return _listed(mask_gcp, int(most_n.sum()))


def _most(crops: int, patches: int, probability: float, ratio: tuple[float, float]) -> np.ndarray:
    """(n,) int: the most patches that each of the n masked crops of a group can want."""
    low, high = ratio
    if not (0 <= probability <= 1 and 0 <= low <= high <= 1):
        raise ValueError(f"probability and both ends of ratio are shares, 0 to 1; got {probability} and {tuple(ratio)}")
    edges = np.linspace(low, high, int(crops * probability) + 1)
    return (patches * edges[1:]).astype(np.int32)


def _draw(key: Array, wanted_gn: Array, height: int, width: int, max_area: int) -> Array:
    """(G, n, h, w) bool. Every round adds one block to each mask that still wants patches: the first of TRIES drawn at
    once that fits, which is the same as trying one after the other."""
    log_low, log_high = np.log(ASPECT)
    rows, columns = jnp.arange(height), jnp.arange(width)

    def place(state):
        mask_gnhw, open_gn, turn = state
        # As one row: XLA takes 15 s to compile random bits of a shape with several short axes for a CPU.
        u = jax.random.uniform(jax.random.fold_in(key, turn), (4 * wanted_gn.size * TRIES,))
        u = u.reshape(4, *wanted_gn.shape, TRIES)
        room_gn = jnp.minimum(wanted_gn - mask_gnhw.sum((-2, -1)), max_area)
        area = MIN_AREA + u[0] * (room_gn[..., None] - MIN_AREA)
        aspect = jnp.exp(log_low + u[1] * (log_high - log_low))
        # jnp.round rounds halves to the even number, as Python does.
        h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        top, left = jnp.floor(u[2] * (height - h + 1)), jnp.floor(u[3] * (width - w + 1))
        in_rows = (rows >= top[..., None]) & (rows < (top + h)[..., None])
        in_columns = (columns >= left[..., None]) & (columns < (left + w)[..., None])
        free_gnhw = ~mask_gnhw
        # Counts below 2**24 are exact in float32.
        new = jnp.einsum(
            "gnty,gnyx,gntx->gnt",
            *(x.astype(jnp.float32) for x in (in_rows, free_gnhw, in_columns)),
            precision=jax.lax.Precision.HIGHEST,
        )
        fits = (h < height) & (w < width) & (new > 0) & (new <= room_gn[..., None])
        fits &= open_gn[..., None]
        first = jnp.argmax(fits, axis=-1)[..., None, None]
        block = jnp.take_along_axis(in_rows, first, axis=2)[:, :, 0, :, None]
        block &= jnp.take_along_axis(in_columns, first, axis=2)[:, :, 0, None, :]
        added = fits.any(axis=-1)
        mask_gnhw |= block & added[..., None, None]
        return mask_gnhw, added & (mask_gnhw.sum((-2, -1)) < wanted_gn), turn + 1

    empty = jnp.zeros((*wanted_gn.shape, height, width), bool)
    state = (empty, wanted_gn > 0, jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[1].any(), place, state)[0]


def _listed(mask_gcp: Array, bound: int) -> Masks:
    """The masks with the list of their patches, padded to `bound`."""
    groups, crops, patches = mask_gcp.shape
    flat = mask_gcp.reshape(groups, crops * patches)
    # Where the running count first reaches j is patch j of the list.
    counts = jnp.cumsum(flat, axis=1, dtype=jnp.int32)
    number = jnp.arange(1, bound + 1, dtype=jnp.int32)
    index = jax.vmap(lambda row: jnp.searchsorted(row, number))(counts)
    valid = number <= counts[:, -1:]
    index = jnp.minimum(index, crops * patches - 1).astype(jnp.int32)
    of_crop = mask_gcp.sum(axis=-1, dtype=jnp.float32)
    weight = jnp.where(valid, 1.0 / jnp.maximum(jnp.take_along_axis(of_crop, index // patches, axis=1), 1.0), 0.0)
    return Masks(mask_gcp, index, weight, valid)
