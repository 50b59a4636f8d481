"""What is learnt by opening samples: images' headers, captions, and which cannot be used."""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from gigabatch.data.decode.members import FORMATS
from gigabatch.data.describe.rowstats import TOP, Frequencies, Spread, Tally, runs, spread_of_counts
from gigabatch.data.errors import BadSample
from gigabatch.data.shards.reader import DamagedMember, Reader
from gigabatch.data.text.captions import CaptionSettings, MissingCaption, read_captions, value_at

SMALL = (64, 224)
"""Pixels: images with a shorter side are counted."""
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a file that it cannot read."""
NAMES = 1000
"""Scripts and languages that are told."""
JOINERS = "\u200c\u200d"
"""Invisible, and part of how words are written."""
NO_LETTERS = "no letters"
_RENAMED = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "KATAKANA-HIRAGANA": "KATAKANA"}


@dataclass(frozen=True)
class ImageStats:
    """`opened`: images whose header could be read; `lacking`: samples without one. `small`: how
    many have a shorter side than so many pixels. `aspect`: width / height."""

    opened: int
    lacking: int
    width: Spread | None
    height: Spread | None
    aspect: Spread | None
    sizes: Frequencies
    formats: Frequencies
    modes: Frequencies
    small: dict[int, int]


@dataclass(frozen=True)
class CaptionStats:
    """All captions of a sample count, whichever of them a run would choose.

    `samples` have a caption, `lacking` lack the member, `empty` have it without a text in it.
    `repeated`: samples of which a caption is another sample's too. `top`: captions by how many
    samples have them, where more than one has. `scripts`: captions by the script of most of their
    letters. `keys`: of a mapping of captions, such as translations, its keys.
    """

    samples: int
    lacking: int
    empty: int
    each: Spread | None
    characters: Spread | None
    words: Spread | None
    distinct: int
    repeated: int
    top: list[tuple[str, int]]
    scripts: Frequencies
    keys: Frequencies | None


def open_image(data: bytes) -> Image.Image:
    """An image of which no more than the header is decoded. Raises BadSample, saying why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except IMAGE_ERRORS as error:
        raise BadSample(f"the image cannot be read: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """Without the address of an object, by which PIL names a file in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no PNG, JPEG or WebP"
    return str(error)


def one_line(text: str, width: int = 300) -> str:
    """Without line ends or control characters, whatever a member holds, and not too long."""
    line = "".join(c if c.isprintable() or c in JOINERS else " " for c in text[: 4 * width])
    line = " ".join(line.split())
    return line if len(line) <= width else line[: width - 1] + "\u2026"


@dataclass
class Images:
    """Image headers, counted."""

    lacking: int = 0
    widths: Counter[float] = field(default_factory=Counter)
    heights: Counter[float] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    shorter: Counter[int] = field(default_factory=Counter)
    formats: Tally = field(default_factory=Tally)
    modes: Tally = field(default_factory=Tally)
    sizes: Tally = field(default_factory=Tally)

    def add(self, _: int, data: bytes) -> None:
        """Raises BadSample where it is no image."""
        with open_image(data) as image:
            width, height = image.size
            self.formats.add(image.format)
            self.modes.add(image.mode)
        self.widths[width] += 1
        self.heights[height] += 1
        self.aspects[round(width / height, 3)] += 1
        self.shorter[min(width, height)] += 1
        self.sizes.add(f"{width} x {height}")

    def found(self) -> ImageStats:
        return ImageStats(
            opened=self.formats.count,
            lacking=self.lacking,
            width=spread_of_counts(self.widths),
            height=spread_of_counts(self.heights),
            aspect=spread_of_counts(self.aspects),
            sizes=self.sizes.frequencies(),
            formats=self.formats.frequencies(),
            modes=self.modes.frequencies(),
            small={
                limit: sum(n for side, n in self.shorter.items() if side < limit) for limit in SMALL
            },
        )


@dataclass
class Captions:
    """Captions, counted; eight bytes of each are kept to find equal ones."""

    settings: CaptionSettings
    lacking: int = 0
    empty: int = 0
    each: Counter[float] = field(default_factory=Counter)
    characters: Counter[float] = field(default_factory=Counter)
    words: Counter[float] = field(default_factory=Counter)
    scripts: Tally = field(default_factory=Tally)
    keys: Tally = field(default_factory=Tally)
    samples: array[int] = field(default_factory=lambda: array("q"))
    firsts: array[int] = field(default_factory=lambda: array("q"))  # each sample's first hash
    hashes: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, sample: int, data: bytes) -> None:
        """Raises BadSample where there is no caption."""
        try:
            captions = read_captions(data, self.settings, "")
        except BadSample as error:
            self.empty += isinstance(error, MissingCaption)
            raise BadSample(str(error).removeprefix(": ")) from error
        self.each[len(captions)] += 1
        for caption in captions:
            self.characters[len(caption)] += 1
            self.words[len(caption.split())] += 1
            self.scripts.add(script_of(caption))
        for name in mapping_keys(data, self.settings):
            self.keys.add(name)
        self.samples.append(sample)
        self.firsts.append(len(self.hashes))
        self.hashes.extend(_hash(caption) for caption in dict.fromkeys(captions))

    def found(self, reader: Reader) -> CaptionStats:
        """`reader` reads the most frequent captions once more: no text was kept."""
        hashes = np.frombuffer(self.hashes, np.uint64)
        ordered = np.sort(hashes)
        begin, length = runs(ordered)
        largest = np.argsort(-length, kind="stable")[:TOP]
        places = [int(np.argmax(hashes == ordered[begin[group]])) for group in largest]
        top = zip(self._texts(places, reader), length[largest].tolist(), strict=True)
        return CaptionStats(
            samples=len(self.samples),
            lacking=self.lacking,
            empty=self.empty,
            each=spread_of_counts(self.each),
            characters=spread_of_counts(self.characters),
            words=spread_of_counts(self.words),
            distinct=len(hashes) - int((length - 1).sum()),
            repeated=self._repeated(hashes, ordered[begin]),
            top=sorted(top, key=lambda item: (-item[1], item[0])),
            scripts=self.scripts.frequencies(NAMES),
            keys=self.keys.frequencies(NAMES) if self.keys.count else None,
        )

    def _repeated(self, hashes: np.ndarray, shared: np.ndarray) -> int:
        """Samples that have one of the hashes `shared`, which are sorted."""
        if not len(shared):
            return 0
        places = np.minimum(np.searchsorted(shared, hashes), len(shared) - 1)
        firsts = np.frombuffer(self.firsts, np.int64)
        return int(np.logical_or.reduceat(shared[places] == hashes, firsts).sum())

    def _texts(self, places: Sequence[int], reader: Reader) -> list[str]:
        """The captions at some places of `hashes`."""
        firsts = np.frombuffer(self.firsts, np.int64)
        texts = []
        for place in places:
            row = int(np.searchsorted(firsts, place, side="right")) - 1
            data = reader.read(self.samples[row], self.settings.member)
            captions = list(dict.fromkeys(read_captions(data, self.settings, "")))
            texts.append(captions[place - self.firsts[row]])
        return texts


