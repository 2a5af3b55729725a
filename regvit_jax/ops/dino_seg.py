"""DINO-seg: the box baseline of the LOST paper, from the class token's attention in the last block.

The published numbers come from code with two peculiarities, kept here unless `published=False`: of n connected parts,
numbered in reading order, the last is never chosen; and if there is only one, the box is put around all that lies
outside of it.
"""

import numpy as np
from scipy import ndimage


def mass_mask(attention_p: np.ndarray, mass: float) -> np.ndarray:
    """(P,) bool: the patches of largest attention that together hold at least `mass` of what goes to patches.

    Args:
      attention_p: (P,) from one query to the patches, not normalised over them.
      mass: share in (0, 1].

    Source: visualisation of Caron et al. 2021: kept is what lies above a cumulative 1 - mass, from the smallest up.
    """
    values_p = np.asarray(attention_p, np.float32)
    order_p = np.argsort(values_p, kind="stable")
    cumulative_p = np.cumsum(values_p[order_p] / values_p.sum(dtype=np.float32), dtype=np.float32)
    kept_p = np.empty(len(values_p), bool)
    kept_p[order_p] = cumulative_p > 1 - mass
    return kept_p


def dino_seg(attention_hw: np.ndarray, *, mass: float = 0.6, published: bool = True) -> np.ndarray:
    """(4,) int32 y0 x0 y1 x1, in patches, around the largest connected part of the mass mask; the first of equals.

    Args:
      attention_hw: (h, w) from the class token to the patches, of one head (LOST takes head 4).
      published: with the peculiarities at the top of the file.
    """
    shape = np.shape(attention_hw)
    parts_hw, count = ndimage.label(mass_mask(np.reshape(attention_hw, -1), mass).reshape(shape))
    sizes = np.bincount(parts_hw.reshape(-1), minlength=count + 1)
    if published:
        # Labels 0 to count - 1: the background, which counts as nothing, and all parts but the last.
        sizes = np.where(np.arange(count) == 0, 0, sizes[:count])
        chosen = int(np.argmax(sizes)) if count > 1 else 0
    else:
        chosen = 1 + int(np.argmax(sizes[1:]))
    rows, columns = np.nonzero(parts_hw == chosen)
    if not len(rows):  # all is one part, and nothing lies outside of it
        return np.array([0, 0, *shape], np.int32)
    return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1], np.int32)
