"""Compute statistics of sample content: image headers, captions, unusable samples."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from gigabatch.data.decode.image_memory import open_image
from gigabatch.data.describe.index_stats import (
    TOP,
    Distribution,
    Frequencies,
    Tally,
    distribution_of_counts,
    equal_runs,
)
from gigabatch.data.errors import BadSample
from gigabatch.data.shards.reader import DamagedMember, Reader
from gigabatch.data.text.captions import CaptionSettings, MissingCaption, read_captions, value_at

SMALL = (64, 224)
"""Limits in pixels; the images whose shorter side is below each limit are counted."""
MAX_NAMES = 1000
"""Maximum number of scripts and languages that are listed."""
JOINERS = "\u200c\u200d"
"""Invisible characters that belong to the spelling of words."""
NO_LETTERS = "no letters"
_RENAMED = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "KATAKANA-HIRAGANA": "KATAKANA"}


@dataclass(frozen=True)
class ImageStats:
    """Statistics of image headers.

    Attributes:
        opened: Number of images whose header could be read.
        missing: Number of samples without an image.
        width: Distribution of widths in pixels.
        height: Distribution of heights in pixels.
        aspect: Distribution of width / height.
        sizes: Most frequent sizes.
        formats: Most frequent file formats.
        modes: Most frequent pixel modes, as PIL names them.
        small: Number of images whose shorter side is below a limit, by limit in pixels.
    """

    opened: int
    missing: int
    width: Distribution | None
    height: Distribution | None
    aspect: Distribution | None
    sizes: Frequencies
    formats: Frequencies
    modes: Frequencies
    small: dict[int, int]


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of captions; all captions of a sample count, even if a run uses only one.

    Attributes:
        samples: Number of samples with a caption.
        missing: Number of samples without the member.
        empty: Number of samples whose member contains no caption.
        per_sample: Distribution of the number of captions of a sample.
        characters: Distribution of a caption's length in characters.
        words: Distribution of a caption's length in words.
        distinct: Number of different captions.
        repeated: Number of samples that share a caption with another sample.
        top: Captions of more than one sample, with their numbers of samples.
        scripts: Most frequent scripts; a caption counts for the script of most of its letters.
        keys: Most frequent keys of a mapping of captions, such as languages.
    """

    samples: int
    missing: int
    empty: int
    per_sample: Distribution | None
    characters: Distribution | None
    words: Distribution | None
    distinct: int
    repeated: int
    top: list[tuple[str, int]]
    scripts: Frequencies
    keys: Frequencies | None


def one_line(text: str, width: int = 300) -> str:
    """Replace line ends and control characters, and shorten `text` to `width` characters."""
    line = "".join(c if c.isprintable() or c in JOINERS else " " for c in text[: 4 * width])
    line = " ".join(line.split())
    return line if len(line) <= width else line[: width - 1] + "\u2026"


@dataclass
class Images:
    """Counts over image headers."""

    missing: int = 0
    widths: Counter[float] = field(default_factory=Counter)
    heights: Counter[float] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    shorter: Counter[int] = field(default_factory=Counter)
    formats: Tally = field(default_factory=Tally)
    modes: Tally = field(default_factory=Tally)
    sizes: Tally = field(default_factory=Tally)

    def add(self, _: int, data: bytes) -> None:
        """Count an image; the first argument, its sample, is unused.

        Raises:
            BadSample: if it cannot be read.
        """
        try:
            image = open_image(data)
        except Exception as error:  # Pillow raises many types
            why = str(error) or type(error).__name__
            raise BadSample(f"the image cannot be read: {why}.") from error
        with image:
            width, height = image.size
            self.formats.add(image.format)
            self.modes.add(image.mode)
        self.widths[width] += 1
        self.heights[height] += 1
        self.aspects[round(width / height, 3)] += 1
        self.shorter[min(width, height)] += 1
        self.sizes.add(f"{width} x {height}")

    def stats(self) -> ImageStats:
        """Return the statistics of all images counted so far."""
        return ImageStats(
            opened=self.formats.count,
            missing=self.missing,
            width=distribution_of_counts(self.widths),
            height=distribution_of_counts(self.heights),
            aspect=distribution_of_counts(self.aspects),
            sizes=self.sizes.frequencies(),
            formats=self.formats.frequencies(),
            modes=self.modes.frequencies(),
            small={
                limit: sum(n for side, n in self.shorter.items() if side < limit) for limit in SMALL
            },
        )