def attempt(
    counted: Images | Captions,
    choices: Sequence[str],
    raw: Mapping[str, bytes | DamagedMember],
    sample: int,
    where: Callable[[], str],
) -> str | None:
    """Count the first member of `choices` that a sample has; what is wrong with it, if anything."""
    member = next((name for name in choices if name in raw), None)
    if member is None:
        counted.lacking += 1
        return None
    data = raw[member]
    if isinstance(data, DamagedMember):
        return data.why
    try:
        counted.add(sample, data)
    except BadSample as error:
        return f"{where()}: {error}"
    return None


def mapping_keys(data: bytes, settings: CaptionSettings) -> list[str]:
    """The keys of the captions that `data` holds, where they are a mapping."""
    if settings.field is None:
        return []
    found = value_at(json.loads(data), settings.field)
    held = found.items() if isinstance(found, dict) else ()
    return [name for name, text in held if isinstance(text, str) and text.strip()]


def script_of(caption: str) -> str:
    """The script of most of its letters: a guess at no language."""
    if caption.isascii():
        return "Latin" if any(map(str.isalpha, caption)) else NO_LETTERS
    letters = Counter(_script(character) for character in caption if character.isalpha())
    return letters.most_common(1)[0][0] if letters else NO_LETTERS


@cache
def _script(letter: str) -> str:
    """By the first word of its name. (NFKC makes plain letters of wide, small and bold ones.)"""
    plain = unicodedata.normalize("NFKC", letter)[0]
    word = unicodedata.name(plain, "UNNAMED").split(" ")[0]
    return _RENAMED.get(word, word).title()


def _hash(caption: str) -> int:
    told = caption.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")
