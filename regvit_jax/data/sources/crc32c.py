"""CRC-32C (Castagnoli), the check sum of TFRecord files, with NumPy: 3 ns a byte, there is no library to ask for.

A CRC is linear: that of a message is the xor of what each byte contributes, which depends on its value and on how many
bytes follow. So blocks of bytes are looked up in one table, blocks of blocks in the next, and nothing is serial.

Source: RFC 3720, section 12.1 and appendix B.4; the mask of `masked` is that of TFRecord's description.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed
_BLOCK, _RADIX = 256, 16  # bytes of a block; blocks, or results of the level below, that are joined at once
_AT_ONCE = 512  # blocks: their indices stay in the cache


def crc32c(data: bytes) -> int:
    """The check sum of `data`."""
    values = np.frombuffer(data, np.uint8)
    # Zeros in front change nothing; the register starts with ones, which is the same as ones xored on the first bytes.
    length = max(1, -(-max(values.size, 4) // _BLOCK)) * _BLOCK
    message = np.zeros(length, np.uint8)
    message[length - values.size :] = values
    if values.size < 4:
        return _short(bytes(data))
    message[length - values.size :][:4] ^= 0xFF
    level = 0
    while True:
        message = _joined(message, level)
        if message.size == 1:
            return int(message[0]) ^ 0xFFFFFFFF
        missing = -message.size % _RADIX
        message = np.concatenate([np.zeros(missing, "<u4"), message]).view(np.uint8)
        level += 1


def of_rows(rows: np.ndarray) -> np.ndarray:
    """(n,) uint32, the check sums of rows of uint8 (n, width), width from 4 to 256."""
    table = _table(0)[_BLOCK - rows.shape[1] :]
    rows = rows.copy()
    rows[:, :4] ^= 0xFF
    return _looked_up(rows, table) ^ np.uint32(0xFFFFFFFF)


def masked(crc):
    """What TFRecord stores of a check sum, an int or an array of uint32."""
    rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def _short(data):
    register = 0xFFFFFFFF
    for value in data:
        register = int(_of_byte()[(register ^ value) & 0xFF]) ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _joined(message, level):
    """(n,) uint32 of bytes (n * width of the table,)."""
    table = _table(level)
    rows = message.reshape(-1, len(table))
    parts = [_looked_up(rows[start : start + _AT_ONCE], table) for start in range(0, len(rows), _AT_ONCE)]
    return np.concatenate(parts).astype("<u4", copy=False)


def _looked_up(rows, table):
    places = rows + np.arange(0, table.size, 256)
    return np.bitwise_xor.reduce(table.reshape(-1).take(places), axis=1)


@functools.cache
def _of_byte():
    """(256,) uint32: the register after one byte, from 0."""
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = np.where(register & 1, (register >> 1) ^ np.uint32(_POLYNOMIAL), register >> 1)
    return register


def _moved(registers, times):
    """Registers after 2**times bytes of zeros."""
    operator = _operator(times)
    split = [operator[place][(registers >> np.uint32(8 * place)) & np.uint32(0xFF)] for place in range(4)]
    return split[0] ^ split[1] ^ split[2] ^ split[3]


@functools.cache
def _operator(times):
    """(4, 256) uint32: where each byte of a register goes in 2**times bytes of zeros."""
    values = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    if times == 0:
        return _of_byte()[values & 0xFF] ^ (values >> np.uint32(8))
    return _moved(_moved(values, times - 1), times - 1)


@functools.cache
def _table(level):
    """(width, 256) uint32, what a value contributes at each place of a row: of 256 bytes, or of 16 results, 4 bytes
    each, of the level below."""
    if level == 0:
        rows, step, count = _of_byte()[None], 0, _BLOCK
    else:
        rows = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
        step, count = (_BLOCK * _RADIX ** (level - 1)).bit_length() - 1, _RADIX
    parts = [rows]
    for _ in range(count - 1):
        parts.append(_moved(parts[-1], step))
    return np.ascontiguousarray(np.concatenate(parts[::-1]))