@dataclass
class Captions:
    """Counts over captions; an 8-byte hash of each caption is kept to detect equal ones."""

    settings: CaptionSettings
    missing: int = 0
    empty: int = 0
    per_sample: Counter[float] = field(default_factory=Counter)
    characters: Counter[float] = field(default_factory=Counter)
    words: Counter[float] = field(default_factory=Counter)
    scripts: Tally = field(default_factory=Tally)
    keys: Tally = field(default_factory=Tally)
    samples: array[int] = field(default_factory=lambda: array("q"))
    firsts: array[int] = field(default_factory=lambda: array("q"))  # Starts in `hashes`.
    hashes: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, sample: int, data: bytes) -> None:
        """Count the captions of a sample.

        Raises:
            BadSample: if there are none, or they cannot be read.
        """
        try:
            captions = read_captions(data, self.settings, "")
        except BadSample as error:
            self.empty += isinstance(error, MissingCaption)
            raise BadSample(str(error).removeprefix(": ")) from error
        self.per_sample[len(captions)] += 1
        for caption in captions:
            self.characters[len(caption)] += 1
            self.words[len(caption.split())] += 1
            self.scripts.add(script_of(caption))
        for name in mapping_keys(data, self.settings):
            self.keys.add(name)
        self.samples.append(sample)
        self.firsts.append(len(self.hashes))
        self.hashes.extend(_hash(caption) for caption in dict.fromkeys(captions))

    def stats(self, reader: Reader) -> CaptionStats:
        """Return the statistics of all captions counted so far.

        Args:
            reader: Reader for the most frequent captions, whose text was not kept.
        """
        hashes = np.frombuffer(self.hashes, np.uint64)
        ordered = np.sort(hashes)
        begin, length = equal_runs(ordered)
        largest = np.argsort(-length, kind="stable")[:TOP]
        positions = [int(np.argmax(hashes == ordered[begin[group]])) for group in largest]
        top = zip(self._texts(positions, reader), length[largest].tolist(), strict=True)
        return CaptionStats(
            samples=len(self.samples),
            missing=self.missing,
            empty=self.empty,
            per_sample=distribution_of_counts(self.per_sample),
            characters=distribution_of_counts(self.characters),
            words=distribution_of_counts(self.words),
            distinct=len(hashes) - int((length - 1).sum()),
            repeated=self._repeated(hashes, ordered[begin]),
            top=sorted(top, key=lambda item: (-item[1], item[0])),
            scripts=self.scripts.frequencies(MAX_NAMES),
            keys=self.keys.frequencies(MAX_NAMES) if self.keys.count else None,
        )

    def _repeated(self, hashes: np.ndarray, shared: np.ndarray) -> int:
        """Count samples with one of the hashes `shared`, which are sorted."""
        if not len(shared):
            return 0
        nearest = np.minimum(np.searchsorted(shared, hashes), len(shared) - 1)
        firsts = np.frombuffer(self.firsts, np.int64)
        return int(np.logical_or.reduceat(shared[nearest] == hashes, firsts).sum())

    def _texts(self, positions: Sequence[int], reader: Reader) -> list[str]:
        """Read the captions at some positions of `hashes`."""
        firsts = np.frombuffer(self.firsts, np.int64)
        texts = []
        for position in positions:
            row = int(np.searchsorted(firsts, position, side="right")) - 1
            data = reader.read(self.samples[row], self.settings.member)
            captions = list(dict.fromkeys(read_captions(data, self.settings, "")))
            texts.append(captions[position - self.firsts[row]])
        return texts


def count_member(
    counts: Images | Captions,
    choices: Sequence[str],
    raw: Mapping[str, bytes | DamagedMember],
    sample: int,
    where: Callable[[], str],
) -> str | None:
    """Count one member of a sample.

    Args:
        counts: Images or captions counted so far.
        choices: Extensions; the first that the sample has is counted.
        raw: The sample's members by extension.
        sample: The sample's number.
        where: Returns the sample's location for messages.

    Returns:
        The problem if the member cannot be used, else None.
    """
    member = next((name for name in choices if name in raw), None)
    if member is None:
        counts.missing += 1
        return None
    data = raw[member]
    if isinstance(data, DamagedMember):
        return data.why
    try:
        counts.add(sample, data)
    except BadSample as error:
        return f"{where()}: {error}"
    return None


def mapping_keys(data: bytes, settings: CaptionSettings) -> list[str]:
    """Return the keys of a mapping of captions; empty if `data` contains no mapping."""
    if settings.field is None:
        return []
    captions = value_at(json.loads(data), settings.field)
    items = captions.items() if isinstance(captions, dict) else ()
    return [name for name, text in items if isinstance(text, str) and text.strip()]


def script_of(caption: str) -> str:
    """Return the script of most letters in a caption; this does not identify the language."""
    if caption.isascii():
        return "Latin" if any(map(str.isalpha, caption)) else NO_LETTERS
    letters = Counter(_script(character) for character in caption if character.isalpha())
    return letters.most_common(1)[0][0] if letters else NO_LETTERS


@cache
def _script(letter: str) -> str:
    """Return a letter's script: the first word of its Unicode name."""
    # Convert wide, small and bold letters to ordinary ones, whose names start with the script.
    plain = unicodedata.normalize("NFKC", letter)[0]
    word = unicodedata.name(plain, "UNNAMED").split(" ")[0]
    return _RENAMED.get(word, word).title()


def _hash(caption: str) -> int:
    data = caption.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
