"""What an audio file's own headers tell of its length.

libsndfile reads what is left of a WAV, OGG or MP3 that was cut short, and says nothing. Of FLAC
it notices. All lengths are counted in samples of one channel.
"""

from __future__ import annotations

_OPEN = 0x7FFFF000
"""Sizes from here on are written by programs that do not know the size yet."""
_EOS = 4
_KBPS = {  # MPEG layer III, by the four bits of the header: version 1, then 2 and 2.5
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44100, 48000, 32000)
_HALVINGS = {3: 0, 2: 1, 0: 2}


def is_cut(data: bytes, kind: str) -> bool:
    """Whether a file of libsndfile's format `kind` ends before its headers say."""
    if kind in ("WAV", "WAVEX"):
        return _wav_is_cut(data)
    return kind == "OGG" and _ogg_is_cut(data)


def told_frames(data: bytes, kind: str, frames: int, most: int) -> int:
    """Samples that there must be, of the first `most` at least; `frames` is libsndfile's word.

    That word is a guess for an MP3 without a Xing header, by the bit rate of its first frame.
    """
    return frames if kind != "MP3" or _has_xing(data) else _mp3_samples(data, most)


def _wav_is_cut(data: bytes) -> bool:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return size < _OPEN and at + 8 + size > len(data)
        at += 8 + size + size % 2
    return True


def _ogg_is_cut(data: bytes) -> bool:
    """The last page must be whole, and marked as the last."""
    page = data[max(data.rfind(b"OggS"), 0) :]
    if len(page) < 27:
        return True
    segments = page[27 : 27 + page[26]]
    return not page[5] & _EOS or 27 + page[26] + sum(segments) > len(page)


def _mp3_start(data: bytes) -> int:
    """Where the first frame is: behind the ID3 tag, if there is one."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + sum(seven << shift for seven, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))


def _has_xing(data: bytes) -> bool:
    """Whether the first frame tells the number of frames."""
    start = _mp3_start(data)
    tag = max(data.find(name, start, start + 64) for name in (b"Xing", b"Info"))
    return tag >= 0 and bool(int.from_bytes(data[tag + 4 : tag + 8], "big") & 1)


def _mp3_samples(data: bytes, most: int) -> int:
    """Samples in frames that follow one another, counted until `most`."""
    at, count = _mp3_start(data), 0
    while count < most:
        head = int.from_bytes(data[at : at + 4], "big")
        version, layer, bits, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
        if head >> 21 != 0x7FF or layer != 1 or version == 1 or bits in (0, 15) or rate == 3:
            break  # not a frame of known length: the rest is not counted
        per_frame = 1152 if version == 3 else 576
        hertz = _RATES[rate] >> _HALVINGS[version]
        at += per_frame * 125 * _KBPS[version == 3][bits] // hertz + (head >> 9 & 1)
        count += per_frame
    return count
