"""Check an audio file's length against its own headers.

libsndfile silently reads what is left of a truncated WAV, OGG or MP3 file; for FLAC it raises an
error. All lengths are in samples of one channel.
"""

from __future__ import annotations

_UNKNOWN_SIZE = 0x7FFFF000
"""Programs that stream a WAV file write a size of at least this."""
_OGG_LAST_PAGE = 4
_KBPS = {  # MPEG layer III bit rates by four bits of the header; True: version 1, False: 2 and 2.5
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_HALVINGS = {3: 0, 2: 1, 0: 2}  # halvings of the rate, by the version bits


def is_truncated(data: bytes, kind: str) -> bool:
    """Return whether a file ends earlier than its headers say.

    Args:
        data: Contents of the file.
        kind: libsndfile's name of the format; only WAV, WAVEX and OGG are checked.
    """
    if kind in ("WAV", "WAVEX"):
        return _wav_is_truncated(data)
    return kind == "OGG" and _ogg_is_truncated(data)


def expected_samples(data: bytes, kind: str, frames: int, limit: int) -> int:
    """Return how many samples a file must have.

    Args:
        data: Contents of the file.
        kind: libsndfile's name of the format.
        frames: libsndfile's number of samples. For an MP3 without a Xing header it is a guess from
            the bit rate of the first frame, so the frames are counted instead.
        limit: Number of samples at which counting may stop.
    """
    return frames if kind != "MP3" or _has_xing(data) else _count_mp3_samples(data, limit)


def _wav_is_truncated(data: bytes) -> bool:
    """Return whether the `data` chunk is missing or incomplete."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return size < _UNKNOWN_SIZE and at + 8 + size > len(data)
        at += 8 + size + size % 2
    return True


def _ogg_is_truncated(data: bytes) -> bool:
    """Return whether the last page is incomplete or not marked as the last."""
    page = data[max(data.rfind(b"OggS"), 0) :]
    if len(page) < 27:
        return True
    segments = page[27 : 27 + page[26]]
    return not page[5] & _OGG_LAST_PAGE or 27 + page[26] + sum(segments) > len(page)


def _mp3_start(data: bytes) -> int:
    """Return the offset of the first frame, after the ID3 tag if there is one."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + sum(seven << shift for seven, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))


def _has_xing(data: bytes) -> bool:
    """Return whether the first frame states the number of frames."""
    start = _mp3_start(data)
    tag = max(data.find(name, start, start + 64) for name in (b"Xing", b"Info"))
    return tag >= 0 and bool(int.from_bytes(data[tag + 4 : tag + 8], "big") & 1)


def _count_mp3_samples(data: bytes, limit: int) -> int:
    """Count the samples of consecutive frames, up to `limit`."""
    at, count = _mp3_start(data), 0
    while count < limit:
        head = int.from_bytes(data[at : at + 4], "big")
        version, layer, bits, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
        if head >> 21 != 0x7FF or layer != 1 or version == 1 or bits in (0, 15) or rate == 3:
            break  # not a frame of known length; the rest is not counted
        per_frame = 1152 if version == 3 else 576
        hertz = _RATES[rate] >> _HALVINGS[version]
        at += per_frame * 125 * _KBPS[version == 3][bits] // hertz + (head >> 9 & 1)
        count += per_frame
    return count
